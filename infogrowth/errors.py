"""The one error that is meant for the person at the keyboard, and how others become it."""

import re
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata


class UserError(Exception):
    """Bad input, reported in one sentence that names the file, key or sample and what to do.

    Commands print it as ``error: …`` and exit with status 2; it never carries a traceback: one from
    a worker process of a DataLoader, which puts it before the sentence, is left out.
    """

    def __init__(self, text: object = "") -> None:
        super().__init__(str(text).rpartition(f"{__name__}.UserError: ")[2].rstrip())


class BadSample(Exception):
    """A sample, or its caption or image, cannot be used; says why, in words fit for a record.

    Whoever reads a dataset decides what to do with it.
    """


def exit_status(error: BaseException) -> int:
    """Print an error that ends a command; returns the exit status it stands for.

    What :func:`sentence` has words for is one sentence and 2, an interruption is 130; any other
    error is a fault of the program: its traceback, and 1.
    """
    if isinstance(error, SystemExit):
        return error.code if isinstance(error.code, int) else 1
    if isinstance(error, KeyboardInterrupt):
        print("interrupted; what was committed is safe, run the command again", file=sys.stderr)
        return 130
    if (text := sentence(error)) is not None:
        print(f"error: {text}", file=sys.stderr)
        return 2
    traceback.print_exception(error)
    return 1


def sentence(error: BaseException) -> str | None:
    """What a user can mend, in one sentence: bad input, a file that cannot be used, a package that
    is not installed; None for a fault of the program."""
    if isinstance(error, UserError):
        return str(error)
    if isinstance(error, OSError) and error.filename is not None:
        return f"cannot use {error.filename}: {error.strerror}"
    if isinstance(error, ModuleNotFoundError):
        module = (error.name or "").partition(".")[0]
        if module and module != "infogrowth":
            package = _DISTRIBUTIONS.get(module, module)
            extra = _extra_of(package)
            wanted = f"'infogrowth[{extra}]'" if extra else package
            return f"this needs the package {package}: pip install {wanted}"
    return None


# Where the module has another name than what is installed.
_DISTRIBUTIONS = {"PIL": "pillow", "yaml": "pyyaml"}


def _extra_of(package: str) -> str | None:
    """The extra of this project that brings a package, as its own metadata says."""
    try:
        requirements = metadata.requires("infogrowth") or []
    except metadata.PackageNotFoundError:  # a checkout that was not installed
        return None
    name = "[-_.]+".join(map(re.escape, re.split("[-_.]+", package)))
    of_extra = re.compile(rf"""{name}(?![\w.-]).*extra == ['"]([\w-]+)['"]""", re.IGNORECASE)
    return next((found[1] for found in map(of_extra.match, requirements) if found), None)


def shorten(error: object, limit: int = 200) -> str:
    """What an exception (or any text) says, on one line of at most ``limit`` characters."""
    if isinstance(error, OSError) and error.strerror:
        error = error.strerror
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= limit else text[: limit - 1] + "…"


@contextmanager
def refusing(
    path: object,
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
