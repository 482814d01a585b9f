"""The files below a folder or an address: what a source is made of, and what is no part of it."""

import bz2
import fcntl
import gzip
import hashlib
import lzma
import os
import re
import shutil
import tarfile
import tempfile
import weakref
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, BinaryIO

import pyarrow as pa

from infogrowth.errors import UserError
from infogrowth.remote import AnyPath, RemotePath, as_path

_HIDDEN = ("__MACOSX", "Thumbs.db", "desktop.ini", "PaxHeader")
_RESULT = re.compile(
    r"(cc3m_(train|val|test)\.json|lmdb_(train|val|test)_skipped\.jsonl|.*\.tmp-[\w-]+)$"
)
_RESULT_FOLDERS = {"data.mdb", "img_emb", "text_emb", "features.json", "growth.json"}
_MAX_COPIES = 4  # of tars that are compressed, or lie elsewhere
HIDDEN = "hidden files and folders"
NO_FILES = "neither files nor folders"
# What damaged archives raise, compressed or not.
DAMAGE = (tarfile.TarError, OSError, EOFError, ValueError, zlib.error, lzma.LZMAError)
_DECOMPRESSION: dict[bytes, Callable[[Any], Any]] = {
    b"\x1f\x8b": gzip.open,
    b"BZh": bz2.open,
    b"\xfd7zXZ\0": lzma.open,
    b"\x28\xb5\x2f\xfd": lambda file: pa.CompressedInputStream(file, "zstd"),
    b"\x04\x22\x4d\x18": lambda file: pa.CompressedInputStream(file, "lz4"),
}
Kinds = dict[str, str]  # what a folder holds: "folder", "file" or "other" by name


@dataclass
class Listing:
    """All files below a folder, at any depth, links followed, each folder once.

    Attributes:
        files: their paths from the root, with ``/``, sorted.
        folders: those of the folders.
        ignored: how many of what kind are no part of a source: hidden ones, results of ours, …
        notes: (path, reason) of folders that cannot be listed.
    """

    files: list[str] = field(default_factory=list)
    folders: list[str] = field(default_factory=list)
    ignored: Counter[str] = field(default_factory=Counter)
    notes: list[tuple[str, str]] = field(default_factory=list)


class Tree:
    """A folder, or an fsspec address such as ``s3://bucket/shards``, whose files are read by their
    paths from it; picklable.

    Raises:
        UserError: there is no such folder; in all methods, what an address does not give.
    """

    def __init__(self, root: str | os.PathLike[str]) -> None:
        self.root, self._path = os.fspath(root), as_path(root)
        self._remote = isinstance(self._path, RemotePath)
        if not self._remote and not self._path.is_dir():
            raise UserError(f"the image folder {root} does not exist or is not a folder")
        self._copies: str | None = None

    def walk(self) -> Listing:
        """Go through all folders."""
        listing = Listing()
        seen: set[tuple[int, int]] = set()
        pending = [""]
        while pending:
            folder = pending.pop()
            try:
                kinds = _scan(self.path(folder), seen)
            except OSError as error:
                listing.notes.append((folder, f"the folder cannot be read: {error.strerror}"))
                continue
            if kinds is None:
                listing.ignored["folders that a link leads to a second time"] += 1
                continue
            if folder and not _RESULT_FOLDERS.isdisjoint(kinds):
                listing.ignored["folders with results of infogrowth"] += 1
                continue
            listing.folders.append(folder)
            for name in sorted(kinds, reverse=True):
                path = f"{folder}/{name}" if folder else name
                if is_hidden(name):
                    listing.ignored[HIDDEN] += 1
                elif kinds[name] == "folder":
                    pending.append(path)
                elif _RESULT.match(name):
                    listing.ignored["results of infogrowth"] += 1
                elif kinds[name] == "file":
                    listing.files.append(path)
                else:
                    listing.ignored[NO_FILES] += 1
        listing.files.sort()
        return listing

    def path(self, name: str) -> AnyPath:
        """Where a file of the tree lies."""
        return self._path / name if name else self._path

    def read(self, name: str) -> bytes:
        """All bytes of a file; by its name: a Path costs half as much as reading a small file."""
        if self._remote:
            return self.path(name).read_bytes()
        with open(os.path.join(self.root, name), "rb", buffering=0) as file:
            return file.read()

    def version(self, name: str) -> str:
        """What changes when a file's content does: its size, and the server's word if it has."""
        path = self.path(name)
        return path.version() if isinstance(path, RemotePath) else str(path.stat().st_size)

    def is_plain(self, name: str) -> bool:
        """Whether a file can be read in any order where it lies: local and not compressed."""
        if self._remote:
            return False
        with self.path(name).open("rb") as file:
            return decompressed(file) is None

    def open_copy(self, name: str) -> BinaryIO:
        """A local, decompressed copy of a file, to read and seek in; the last few are kept.

        They lie in a temporary folder that other processes share if it is there when they begin.
        """
        if self._copies is None:
            self._copies = tempfile.mkdtemp(prefix="infogrowth-")
            weakref.finalize(self, _remove, self._copies, os.getpid())
        copy = os.path.join(self._copies, hashlib.sha256(os.fsencode(name)).hexdigest())
        with suppress(FileNotFoundError):
            return open(copy, "rb")
        with open(os.path.join(self._copies, "lock"), "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # also among threads: each has opened it by itself
            if not os.path.exists(copy):
                with self.path(name).open("rb") as file, open(copy + ".part", "wb") as part:
                    part.writelines(_content(decompressed(file) or file))
                os.replace(copy + ".part", copy)
                copies = [entry for entry in os.scandir(self._copies) if entry.name != "lock"]
                copies.sort(key=lambda entry: entry.stat().st_mtime_ns)
                for old in copies[:-_MAX_COPIES]:
                    os.unlink(old)  # whoever reads it has it open
            return open(copy, "rb")


def _scan(folder: AnyPath, seen: set[tuple[int, int]]) -> Kinds | None:
    """What a folder holds; None if it has been seen. A broken link is reported when it is read."""
    if isinstance(folder, RemotePath):
        return folder.kinds()
    status = os.stat(folder)
    identity = (status.st_dev, status.st_ino)
    if identity in seen:
        return None
    seen.add(identity)
    kinds: Kinds = {}
    with os.scandir(folder) as entries:
        for entry in entries:
            file = entry.is_file() or entry.is_symlink()
            kinds[entry.name] = "folder" if entry.is_dir() else "file" if file else "other"
    return kinds


def _content(file: BinaryIO) -> Iterator[bytes]:
    """The bytes of a file, as far as it goes."""
    with suppress(*DAMAGE):
        while chunk := file.read(1 << 20):
            yield chunk


def _remove(folder: str, owner: int) -> None:
    if os.getpid() == owner:
        shutil.rmtree(folder, ignore_errors=True)


def is_hidden(name: str) -> bool:
    """Whether a path leads through something that systems hide: ``._x.jpg``, ``__MACOSX``, …"""
    parts = [part for part in name.split("/") if part not in (".", "..")]
    return any(part.startswith(".") or part in _HIDDEN for part in parts)


def decompressed(file: BinaryIO) -> BinaryIO | None:
    """What a compressed file holds, as a stream; None if it is not compressed, by its first bytes.

    gzip, bzip2, xz, zstd and lz4 are known.
    """
    magic = file.read(6)
    file.seek(0)
    for start, opened in _DECOMPRESSION.items():
        if magic.startswith(start):
            return opened(file)
    return None
