"""Files at fsspec addresses (``s3://``, ``gs://``, ``hf://``, ``https://`` …), read in a stream.

Whoever reads takes a file system anew in each process (fsspec keeps one per process), so readers
are picklable by their address. A read that fails is tried again a few times, and counted.
"""

import io
import math
import os
import re
import time
from collections import Counter
from collections.abc import Callable, Iterator
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, cast

import numpy as np
from numpy.lib import format as npy

from infogrowth.errors import UserError, shorten

retries: Counter[str] = Counter()
"""How many reads were tried again in this process, by the kind of error."""

_ADDRESS = re.compile(r"[a-z][a-z0-9+.-]+://", re.IGNORECASE)
_WAITS = (0.2, 1.0, 3.0, 10.0)  # seconds before each new attempt
_HEAD_BYTES = 4096  # at least the header of a npy file
_BLOCK_BYTES = 4 << 20  # fetched at once while reading on
_FINAL = (FileNotFoundError, PermissionError, IsADirectoryError, NotImplementedError, ImportError)


def is_remote(address: object) -> bool:
    """Whether ``address`` names something by a protocol rather than by a path."""
    return isinstance(address, str) and _ADDRESS.match(address) is not None


class RemotePath:
    """A file or folder at an address, in the words of pathlib that readers of folders use.

    Raises:
        UserError: in all methods that read: it is not there or cannot be read.
    """

    def __init__(self, address: str):
        self._address = address.rstrip("/")

    def __str__(self) -> str:
        return self._address

    def __truediv__(self, part: str) -> "RemotePath":
        return RemotePath(f"{self}/{part}")

    @property
    def name(self) -> str:
        return str(self).rsplit("/", 1)[-1]

    @property
    def stem(self) -> str:
        return PurePosixPath(self.name).stem

    @property
    def suffix(self) -> str:
        return PurePosixPath(self.name).suffix

    def is_file(self) -> bool:
        return self._ask("info", missing={}).get("type") == "file"

    def is_dir(self) -> bool:
        return self._ask("info", missing={}).get("type") == "directory"

    def kinds(self) -> dict[str, str]:
        """What lies right below, "folder" or "file" by name; empty where there is nothing."""
        own = _system(str(self))[1].rstrip("/")
        entries = self._ask("ls", missing=(), detail=True)
        found = {entry["name"].rstrip("/"): entry["type"] for entry in entries}
        return {
            path.rsplit("/", 1)[-1]: "folder" if kind == "directory" else "file"
            for path, kind in found.items()
            if path != own
        }

    def glob(self, pattern: str) -> Iterator["RemotePath"]:
        """What lies right below and has a name that fits, sorted."""
        return (self / name for name in sorted(self.kinds()) if fnmatchcase(name, pattern))

    def open(self, mode: str = "rb") -> BinaryIO:
        """A seekable file that fetches what is read of it, and tries again where that fails."""
        file = self._ask("open", mode=mode, block_size=_BLOCK_BYTES)
        return cast(BinaryIO, _RetryingFile(str(self), file))

    def read_bytes(self) -> bytes:
        return self._ask("cat_file")

    def read_range(self, start: int, stop: int) -> bytes:
        """The bytes ``start … stop − 1``, fetched alone; fewer at the end of the file."""
        return self._ask("cat_file", start=start, end=stop)

    def version(self) -> str:
        """Its size and what the server calls its version: changes when the content does."""
        info = self._ask("info")
        version = (info.get(key) for key in ("ETag", "etag", "checksum", "blob_id", "mtime"))
        return f"{info.get('size')} {next(filter(None, version), '')}"

    def _ask(self, method: str, missing: Any = None, **options: Any) -> Any:
        """What a method of the file system returns; ``missing``, if given, where there is nothing.
        (Those that say it themselves, as ``isfile``, take a lost connection for nothing too.)"""
        system, path = _system(str(self))

        def ask() -> Any:
            try:
                return getattr(system, method)(path, **options)
            except FileNotFoundError:
                if missing is None:
                    raise
                return missing

        return _tried(str(self), ask)


AnyPath = Path | RemotePath


def as_path(path: str | os.PathLike[str] | RemotePath) -> AnyPath:
    """What is at a path or an address, as it is in either."""
    if isinstance(path, RemotePath):
        return path
    return RemotePath(str(path)) if is_remote(path) else Path(path)


def opened(path: AnyPath) -> Any:
    """What numpy, pyarrow and zipfile open: a path as it is, a file at an address as a stream."""
    return path.open() if isinstance(path, RemotePath) else path


def retry_summary() -> str | None:
    """How often reads were tried again so far, in one sentence; None if never."""
    if not retries:
        return None
    kinds = ", ".join(f"{count:,} × {kind}" for kind, count in retries.most_common())
    return f"{retries.total():,} reads were tried again ({kinds})"


class RemoteArray:
    """The array in a npy file at an address: its shape and type, and rows by slices."""

    def __init__(self, path: RemotePath):
        self._path = path
        head = io.BytesIO(path.read_range(0, _HEAD_BYTES))
        self.shape, fortran_order, self.dtype = npy_header(head)
        self._start = head.tell()
        if fortran_order and 0 not in self.shape:
            raise UserError(f"{path} is stored column by column; save it in C order")

    def __getitem__(self, rows: slice) -> Any:
        start, stop, _ = rows.indices(self.shape[0])
        width = self.dtype.itemsize * math.prod(self.shape[1:])
        count = max(0, stop - start)
        first = self._start + start * width
        content = self._path.read_range(first, first + count * width) if count else b""
        if len(content) != count * width:
            raise UserError(f"{self._path} is shorter than its header says; write it again")
        return np.frombuffer(content, self.dtype).reshape(count, *self.shape[1:])


def npy_header(file: Any) -> tuple[tuple[int, ...], bool, Any]:
    """Shape, order and type of the array in an opened npy file, which then stands at its rows."""
    if npy.read_magic(file) == (1, 0):
        return npy.read_array_header_1_0(file)
    return npy.read_array_header_2_0(file)


class _RetryingFile:
    """fsspec's file, each read of which is tried again from where it began."""

    def __init__(self, address: str, file: Any):
        self._address, self._file = address, file

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def __enter__(self) -> "_RetryingFile":
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def read(self, size: int = -1) -> bytes:
        position = self._file.tell()

        def read() -> bytes:
            self._file.seek(position)
            return self._file.read(size)

        return _tried(self._address, read)

    def readinto(self, buffer: Any) -> int:
        content = self.read(len(buffer))
        buffer[: len(content)] = content
        return len(content)


def _system(address: str) -> tuple[Any, str]:
    """The file system of an address, and the address as that system names it."""
    try:
        import fsspec

        return fsspec.core.url_to_fs(address)
    except (ImportError, ValueError, OSError) as error:  # fsspec names what is missing
        raise UserError(
            f"{address} is no address that can be read: {shorten(error)} (pip install "
            "'infogrowth[remote]' brings what s3:// and https:// need)"
        ) from error


def _tried(address: str, action: Callable[[], Any]) -> Any:
    """What ``action`` returns, at the latest at its fifth attempt."""
    for wait in (*_WAITS, None):
        try:
            return action()
        except Exception as error:  # each file system raises its own kinds
            if isinstance(error, FileNotFoundError):
                raise UserError(f"{address} does not exist; check the address") from error
            if wait is None or isinstance(error, _FINAL):
                raise UserError(f"cannot read {address}: {shorten(error)}") from error
            retries[type(error).__name__] += 1
            time.sleep(wait)
    raise AssertionError("unreachable")
