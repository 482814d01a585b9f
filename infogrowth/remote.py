"""Files at fsspec addresses (``s3://``, ``gs://``, ``hf://``, ``https://`` …), read in a stream.

Whoever reads takes a file system anew in each process (fsspec keeps one per process), so readers
are picklable by their address. A read that fails is tried again a few times, and counted.
"""

import io
import re
import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import Any, BinaryIO, TypeVar

from infogrowth.errors import UserError, shorten

T = TypeVar("T")

retries: Counter[str] = Counter()
"""How many reads were tried again in this process, by the kind of error."""

_ADDRESS = re.compile(r"[a-z][a-z0-9+.-]+://", re.IGNORECASE)
_WAITS = (0.2, 1.0, 3.0, 10.0)  # seconds before each new attempt
_BLOCK_BYTES = 4 << 20  # fetched at once while reading on
_FINAL = (FileNotFoundError, PermissionError, IsADirectoryError, NotImplementedError, ImportError)


def is_remote(address: object) -> bool:
    """Whether ``address`` names something by a protocol rather than by a path."""
    return isinstance(address, str) and _ADDRESS.match(address) is not None


def list_remote(address: str) -> list[str]:
    """Names of all files below ``address``, relative to it, ``/`` between their parts, sorted.

    Raises:
        UserError: there is nothing, it cannot be read, or its protocol's package is missing.
    """
    system, root = _system(address)
    found = _tried(address, partial(system.find, root))
    prefix = root.rstrip("/") + "/"
    names = sorted(path.removeprefix(prefix) for path in found if path.startswith(prefix))
    if not names:
        raise UserError(f"there are no files at {address}; check the address")
    return names


def open_remote(address: str, name: str = "") -> BinaryIO:
    """A seekable file that fetches what is read of it, and tries again where that fails.

    Raises:
        UserError: it is not there or cannot be read, here or in any later read.
    """
    return io.BufferedReader(_RemoteFile(_joined(address, name)), 1 << 16)


def read_remote(address: str, name: str = "") -> bytes:
    """The whole content of a file.

    Raises:
        UserError: it is not there or cannot be read.
    """
    system, path = _system(whole := _joined(address, name))
    return _tried(whole, partial(system.cat_file, path))


def remote_version(address: str, name: str = "") -> str:
    """Size of a file and what the server calls its version: changes when the content does.

    Raises:
        UserError: it is not there or cannot be read.
    """
    system, path = _system(whole := _joined(address, name))
    told = _tried(whole, partial(system.info, path))
    version = (told.get(key) for key in ("ETag", "etag", "checksum", "blob_id", "mtime"))
    return f"{told.get('size')} {next(filter(None, version), '')}"


def retry_summary() -> str | None:
    """How often reads were tried again so far, in one sentence; None if never."""
    if not retries:
        return None
    kinds = ", ".join(f"{count:,} × {kind}" for kind, count in retries.most_common())
    return f"{retries.total():,} reads were tried again ({kinds})"


class _RemoteFile(io.RawIOBase):
    def __init__(self, address: str):
        self._address = address
        system, path = _system(address)
        self._file: Any = _tried(address, partial(system.open, path, "rb", block_size=_BLOCK_BYTES))
        self._position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._file.size}
        self._position = base[whence] + offset
        return self._position

    def tell(self) -> int:
        return self._position

    def readinto(self, buffer: Any) -> int:
        def read() -> bytes:
            self._file.seek(self._position)
            return self._file.read(len(buffer))

        content = _tried(self._address, read)
        buffer[: len(content)] = content
        self._position += len(content)
        return len(content)

    def close(self) -> None:
        if not self.closed:
            self._file.close()
        super().close()


def _joined(address: str, name: str) -> str:
    return f"{address.rstrip('/')}/{name}" if name else address


def _system(address: str) -> tuple[Any, str]:
    """The file system of an address, and the address as that system names it."""
    try:
        import fsspec

        return fsspec.core.url_to_fs(address)
    except ImportError as error:
        raise UserError(
            f"{address} needs a package that is not installed: {shorten(error)} "
            "(pip install 'infogrowth[s3]' for s3://)"
        ) from error
    except (ValueError, OSError) as error:
        raise UserError(f"{address} is no address that can be read: {shorten(error)}") from error


def _tried(address: str, action: Callable[[], T]) -> T:
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
