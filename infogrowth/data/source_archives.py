"""Webdataset shards: a tar is indexed once, then any sample is read by its place in the file."""

import tarfile
from array import array
from pathlib import Path

from infogrowth.data.source_samples import (
    PICTURE_SUFFIXES,
    MetadataFailures,
    Unreadable,
    caption_of,
)

_SUFFIX_RANK = {suffix: rank for rank, suffix in enumerate(PICTURE_SUFFIXES)}
_PICTURE, _TEXT, _METADATA = range(3)
_MISSING = -1


class TarShard:
    """One tar of ``{key}.jpg``, ``{key}.txt``, ``{key}.json``; failed downloads are samples too.

    A tar that breaks off is read as far as it goes; what its table promised beyond that is listed
    with a problem.
    """

    def __init__(self, path: Path, failures: MetadataFailures) -> None:
        self._path, self._failed = path, failures.failed
        self._size = path.stat().st_size
        members, complaint = _members(path)
        self.notes = [*failures.notes, *([(path.name, complaint)] if complaint else [])]
        self.ids = sorted(members.keys() | failures.failed.keys() | failures.succeeded)
        # Offset and size of the three members of each sample.
        self._places = array("q")
        for name in self.ids:
            for place in members.get(name, [None] * 3):
                self._places.extend(place or (_MISSING, 0))

    def caption(self, number: int) -> str | None:
        """The caption of the ``.txt``, else of the ``.json``."""
        reason = self._failed.get(self.ids[number])
        if reason is not None and not self._has(number, _PICTURE):
            raise Unreadable(reason)
        return caption_of(self._read(number, _TEXT), self._read(number, _METADATA))

    def data(self, number: int) -> bytes:
        """The encoded picture."""
        picture = self._read(number, _PICTURE)
        if picture is None:
            raise Unreadable(f"there is no image in {self._path.name}")
        return picture

    def _has(self, number: int, member: int) -> bool:
        return self._places[6 * number + 2 * member] != _MISSING

    def _read(self, number: int, member: int) -> bytes | None:
        if not self._has(number, member):
            return None
        offset, size = self._places[6 * number + 2 * member :][:2]
        if offset + size > self._size:
            raise Unreadable(f"{self._path.name} breaks off in this sample")
        with open(self._path, "rb", buffering=0) as file:
            file.seek(offset)
            return file.read(size)


Place = tuple[int, int]


def _members(path: Path) -> tuple[dict[str, list[Place | None]], str | None]:
    """Place of picture, text and metadata by key, and what is wrong with the tar if anything is."""
    found: dict[str, list[Place | None]] = {}
    ranks: dict[str, int] = {}
    complaint = None
    try:
        with tarfile.open(path, "r:") as archive:
            for member in archive:
                archive.members = []  # type: ignore[attr-defined]  # it would keep every header
                if member.isfile():
                    _note(member, found, ranks)
    except (tarfile.TarError, OSError, EOFError, ValueError) as error:
        complaint = f"the tar is damaged or breaks off: {error}"
    return found, complaint


def _note(
    member: tarfile.TarInfo, found: dict[str, list[Place | None]], ranks: dict[str, int]
) -> None:
    folder, slash, name = member.name.removeprefix("./").rpartition("/")
    stem, _, suffix = name.partition(".")
    if not stem:
        return
    key, suffix = folder + slash + stem, suffix.lower()
    place = (member.offset_data, member.size)
    if suffix in _SUFFIX_RANK:
        places = found.setdefault(key, [None] * 3)
        if _SUFFIX_RANK[suffix] < ranks.get(key, len(_SUFFIX_RANK)):
            ranks[key], places[_PICTURE] = _SUFFIX_RANK[suffix], place
    elif suffix in ("txt", "json"):
        kind = _TEXT if suffix == "txt" else _METADATA
        found.setdefault(key, [None] * 3)[kind] = place
