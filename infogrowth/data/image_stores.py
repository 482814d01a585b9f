"""Encoded images by id: from an LMDB, which packing writes, a folder of files, or a download.

In an LMDB an image's key is its id without folder and without image extension
(``cc3m_train/000123.jpg`` → ``000123``), its value the encoded bytes as they came. Readers find an
image by its id with or without the extension, whichever way the store was made.
"""

import os
import threading
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, suppress
from pathlib import Path, PurePosixPath
from typing import Any

from infogrowth.data.sources import Source, open_source
from infogrowth.data.text import (
    IMAGE_EXTENSIONS,
    extension_of,
    image_id,
    image_key,
    possible_names,
)
from infogrowth.errors import BadSample, UserError, refusing
from infogrowth.remote import is_remote

MISSING = "the image is missing"
MAX_KEY_BYTES = 511  # LMDB's own limit

_MAGIC = 0xBEEFC0DE.to_bytes(4, "little")  # at byte 16 of every LMDB data file
_FIRST_MAP_SIZE = 64 << 20
_MAX_BATCH_COUNT, _MAX_BATCH_BYTES = 1000, 64 << 20


class ImageStore:
    """Encoded images by id; picklable.

    Attributes:
        path: where they lie.
    """

    path: Any

    def find(self, name: str) -> bytes:
        """The bytes of an image, whether its id is given with the extension or without; raises
        BadSample with a reason when there is no such image."""
        raise NotImplementedError

    def read(self, name: str) -> bytes:
        """As :meth:`find`, where no image may be missing.

        Raises:
            UserError: naming the id and the store, if there is no such image.
        """
        try:
            return self.find(name)
        except BadSample as error:
            raise UserError(
                f"the image {name!r} is not in {self.path} ({error}); was that made from other "
                "images?"
            ) from error


def open_images(path: str | os.PathLike[str] | ImageStore, ids: Sequence[str] = ()) -> ImageStore:
    """The images at ``path``: an LMDB if it is one, else a folder of files; a store as it is.

    Args:
        ids: of images that are wanted; what has one of them as a sample, in a download or at an
            address, is read as :func:`infogrowth.data.sources.open_source` reads it.

    Raises:
        UserError: nothing is there.
    """
    if not isinstance(path, str | os.PathLike):
        return path
    if is_lmdb(path):
        return LmdbImages(path)
    folder = os.path.isdir(path)
    if ids and (folder or is_remote(path)):
        with suppress(UserError):  # a plain folder of images, perhaps
            images = SourceImages(open_source(path))
            if not images.numbers.keys().isdisjoint(ids):
                return images
    if folder:
        return FolderImages(path)
    raise UserError(f"{path} is neither an LMDB nor a folder of images; check the path")


class SourceImages(ImageStore):
    """The images of a source, by the ids of its samples."""

    def __init__(self, source: Source) -> None:
        self.path, self._source = source.path, source
        self.numbers = {name: number for number, name in enumerate(source.ids)}

    def find(self, name: str) -> bytes:
        if (number := self.numbers.get(name)) is None:
            raise BadSample(MISSING)
        sample = self._source.read(number)
        if sample.data is None:
            raise BadSample(sample.problem or MISSING)
        return sample.data


class FolderImages(ImageStore):
    """Image files below a folder, by relative path, with or without the extension."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self._listed: dict[str, dict[str, Path]] = {}  # only where a name is not found as it is

    def find(self, name: str) -> bytes:
        """The bytes of an image.

        Raises:
            BadSample: no such file.
            UserError: one that cannot be read, or an id that leads out of the folder.
        """
        if ".." in PurePosixPath(name).parts or name.startswith("/") or "\0" in name:
            raise UserError(f"the image {name!r} would lie outside of the folder {self.path}")
        files = (self.path / possible for possible in possible_names(name))
        file = next(filter(Path.is_file, files), None) or self._alike(name.replace("\\", "/"))
        if file is None:
            raise BadSample(MISSING)
        with refusing(file, "the image"):
            return file.read_bytes()

    def _alike(self, name: str) -> Path | None:
        """The file of the same id, whatever its capitals and form of Unicode."""
        folder = name.rpartition("/")[0]
        if folder not in self._listed:
            below = self.path / folder
            names = sorted(os.listdir(below)) if below.is_dir() else []
            files = [Path(folder, n) for n in names if extension_of(n) in IMAGE_EXTENSIONS]
            self._listed[folder] = {image_id(str(f)).casefold(): self.path / f for f in files}
        return self._listed[folder].get(image_id(name).casefold())


class LmdbImages(ImageStore):
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

    def find(self, name: str) -> bytes:
        with _refusing(self.path, "read"), _environment(self._real_path).begin() as transaction:
            for possible in possible_names(name):
                with suppress(BadSample):  # with an extension it may be too long
                    if (data := transaction.get(lmdb_key(possible))) is not None:
                        return data
        raise BadSample(MISSING)

    def keys(self) -> Iterator[str]:
        """All keys, in order, as they are stored."""
        return _keys(_environment(self._real_path))


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

    What was committed survives a killed process. It is a context manager, which commits at its end.

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
            with _opening:
                if reading := _environments.pop(os.path.realpath(path), None):
                    reading.close()
            self._env = lmdb.open(str(self.path), map_size=map_size)
        self._pending: dict[bytes, bytes] = {}
        self._pending_bytes = 0

    def put(self, name: str, data: bytes, replace: bool = False) -> bool:
        """Store ``data`` under ``name``'s key; False, and nothing stored, if the key is taken.

        It is on disk after the next :meth:`commit`, which comes by itself often enough.

        Args:
            replace: store it in place of what is there.

        Raises:
            BadSample: the key is empty, longer than 511 bytes, or no valid text.
        """
        key = lmdb_key(image_key(name))
        if not replace and self.get(name) is not None:
            return False
        self._pending[key] = data
        self._pending_bytes += len(data)
        if len(self._pending) >= _MAX_BATCH_COUNT or self._pending_bytes >= _MAX_BATCH_BYTES:
            self.commit()
        return True

    def get(self, name: str) -> bytes | None:
        """What is stored (or yet to be committed) under exactly ``name``'s key, if it has one."""
        with suppress(BadSample), _refusing(self.path, "read"), self._env.begin() as transaction:
            key = lmdb_key(image_key(name))
            return self._pending.get(key) or transaction.get(key)
        return None

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

    def __enter__(self) -> "LmdbWriter":
        return self

    def __exit__(self, kind: type | None, *_: object) -> None:
        try:
            if kind is None:
                self.commit()
        finally:
            self._env.close()


# LMDB must not be opened twice in a process: the objects that read one path share one environment.
_environments: dict[str, Any] = {}
_opening = threading.Lock()


def _environment(path: str) -> Any:
    """The environment at a real path, open for reading until the process ends or writes to it."""
    if (opened := _environments.get(path)) is not None:
        return opened
    import lmdb

    with _opening, _refusing(path, "read"):
        if path not in _environments:
            _environments[path] = lmdb.open(
                path, subdir=os.path.isdir(path), readonly=True, lock=False, readahead=False
            )
        return _environments[path]


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
        for key in transaction.cursor().iternext(values=False):
            yield key.decode("utf-8", "surrogateescape")


def lmdb_key(name: str) -> bytes:
    """A name as an LMDB stores it.

    Raises:
        BadSample: it is empty, longer than 511 bytes, or no valid text (half a surrogate pair).
    """
    try:
        key = name.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError as error:
        raise BadSample("the id is not valid text") from error
    if not 0 < len(key) <= MAX_KEY_BYTES:
        raise BadSample(f"the id is longer than {MAX_KEY_BYTES} bytes")
    return key


def _refusing(path: str | Path, action: str) -> AbstractContextManager[None]:
    import lmdb

    fault = "cannot be read" if action == "read" else "cannot be written"
    return refusing(path, "the LMDB", lmdb.Error, fault=fault, action=action)
