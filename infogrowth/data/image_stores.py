"""Stores of encoded images by id: an LMDB, which packing writes, or a folder of files.

In an LMDB an image's key is its id without folder and without image extension
(``cc3m_train/000123.jpg`` → ``000123``), its value the encoded bytes as they came. Readers find an
image by its id with or without the extension, whichever way the store was made.
"""

import os
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager
from itertools import islice
from pathlib import Path, PurePosixPath
from typing import Any, Protocol

from infogrowth.data.names import (
    IMAGE_EXTENSIONS,
    extension_of,
    image_id,
    image_key,
    possible_names,
)
from infogrowth.errors import UserError, refusing

MAX_KEY_BYTES = 511  # LMDB's own limit

_MAGIC = 0xBEEFC0DE.to_bytes(4, "little")  # at byte 16 of every LMDB data file
_FIRST_MAP_SIZE = 64 << 20
_MAX_BATCH_COUNT, _MAX_BATCH_BYTES = 1000, 64 << 20


class ImageStore(Protocol):
    """Encoded images by id; picklable."""

    def read(self, name: str) -> bytes:
        """The bytes; raises UserError naming the id when there is no such image."""
        ...

    def __contains__(self, name: str) -> bool: ...


def open_images(path: str | os.PathLike[str] | ImageStore) -> ImageStore:
    """The images at ``path``: an LMDB if it is one, else a folder of files; a store as it is.

    Raises:
        UserError: nothing is there.
    """
    if not isinstance(path, str | os.PathLike):
        return path
    if is_lmdb(path):
        return LmdbImages(path)
    if os.path.isdir(path):
        return FolderImages(path)
    raise UserError(f"{path} is neither an LMDB nor a folder of images; check the path")


class FolderImages:
    """Image files below a folder, by relative path, with or without the extension."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self._listed: dict[str, dict[str, Path]] = {}  # only where a name is not found as it is

    def read(self, name: str) -> bytes:
        """The bytes of an image.

        Raises:
            UserError: no such file, one that cannot be read, or an id that leads out of the folder.
        """
        parts = PurePosixPath(name).parts
        if ".." in parts or name.startswith("/") or "\0" in name:
            raise UserError(f"the image {name!r} would lie outside of the folder {self.path}")
        file = self._find(name)
        if file is None:
            raise UserError(f"the image {name!r} is not in the folder {self.path}; check both")
        with refusing(file, "the image"):
            return file.read_bytes()

    def __contains__(self, name: str) -> bool:
        return self._find(name) is not None

    def _find(self, name: str) -> Path | None:
        for possible in possible_names(name):
            if (file := self.path / possible).is_file():
                return file
        name = name.replace("\\", "/")
        folder = name.rpartition("/")[0]
        if folder not in self._listed:  # by ids, whatever their capitals and form of Unicode
            below = self.path / folder
            names = sorted(os.listdir(below)) if below.is_dir() else []
            files = [Path(folder, n) for n in names if extension_of(n) in IMAGE_EXTENSIONS]
            self._listed[folder] = {image_id(str(f)).casefold(): self.path / f for f in files}
        return self._listed[folder].get(image_id(name).casefold())


class LmdbImages:
    """Images of an LMDB by id, read-only.

    It is opened when the first image is asked for, once per process however many objects name
    it, so an object can be pickled, and used in worker processes and after a fork. Nothing is
    locked: do not read while another process writes to the same LMDB.

    Args:
        path: folder with ``data.mdb``, or a single ``.mdb`` file.

    Raises:
        UserError: there is no LMDB at ``path``.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self._real_path = os.path.realpath(path)
        if not is_lmdb(self.path):
            state = "is not an LMDB" if self.path.exists() else "does not exist"
            raise UserError(
                f"the LMDB {path} {state}; make one with `python scripts/cc3m_lmdb_writer.py`"
            )

    def read(self, name: str) -> bytes:
        """The encoded bytes of an image, whether its id is given with the extension or without.

        Raises:
            UserError: naming the id and the LMDB, if there is no such image.
        """
        data = self._find(name)
        if data is None:
            raise UserError(
                f"the image {name!r} is not in the LMDB {self.path} "
                f"({len(self)} images); was it packed from other images?"
            )
        return data

    def __contains__(self, name: str) -> bool:
        return self._find(name) is not None

    def __len__(self) -> int:
        return _environment(self._real_path).stat()["entries"]

    def keys(self) -> Iterator[str]:
        """All keys, in order, as they are stored."""
        return _keys(_environment(self._real_path))

    def _find(self, name: str) -> bytes | None:
        with _refusing(self.path, "read"), _environment(self._real_path).begin() as transaction:
            for possible in possible_names(name):
                key = _encoded(possible)
                if 0 < len(key) <= MAX_KEY_BYTES:
                    data = transaction.get(key)
                    if data is not None:
                        return data
        return None


def is_lmdb(path: str | os.PathLike[str]) -> bool:
    """Whether ``path`` is an LMDB (a folder with ``data.mdb``, or such a file), by its magic."""
    file = Path(path)
    try:
        with open(file / "data.mdb" if file.is_dir() else file, "rb") as opened:
            return opened.read(20)[16:] == _MAGIC
    except OSError:
        return False


class LmdbWriter:
    """Adds images to an LMDB in batched transactions; the map grows as needed.

    What was committed survives a killed process. Use it as a context manager, or call
    :meth:`close`.

    Args:
        path: the LMDB's folder; made if it does not exist.
        map_size: bytes to reserve at first; doubled whenever they do not suffice.

    Raises:
        UserError: the folder cannot be opened as an LMDB, or the disk is full (in any method).
    """

    def __init__(self, path: str | os.PathLike[str], map_size: int = _FIRST_MAP_SIZE) -> None:
        import lmdb  # not at the top: whoever reads folders of images need not have it

        self.path = Path(path)
        with _refusing(self.path, "write"):
            self.path.mkdir(parents=True, exist_ok=True)
            _close(os.path.realpath(path))
            self._env = lmdb.open(str(self.path), map_size=map_size)
        self._pending: dict[bytes, bytes] = {}
        self._pending_bytes = 0

    def put(self, name: str, data: bytes, replace: bool = False) -> bool:
        """Store ``data`` under ``name``'s key; False, and nothing stored, if the key is taken.

        It is on disk after the next :meth:`commit`, which comes by itself often enough.

        Args:
            replace: store it in place of what is there.

        Raises:
            UserError: the key is empty or longer than 511 bytes.
        """
        key = _encoded(image_key(name))
        if not 0 < len(key) <= MAX_KEY_BYTES:
            raise UserError(
                f"the id {name[:60]!r} makes a key of {len(key)} bytes; "
                f"an LMDB takes 1 to {MAX_KEY_BYTES}"
            )
        if not replace and self.get(name) is not None:
            return False
        self._pending[key] = data
        self._pending_bytes += len(data)
        if len(self._pending) >= _MAX_BATCH_COUNT or self._pending_bytes >= _MAX_BATCH_BYTES:
            self.commit()
        return True

    def get(self, name: str) -> bytes | None:
        """What is stored (or waits for its commit) under exactly ``name``'s key."""
        key = _encoded(image_key(name))
        if key in self._pending:
            return self._pending[key]
        with _refusing(self.path, "read"), self._env.begin() as transaction:
            return transaction.get(key)

    def commit(self) -> None:
        """Write what is pending in one transaction; it is on disk when this returns."""
        import lmdb

        with _refusing(self.path, "write"):
            while self._pending:
                try:
                    with self._env.begin(write=True) as transaction:
                        # In key order pages are filled one after the other.
                        for key in sorted(self._pending):
                            transaction.put(key, self._pending[key])
                    self._pending, self._pending_bytes = {}, 0
                except lmdb.MapFullError:  # the transaction is undone: once more in a bigger map
                    self._env.set_mapsize(2 * self._env.info()["map_size"])

    def keys(self) -> Iterator[str]:
        """All committed keys in order."""
        return _keys(self._env)

    def __len__(self) -> int:
        return self._env.stat()["entries"] + len(self._pending)

    def close(self) -> None:
        """Commit and close."""
        try:
            self.commit()
        finally:
            self._env.close()

    def __enter__(self) -> "LmdbWriter":
        return self

    def __exit__(self, kind: type | None, *_: object) -> None:
        if kind is None:
            self.close()
        else:
            self._env.close()


# LMDB must not be opened twice in a process: the objects that read one path share one environment.
_environments: dict[str, Any] = {}
_opening = threading.Lock()


def _environment(path: str) -> Any:
    """The environment at a real path, open for reading until the process ends or writes to it."""
    opened = _environments.get(path)
    if opened is None:
        import lmdb

        with _opening, _refusing(path, "read"):
            opened = _environments.get(path) or lmdb.open(
                path, subdir=os.path.isdir(path), readonly=True, lock=False, readahead=False
            )
            _environments[path] = opened
    return opened


def _close(path: str) -> None:
    with _opening:
        if path in _environments:
            _environments.pop(path).close()


def _close_inherited() -> None:
    """In a forked child: close the parent's environments, which are not safe to use here.

    Without a lock file closing touches only this process's copies of the map and descriptor.
    """
    global _opening
    _opening = threading.Lock()
    while _environments:
        _environments.popitem()[1].close()


os.register_at_fork(after_in_child=_close_inherited)


def _keys(environment: Any) -> Iterator[str]:
    with environment.begin() as transaction:
        keys = transaction.cursor().iternext(keys=True, values=False)
        while batch := list(islice(keys, 10_000)):
            yield from (key.decode("utf-8", "surrogateescape") for key in batch)


def _encoded(name: str) -> bytes:
    try:
        return name.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError as error:  # half of a surrogate pair, from a JSON escape
        raise UserError(f"the id {name!r:.80} is not valid text") from error


def _refusing(path: str | Path, action: str) -> AbstractContextManager[None]:
    import lmdb

    fault = "cannot be read" if action == "read" else "cannot be written"
    return refusing(path, "the LMDB", lmdb.Error, fault=fault, action=action)
