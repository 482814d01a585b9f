"""The LMDB of images: one key rule, one writer, one reader.

An image's key is its id without folder and without image extension (``cc3m_train/000123.jpg`` →
``000123``), its value the encoded bytes as they came. Readers find an image by its id with or
without the extension, whichever way the LMDB was written.
"""

import os
import threading
import weakref
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from infogrowth.data.names import image_key, possible_names
from infogrowth.errors import UserError

MAX_KEY_BYTES = 511  # LMDB's own limit

_MAGIC = 0xBEEFC0DE.to_bytes(4, "little")  # at byte 16 of every LMDB data file
_FIRST_MAP_SIZE = 64 << 20
_MAX_BATCH_COUNT, _MAX_BATCH_BYTES = 1000, 64 << 20


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
        with _told("write", self.path):
            self.path.mkdir(parents=True, exist_ok=True)
            _forget_readers(self.path)
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
        if not replace and (key in self._pending or self._stored(key) is not None):
            return False
        self._pending[key] = data
        self._pending_bytes += len(data)
        if len(self._pending) >= _MAX_BATCH_COUNT or self._pending_bytes >= _MAX_BATCH_BYTES:
            self.commit()
        return True

    def get(self, name: str) -> bytes | None:
        """What is stored (or waits for its commit) under exactly ``name``'s key."""
        key = _encoded(image_key(name))
        return self._pending.get(key) or self._stored(key)

    def commit(self) -> None:
        """Write what is pending in one transaction; it is on disk when this returns."""
        import lmdb

        while self._pending:
            try:
                with _told("write", self.path), self._env.begin(write=True) as transaction:
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

    def _stored(self, key: bytes) -> bytes | None:
        with _told("read", self.path), self._env.begin() as transaction:
            return transaction.get(key)


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
        if not is_lmdb(self.path):
            state = "is not an LMDB" if self.path.exists() else "does not exist"
            raise UserError(
                f"the LMDB {path} {state}; make one with `python scripts/cc3m_lmdb_writer.py`"
            )
        self._opened: _Opened | None = None

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
        return self._environment().stat()["entries"]

    def keys(self) -> Iterator[str]:
        """All keys, in order, as they are stored."""
        return _keys(self._environment())

    def _find(self, name: str) -> bytes | None:
        with _told("read", self.path), self._environment().begin() as transaction:
            for possible in possible_names(name):
                key = _encoded(possible)
                if 0 < len(key) <= MAX_KEY_BYTES:
                    data = transaction.get(key)
                    if data is not None:
                        return data
        return None

    def _environment(self) -> Any:
        opened = self._opened
        if opened is None or opened.process != os.getpid():
            opened = self._opened = _open_once(self.path)
        return opened.environment

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_opened": None}


def is_lmdb(path: str | os.PathLike[str]) -> bool:
    """Whether ``path`` is an LMDB (a folder with ``data.mdb``, or such a file), by its magic."""
    file = Path(path)
    try:
        with open(file / "data.mdb" if file.is_dir() else file, "rb") as opened:
            return opened.read(20)[16:] == _MAGIC
    except OSError:
        return False


class _Opened:
    """An open environment and the process that opened it."""

    def __init__(self, path: Path) -> None:
        import lmdb

        self.process = os.getpid()
        with _told("read", path):
            self.environment = lmdb.open(
                str(path), subdir=path.is_dir(), readonly=True, lock=False, readahead=False
            )

    def __del__(self) -> None:
        if hasattr(self, "environment"):
            self.environment.close()


# LMDB must not be opened twice in a process: the objects that read one path share one environment,
# which closes with the last of them.
_opened: "weakref.WeakValueDictionary[str, _Opened]" = weakref.WeakValueDictionary()
_opening = threading.Lock()


def _open_once(path: Path) -> _Opened:
    with _opening:
        name = os.path.realpath(path)
        opened = _opened.get(name)
        if opened is None:
            opened = _opened[name] = _Opened(Path(name))
        return opened


def _forget_readers(path: Path) -> None:
    """Close what this process has open for reading at ``path``; readers open it again."""
    with _opening:
        opened = _opened.pop(os.path.realpath(path), None)
        if opened is not None:
            opened.process = -1
            opened.environment.close()


def _drop_inherited() -> None:
    """In a forked child: close the parent's environments, which are not safe to use here.

    Without a lock file closing touches only this process's copies of the map and descriptor.
    """
    global _opened, _opening
    inherited, _opening = list(_opened.values()), threading.Lock()
    _opened = weakref.WeakValueDictionary()
    for opened in inherited:
        opened.environment.close()


os.register_at_fork(after_in_child=_drop_inherited)


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


class _told:
    """LMDB's and the system's complaints as one sentence for the user."""

    def __init__(self, verb: str, path: Path) -> None:
        self._verb, self._path = verb, path

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: Any, error: BaseException | None, _: object) -> None:
        import lmdb

        if isinstance(error, lmdb.MapFullError):
            return
        if isinstance(error, lmdb.Error | OSError):
            what = getattr(error, "strerror", None) or str(error).rsplit(": ", 1)[-1]
            raise UserError(f"cannot {self._verb} the LMDB {self._path}: {what}") from error
