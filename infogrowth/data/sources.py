"""A pile of image–caption pairs as it was downloaded, whatever the layout: numbered samples.

files        img2dataset folders {shard}/{key}.jpg, .txt, .json
webdataset   {shard}.tar with the same three members per key
parquet      {shard}.parquet with a binary column (jpg, …), or Hugging Face's image column
flat         one folder of pictures, a .json or .txt of the same name beside each
imagefolder  Hugging Face: metadata.jsonl, .csv or .parquet beside the pictures
"""

import os
import re
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Protocol

from infogrowth.data.source_archives import TarShard
from infogrowth.data.source_files import FilesShard, ImageFolderShard, flat_folder, has_pictures
from infogrowth.data.source_samples import (
    MetadataFailures,
    Sample,
    Unreadable,
    reason_without_caption,
)
from infogrowth.data.source_tables import ParquetShard, holds_pictures
from infogrowth.errors import UserError

__all__ = ["Sample", "Source", "open_source"]

_SHARD_NAME = re.compile(r"\d+$")
_METADATA_NAMES = ("metadata.jsonl", "metadata.csv", "metadata.parquet")


class Shard(Protocol):
    """A part of a source: samples in order of their ids, read one by one in any order."""

    @property
    def ids(self) -> Sequence[str]:
        """Of all samples, bad ones and duplicates included."""
        ...

    @property
    def notes(self) -> Sequence[tuple[str, str]]:
        """What of the shard could not be used at all, as (name, reason)."""
        ...

    def caption(self, number: int) -> str | None:
        """The caption as stored; raises Unreadable with a reason."""
        ...

    def data(self, number: int) -> bytes:
        """The encoded picture; raises Unreadable with a reason."""
        ...


@dataclass(frozen=True)
class Source:
    """All samples of a pile: shard after shard in order of their names, by id within a shard.

    Picklable, and safe to read from several threads and processes.

    Attributes:
        path: where it lies.
        layout: files, webdataset, parquet, flat or imagefolder.
        shards: its parts.
        notes: parts that could not be used, as (name, reason).
    """

    path: Path
    layout: str
    shards: Sequence[Shard]
    notes: Sequence[tuple[str, str]]

    def __post_init__(self) -> None:
        ends = list(accumulate(len(shard.ids) for shard in self.shards))
        object.__setattr__(self, "_ends", ends)

    def __len__(self) -> int:
        ends: list[int] = self._ends  # type: ignore[attr-defined]
        return ends[-1] if ends else 0

    def __iter__(self) -> Iterator[Sample]:
        return (self.read(number) for number in range(len(self)))

    @property
    def ids(self) -> list[str]:
        """The ids of all samples in order; bad ones and duplicates included."""
        return [name for shard in self.shards for name in shard.ids]

    def read(self, number: int) -> Sample:
        """A sample with its picture's bytes, or with the problem it has. Nothing is decoded."""
        return self._sample(number, with_data=True)

    def describe(self, number: int) -> Sample:
        """A sample without its picture (``data`` is None): quicker, where the caption will do."""
        return self._sample(number, with_data=False)

    def _sample(self, number: int, with_data: bool) -> Sample:
        ends: list[int] = self._ends  # type: ignore[attr-defined]
        part = bisect_right(ends, number)
        shard = self.shards[part]
        local = number - (ends[part - 1] if part else 0)
        name, caption = shard.ids[local], None
        try:
            caption = shard.caption(local)
            data = shard.data(local) if with_data else None
        except Unreadable as error:
            return Sample(name, caption, None, error.reason)
        except OSError as error:
            return Sample(name, caption, None, f"cannot be read: {error.strerror or error}")
        caption = (caption or "").strip() or None
        problem = None if caption else reason_without_caption
        return Sample(name, caption, data, problem)


def open_source(path: str | os.PathLike[str], ignore: Sequence[str] = ()) -> Source:
    """Find out the layout of a folder and list its samples.

    Args:
        path: the folder.
        ignore: file names in it that are not part of the pile.

    Raises:
        UserError: no such folder, no known layout in it, or no sample at all.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise UserError(f"the image folder {folder} does not exist or is not a folder")
    source = _find(folder, ignore)
    if source is None:
        raise UserError(
            f"{folder} holds no image–caption pairs in a known layout: img2dataset files, "
            "webdataset .tar or .parquet shards, pictures with .json or .txt beside them, or "
            "pictures with a metadata.jsonl"
        )
    if not len(source):
        told = "; ".join(f"{name}: {reason}" for name, reason in source.notes[:3])
        raise UserError(f"{folder} holds no samples" + (f" ({told})" if told else ""))
    return source


def _find(folder: Path, ignore: Sequence[str]) -> Source | None:
    for place in (folder, folder / "train"):
        metadata = [place / name for name in _METADATA_NAMES if (place / name).is_file()]
        if metadata:
            return _source(folder, "imagefolder", [ImageFolderShard(place, metadata[0])])
    tars = sorted(folder.glob("*.tar"))
    if tars:
        finished, notes = _finished(tars)
        shards = [TarShard(tar, MetadataFailures(tar.with_suffix(".parquet"))) for tar in finished]
        return _source(folder, "webdataset", shards, notes)
    folders = sorted(p for p in folder.iterdir() if p.is_dir() and _SHARD_NAME.fullmatch(p.name))
    if any(has_pictures(part) or _table(part).exists() for part in folders):
        finished, notes = _finished(folders)
        files = [FilesShard(part, MetadataFailures(_table(part))) for part in finished]
        return _source(folder, "files", files, notes)
    tables = sorted(folder.glob("*.parquet"))
    if any(holds_pictures(table) for table in tables):
        finished, notes = _finished(tables)
        return _source(folder, "parquet", [ParquetShard(table) for table in finished], notes)
    if has_pictures(folder):
        return _source(folder, "flat", [flat_folder(folder, ignore)])
    return None


def _source(
    folder: Path,
    layout: str,
    shards: Sequence[Shard],
    notes: Sequence[tuple[str, str]] = (),
) -> Source:
    return Source(folder, layout, shards, [*notes, *(note for s in shards for note in s.notes)])


def _table(shard_folder: Path) -> Path:
    return shard_folder.with_name(shard_folder.name + ".parquet")


def _finished(shards: Sequence[Path]) -> tuple[list[Path], list[tuple[str, str]]]:
    """The shards that are complete: where the downloader marks those, the others are left out."""
    marked = {p for p in shards if p.with_name(f"{p.stem}_stats.json").is_file()}
    if not marked:
        return list(shards), []
    reason = "the shard is not finished (it has no _stats.json): is the download still running?"
    return [p for p in shards if p in marked], [(p.name, reason) for p in shards if p not in marked]
