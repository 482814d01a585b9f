"""Piles from what is on disk: an LMDB with its annotations, or a folder of downloaded pairs."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from infogrowth.data.folders import ImageStore, open_images
from infogrowth.data.images import BadImage
from infogrowth.data.lmdb_store import image_key, is_lmdb
from infogrowth.data.sources import Source, open_source
from infogrowth.encoders.pile import CaptionTable, PairReader, Pile, first_caption
from infogrowth.encoders.shards import file_digest, list_digest
from infogrowth.errors import UserError
from infogrowth.files import read_json

NO_CAPTION = "the caption is missing or empty"
NO_PICTURE = "the image is missing"
_INDEX_ENDINGS = (".tar", ".parquet", ".jsonl", ".csv")


@dataclass(frozen=True)
class StoredPairs:
    """Captions from a list, pictures by id from an LMDB or a folder of files."""

    images: ImageStore
    ids: Sequence[str]
    captions: Sequence[str]

    def read(self, row: int) -> tuple[str, bytes]:
        if self.ids[row] not in self.images:
            raise BadImage(NO_PICTURE)
        return self.captions[row], self.images.read(self.ids[row])


@dataclass(frozen=True)
class SourcePairs:
    """Rows of a download: all of them as they lie there, or those of some ids.

    Attributes:
        numbers: the source's number of each row, None where it has no such sample; without it
            rows are the source's own.
        captions: instead of the source's own.
    """

    source: Source
    numbers: Sequence[int | None] | None = None
    captions: Sequence[str] | None = None

    def read(self, row: int) -> tuple[str, bytes]:
        number = row if self.numbers is None else self.numbers[row]
        if number is None:
            raise BadImage(NO_PICTURE)
        sample = self.source.read(number)
        caption = sample.caption if self.captions is None else self.captions[row]
        if sample.data is None or caption is None:
            raise BadImage(sample.problem or NO_PICTURE)
        return caption, sample.data


def pile_of_lmdb(lmdb: str, annotations: str) -> Pile:
    """The samples of an annotation JSON, in its order, with pictures from an LMDB (or a folder).

    An entry with several captions is embedded with the first one that is not blank: a pair is one
    picture and one caption. An entry without a usable caption is skipped and recorded.

    Raises:
        UserError: a file that is missing or no list of samples, or an LMDB that cannot be opened.
    """
    entries = read_json(annotations, "the annotation file")
    if not isinstance(entries, list):
        kind = type(entries).__name__
        raise UserError(f"the annotation file {annotations} must hold a list, not a {kind}")
    checked = [_checked(entry, row) for row, entry in enumerate(entries)]
    ids, captions = [name for name, _, _ in checked], [caption for _, caption, _ in checked]
    problems = {row: problem for row, (_, _, problem) in enumerate(checked) if problem}
    origin = {"images": lmdb, "annotations": annotations, "samples": file_digest(annotations)}
    return Pile(ids, problems, StoredPairs(open_images(lmdb), ids, captions), origin)


def pile_of_source(path: str) -> Pile:
    """Every sample of a download, in the order of its shards and keys.

    What could not even be listed (a damaged tar, an unfinished shard) is a row with a problem, so
    that it is recorded and counted like a bad sample.

    Raises:
        UserError: no such folder, or no pairs in a known layout.
    """
    source = open_source(path)
    ids = [*source.ids, *(name for name, _ in source.notes)]
    problems = {len(source) + i: reason for i, (_, reason) in enumerate(source.notes)}
    sizes = [
        f"{file.name} {file.stat().st_size}"
        for file in sorted(source.path.iterdir())
        if file.suffix in _INDEX_ENDINGS
    ]
    origin = {
        "images": path,
        "annotations": None,
        "layout": source.layout,
        "samples": list_digest([*ids, *sizes]),
    }
    return Pile(ids, problems, SourcePairs(source), origin)


def pairs_by_id(path: str, ids: Sequence[str], captions: Sequence[str]) -> PairReader:
    """Pictures of some ids, with these captions, from whatever ``embed`` took them from.

    Raises:
        UserError: there is neither an LMDB, nor a download, nor a folder of pictures.
    """
    if not is_lmdb(path) and Path(path).is_dir():
        try:
            source = open_source(path)
        except UserError:  # a plain folder of pictures, perhaps
            return StoredPairs(open_images(path), ids, captions)
        known = {name: number for number, name in enumerate(source.ids)}
        numbers = [known.get(name) for name in ids]
        if any(number is not None for number in numbers):
            return SourcePairs(source, numbers, captions)
    return StoredPairs(open_images(path), ids, captions)


def table_of_captions(path: str, wanted: Sequence[str] | None) -> CaptionTable:
    """Captions made elsewhere, ``[{"image", "caption"}]``.

    Args:
        wanted: the ids to take, in the order to take them (a file ending more or less makes no
            difference, as for an LMDB); None takes every entry.

    Raises:
        UserError: not such a list.
    """
    entries = read_json(path, "the file of captions")
    if not isinstance(entries, list):
        raise UserError(f"the file of captions {path} must hold a list of image and caption")
    found: dict[str, tuple[str, str, str | None]] = {}
    for row, entry in enumerate(entries):
        name, caption, problem = _checked(entry, row)
        key = image_key(name)
        if key not in found or found[key][2]:  # of several captions the first usable one counts
            found[key] = (name, caption, problem)
    if wanted is None:
        chosen = list(found.values())
    else:
        keys = [(sample, image_key(sample)) for sample in wanted]
        chosen = [(sample, *found[key][1:]) for sample, key in keys if key in found]
    problems = {row: problem for row, (_, _, problem) in enumerate(chosen) if problem}
    return CaptionTable([name for name, _, _ in chosen], [text for _, text, _ in chosen], problems)


def _checked(entry: Any, row: int) -> tuple[str, str, str | None]:
    """Id, caption and what is wrong with an entry; other commands refuse such a file whole, but
    one bad line in a pile of millions is no reason not to embed the others."""
    name = entry.get("image") if isinstance(entry, dict) else None
    if not isinstance(name, str) or not name:
        return f"entry {row}", "", "the entry has no image id"
    caption = first_caption(entry.get("caption"))
    return name, caption or "", None if caption else NO_CAPTION
