"""Files that are written whole or not at all, and JSON whose errors name file and line."""

import json
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.lib import format as npy

from infogrowth.errors import UserError, refusing, shorten
from infogrowth.remote import RemotePath, as_path

TEMPORARY_MARK = ".tmp-"


@contextmanager
def atomic_write(path: str | os.PathLike[str], mode: str = "wb") -> Iterator[IO[Any]]:
    """Open a file that appears under ``path`` only once it is complete and on disk.

    The content goes to a temporary name in the same folder, is flushed and fsynced, renamed over
    ``path``, and the folder is fsynced, so a reader (or a machine that lost power) sees either the
    old file or the whole new one. On an exception the temporary file is removed.

    Args:
        path: the file to make; missing parent folders are created.
        mode: ``"wb"`` for bytes, ``"w"`` for UTF-8 text.

    Raises:
        UserError: the file cannot be written (no permission, full disk, …).
    """
    if mode not in ("wb", "w"):
        raise ValueError(f"mode is 'wb' or 'w', not {mode!r}")
    path = Path(path)
    temporary = path.with_name(f"{path.name}{TEMPORARY_MARK}{os.getpid()}-{secrets.token_hex(4)}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, mode, encoding=None if "b" in mode else "utf-8") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        folder = os.open(path.parent, os.O_RDONLY)
        try:  # the name, too: a rename is only on disk after this
            os.fsync(folder)
        finally:
            os.close(folder)
    except OSError as error:
        raise UserError(f"cannot write {path}: {shorten(error)}") from error
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def remove_leftovers(directory: str | os.PathLike[str], name: str = "") -> int:
    """Delete the temporary files that a killed run left in ``directory``; returns how many.

    Args:
        name: only those of the file of this name, where the folder may be others' too.
    """
    leftovers = [
        path
        for path in Path(directory).glob(f"*{TEMPORARY_MARK}*")
        if path.is_file() and path.name.startswith(f"{name}{TEMPORARY_MARK}" if name else "")
    ]
    for leftover in leftovers:
        leftover.unlink(missing_ok=True)
    return len(leftovers)


def atomic_write_json(
    path: str | os.PathLike[str], value: object, indent: int | None = None
) -> None:
    """Write ``value`` as UTF-8 JSON through :func:`atomic_write`, ending in a newline."""
    text = json.dumps(value, indent=indent, ensure_ascii=False, allow_nan=False)
    with atomic_write(path, "w") as file:
        file.write(text + "\n")


def atomic_write_array(path: str | os.PathLike[str], *parts: np.ndarray) -> None:
    """Write an array, or several one after the other, as one .npy file."""
    header = npy.header_data_from_array_1_0(parts[0])
    header["shape"] = (sum(map(len, parts)), *parts[0].shape[1:])
    header["fortran_order"] = False
    with atomic_write(path) as file:
        npy.write_array_header_1_0(file, header)
        for part in parts:  # not by numpy, whose own writing does not name why a full disk fails
            file.write(part.tobytes() if not part.flags.c_contiguous else part.data)


def read_json(
    path: str | os.PathLike[str] | RemotePath, what: str = "the JSON file", holds: type = object
) -> Any:
    """Parse the JSON at ``path``; a whole number of thousands of digits comes back as infinity.

    Args:
        what: how the error names the file, for example ``"the annotation file"``.
        holds: what it must be: ``list`` or ``dict``.

    Raises:
        UserError: missing, unreadable, not UTF-8, not JSON (with line and column), or of another
            kind.
    """
    with refusing(path, what, ValueError, fault="is not valid JSON"):
        text = as_path(path).read_bytes().decode("utf-8-sig")
        try:
            content = json.loads(text)
        except json.JSONDecodeError:
            raise
        except ValueError:  # a whole number of more digits than Python converts
            content = json.loads(text, parse_int=_int_or_infinity)
    if not isinstance(content, holds):
        kind = "a list" if holds is list else "an object"
        raise UserError(f"{what} {path} must hold {kind}, not a {type(content).__name__}")
    return content


def _int_or_infinity(digits: str) -> int | float:
    try:
        return int(digits)
    except ValueError:
        return float(digits)
