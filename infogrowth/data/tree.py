"""The files below a folder: what a source is made of, and what in it is no part of one."""

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
from infogrowth.remote import is_remote, list_remote, open_remote, read_remote, remote_version

_HIDDEN = ("__MACOSX", "Thumbs.db", "desktop.ini", "PaxHeader")
_RESULT = re.compile(
    r"(cc3m_(train|val|test)\.json|lmdb_(train|val|test)_skipped\.jsonl|.*\.tmp-[\w-]+)$"
)
_RESULT_FOLDERS = {"data.mdb", "img_emb", "text_emb", "features.json", "growth.json"}
_COPIES_HELD = 4  # tars that are compressed, or lie elsewhere
HIDDEN = "hidden files and folders"
# What damaged archives raise, compressed or not.
DAMAGE = (tarfile.TarError, OSError, EOFError, ValueError, zlib.error, lzma.LZMAError)
_DECOMPRESSION: dict[bytes, Callable[[Any], Any]] = {
    b"\x1f\x8b": gzip.open,
    b"BZh": bz2.open,
    b"\xfd7zXZ\0": lzma.open,
    b"\x28\xb5\x2f\xfd": lambda file: pa.CompressedInputStream(file, "zstd"),
    b"\x04\x22\x4d\x18": lambda file: pa.CompressedInputStream(file, "lz4"),
}


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
        self.root = os.fspath(root)
        self.remote = is_remote(self.root)
        if not self.remote and not os.path.isdir(self.root):
            raise UserError(f"the image folder {root} does not exist or is not a folder")
        self._copies: str | None = None

    def walk(self) -> Listing:
        """Go through all folders."""
        listing = Listing()
        if self.remote:
            self._walk_remote(listing)
        seen: set[tuple[int, int]] = set()
        pending = [] if self.remote else [""]
        while pending:
            pending.extend(self._list(pending.pop(), seen, listing))
        listing.files.sort()
        return listing

    def _walk_remote(self, listing: Listing) -> None:
        names = list_remote(self.root)
        results = {os.path.dirname(n) for n in names if os.path.basename(n) in _RESULT_FOLDERS}
        for name in names:
            folders = os.path.dirname(name).split("/")
            above = {"/".join(folders[:depth]) for depth in range(1, len(folders) + 1)} - {""}
            if is_hidden(name):
                listing.ignored[HIDDEN] += 1
            elif above & results or _RESULT.match(os.path.basename(name)):
                listing.ignored["results of infogrowth"] += 1
            else:
                listing.files.append(name)
            listing.folders += [folder for folder in above if folder not in listing.folders]

    def _list(self, folder: str, seen: set[tuple[int, int]], listing: Listing) -> list[str]:
        """Note the files of one folder; returns the folders in it."""
        below: list[str] = []
        try:
            status = os.stat(self.path(folder))
            if (status.st_dev, status.st_ino) in seen:
                listing.ignored["folders that a link leads to a second time"] += 1
                return []
            seen.add((status.st_dev, status.st_ino))
            with os.scandir(self.path(folder)) as scan:
                entries = sorted(scan, key=lambda entry: entry.name, reverse=True)
        except OSError as error:
            listing.notes.append((folder, f"the folder cannot be read: {error.strerror}"))
            return []
        if folder and not _RESULT_FOLDERS.isdisjoint(entry.name for entry in entries):
            listing.ignored["folders with results of infogrowth"] += 1
            return []
        for entry in entries:
            name = f"{folder}/{entry.name}" if folder else entry.name
            if is_hidden(entry.name):
                listing.ignored[HIDDEN] += 1
            elif entry.is_dir():
                below.append(name)
                listing.folders.append(name)
            elif _RESULT.match(entry.name):
                listing.ignored["results of infogrowth"] += 1
            elif entry.is_file() or entry.is_symlink():  # a broken link is told when it is read
                listing.files.append(name)
            else:
                listing.ignored["neither files nor folders"] += 1
        return below

    def path(self, name: str) -> str:
        """Where a file of the tree lies."""
        return os.path.join(self.root, name) if name else self.root

    def read(self, name: str) -> bytes:
        """All bytes of a file."""
        if self.remote:
            return read_remote(self.root, name)
        with open(self.path(name), "rb", buffering=0) as file:
            return file.read()

    def open(self, name: str) -> BinaryIO:
        """A file to read and seek in."""
        return open_remote(self.root, name) if self.remote else open(self.path(name), "rb")

    def version(self, name: str) -> str:
        """What changes when a file's content does: its size, and the server's word if it has."""
        if self.remote:
            return remote_version(self.root, name)
        return str(os.stat(self.path(name)).st_size)

    def is_plain(self, name: str) -> bool:
        """Whether a file can be read in any order where it lies: local and not compressed."""
        if self.remote:
            return False
        with self.open(name) as file:
            return decompressed(file) is None

    def open_copy(self, name: str) -> BinaryIO:
        """A local, decompressed copy of a file, to read and seek in; the last few are kept.

        They lie in a temporary folder that other processes share if it is there when they begin.
        """
        if self._copies is None:
            self._copies = tempfile.mkdtemp(prefix="infogrowth-")
            weakref.finalize(self, _remove, self._copies, os.getpid())
        copy = os.path.join(self._copies, hashlib.sha256(os.fsencode(name)).hexdigest())
        try:
            return open(copy, "rb")
        except FileNotFoundError:
            pass
        with open(os.path.join(self._copies, "lock"), "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # also among threads: each has opened it by itself
            if not os.path.exists(copy):
                with self.open(name) as file, open(copy + ".part", "wb") as part:
                    part.writelines(_content(decompressed(file) or file))
                os.replace(copy + ".part", copy)
                copies = [entry for entry in os.scandir(self._copies) if entry.name != "lock"]
                copies.sort(key=lambda entry: entry.stat().st_mtime_ns)
                for old in copies[:-_COPIES_HELD]:
                    os.unlink(old)  # whoever reads it has it open
            return open(copy, "rb")


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
