"""The one error that is meant for the person at the keyboard, and how others become it."""

import os
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager


class UserError(Exception):
    """Bad input, reported in one sentence that names the file, key or sample and what to do.

    Commands print it as ``error: …`` and exit with status 2; it never carries a traceback.
    """


def exit_status(error: BaseException) -> int:
    """Print an error that ends a command; returns the exit status it stands for.

    Bad input and files that cannot be used are one sentence and 2, an interruption is 130; any
    other error is a fault of the program: its traceback, and 1.
    """
    if isinstance(error, SystemExit):
        return error.code if isinstance(error.code, int) else 1
    if isinstance(error, KeyboardInterrupt):
        print("interrupted; what was committed is safe, run the command again", file=sys.stderr)
        return 130
    if isinstance(error, UserError):
        print(f"error: {error}", file=sys.stderr)
        return 2
    if isinstance(error, OSError) and error.filename is not None:
        print(f"error: cannot use {error.filename}: {error.strerror}", file=sys.stderr)
        return 2
    traceback.print_exception(error)
    return 1


def shorten(error: object, limit: int = 200) -> str:
    """What an exception (or any text) says, on one line of at most ``limit`` characters."""
    if isinstance(error, OSError) and error.strerror:
        error = error.strerror
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= limit else text[: limit - 1] + "…"


@contextmanager
def refusing(
    path: str | os.PathLike[str],
    what: str,
    *errors: type[Exception],
    fault: str = "cannot be read",
    action: str = "read",
) -> Iterator[None]:
    """Pass a parser's own error on as one UserError that names the file.

    ``with refusing(path, "the array", ValueError): numpy.load(path)`` raises ``the array PATH
    cannot be read: …``. What the system refuses (OSError) is passed on too, a missing file and
    content that is nested too deeply in sentences of their own.

    Args:
        what: the file in plain words, for example ``"the annotation file"``.
        errors: what the parser raises for content that it cannot take.
        fault: what an error in ``errors`` says of the file, for example ``"is not valid JSON"``.
        action: what was tried when the system refused: ``"read"`` or ``"write"``.

    Raises:
        UserError: in place of the errors named.
    """
    try:
        yield
    except UserError:
        raise
    except FileNotFoundError as error:
        raise UserError(f"{what} {path} does not exist; check the path") from error
    except RecursionError as error:
        raise UserError(f"{what} {path} {fault}: it is nested too deeply") from error
    except errors as error:
        raise UserError(f"{what} {path} {fault}: {shorten(error)}") from error
    except OSError as error:
        raise UserError(f"cannot {action} {what} {path}: {shorten(error)}") from error
