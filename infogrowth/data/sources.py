"""Image–caption pairs as people have them: a folder is walked, its containers hold the samples.

    tree.py        all files below a folder, whatever its depth
    containers.py  folders of images and tars, compressed or not; which files together are a sample
    tables.py      parquet files with images inside; what tables say of image files
    text.py        ids and captions, wherever they come from

Everything that is seen is a sample, or is in ``ignored`` or ``notes``.
"""

import logging
import os
import posixpath
import re
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, partial
from itertools import accumulate
from typing import NamedTuple

from infogrowth.data.containers import Container, Folder, Note, Tar
from infogrowth.data.tables import (
    RECORD_EXTENSIONS,
    SPLITS,
    Table,
    kind_of_table,
    read_records,
    split_of,
)
from infogrowth.data.text import Caption, extension_of, sample_id, strip_extension
from infogrowth.data.tree import Listing, Tree
from infogrowth.errors import BadSample, UserError

logger = logging.getLogger(__name__)

_TAR = re.compile(r"\.(tar(\.\w+)?|t(gz|bz2?|xz|zst|lz4))$", re.IGNORECASE)
_SHARD_NAME = re.compile(r"\d{5,}$")  # img2dataset's folders
_UNFINISHED = "the shard is not finished (it has no _stats.json): is the download still running?"


@dataclass(frozen=True)
class Sample:
    """One pair as it lies there.

    Attributes:
        id: its key or path, without image extension.
        caption: text, or a list of several; None if there is none.
        data: the encoded image; None if it cannot be had.
        problem: why the sample cannot be used, else None.
        repairs: what had to be done to read its text.
    """

    id: str
    caption: Caption | None
    data: bytes | None
    problem: str | None
    repairs: tuple[str, ...] = ()


class Source:
    """The samples of one split: container after container by name, by id within one.

    Picklable, and safe to read from several threads and processes.

    Attributes:
        path: the folder that was walked.
        containers: its parts.
        notes: (name, reason) of what could not be used at all.
        ignored: how many of what kind are no part of a sample.
        repairs: what had to be done to read tables.
        index: the shards and tables, as paths in the tree.
    """

    def __init__(
        self, tree: Tree, containers: Sequence[Container], index: Sequence[str] = ()
    ) -> None:
        self.path, self.containers, self.index = tree.root, containers, index
        self._tree = tree
        self.notes = [note for part in containers for note in part.notes]
        self.ignored: Counter[str] = sum((part.ignored for part in containers), Counter())
        self.repairs: Counter[str] = Counter()
        self._ends = list(accumulate(len(part.ids) for part in containers))
        taken: set[str] = set()
        for part in containers:  # of images of one id the first keeps it
            stem = _TAR.sub("", part.name) if part.kind == "webdataset" else sample_id(part.name)
            own: set[str] = set()
            for number, name in enumerate(part.ids):
                unique, times = name, 1
                while unique in taken or (unique in own and not part.repeats):
                    unique = f"{stem}/{name}" + (f"-{times}" if times > 1 else "")
                    times += 1
                own.add(unique)
                part.ids[number] = unique
            taken |= own

    @property
    def layout(self) -> str:
        """The kinds of containers, as in ``files`` or ``folder+webdataset``."""
        return "+".join(sorted({part.kind for part in self.containers}))

    @property
    def ids(self) -> list[str]:
        """The ids of all samples in order; bad ones and repeats included."""
        return [name for part in self.containers for name in part.ids]

    def versions(self) -> dict[str, str]:
        """By each file of ``index`` what changes when its content does: its size, at least."""
        return {name: self._tree.version(name) for name in self.index}

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __iter__(self) -> Iterator[Sample]:
        return (self.read(number) for number in range(len(self)))

    def read(self, number: int) -> Sample:
        """A sample with its image's bytes, or with the problem it has. Nothing is decoded."""
        part = bisect_right(self._ends, number)
        container = self.containers[part]
        local = number - (self._ends[part - 1] if part else 0)
        caption: Caption | None = None
        repairs: tuple[str, ...] = ()
        data = problem = None
        try:
            caption, repairs = container.caption(local)
        except (BadSample, OSError) as error:
            problem = _reason(error)
        try:
            data = container.data(local)
        except (BadSample, OSError) as error:
            problem = problem or _reason(error)
        return Sample(container.ids[local], caption, data, problem, repairs)


def _reason(error: BadSample | OSError) -> str:
    if isinstance(error, OSError):
        return f"cannot be read: {error.strerror or error}"
    return str(error)


def open_source(path: str | os.PathLike[str]) -> Source:
    """The samples of a folder; of one that holds several splits, those for training.

    Raises:
        UserError: no such folder, no sample in it, or several splits but none for training.
    """
    sources = open_splits(path)
    if len(sources) == 1:
        return next(iter(sources.values()))
    others = " and ".join(split for split in sources if split != "train")
    if "train" not in sources:
        raise UserError(f"{path} holds {others} sets but none for training: give one's folder")
    logger.warning("%s: the training set is read; the %s sets are left out", path, others)
    return sources["train"]


def open_splits(path: str | os.PathLike[str]) -> dict[str, Source]:
    """The sources of ``train``, ``val`` and ``test``, as far as a folder holds them.

    A split is named by words in the names of folders and files, and by a field ``split``.
    What names none is for training, unless something else is. A folder in which all files, but no
    folders, name one and the same split is taken as a training set: it is all that there is.

    Raises:
        UserError: no such folder, no sample in it, or a folder of a split without any.
    """
    tree = Tree(path)
    found = tree.walk()
    contents = _Contents(tree, found)
    containers = _open(list(contents.parts()), found)
    found.notes += contents.records.notes
    for split in [split for split in SPLITS if not any(c.ids for c in containers[split])]:
        for container in containers.pop(split):  # there is nothing in them but notes
            found.notes += container.notes
            found.ignored += container.ignored
    sources = {split: Source(tree, some, contents.index) for split, some in containers.items()}
    for source in list(sources.values())[:1]:  # what belongs to no split is reported once
        source.notes = [*found.notes, *source.notes]
        source.ignored = found.ignored + source.ignored
        source.repairs = contents.records.repairs
    for folder in found.folders:
        if "/" not in folder and (named := split_of(folder)) and named not in sources:
            raise UserError(f"{tree.path(folder)} holds no image–caption pairs")
    if not sources:
        kinds = [f"{count} {kind}" for kind, count in found.ignored.most_common(5)]
        notes = [f"{name}: {reason}" for name, reason in found.notes[:3]]
        seen = f" (found: {', '.join([*kinds, *notes])})" if kinds or notes else ""
        raise UserError(
            f"{path} holds no image–caption pairs{seen}: it needs images with .txt or .json beside "
            "them or a metadata.jsonl or .csv, or shards (.tar, .parquet) with both inside"
        )
    return sources


class _Part(NamedTuple):
    """A container before it is opened: its path without extension, its split, how many files it
    is, whether a downloader may mark it as finished, and how it is opened."""

    stem: str
    split: str | None
    files: int
    is_shard: bool
    open: Callable[[], Container]


class _Contents:
    """The files of a tree by what they are.

    Attributes:
        records: what tables say of image files.
        index: the paths of shards and tables.
    """

    def __init__(self, tree: Tree, found: Listing) -> None:
        self._tree, self._found, files = tree, found, found.files
        stats = [name for name in files if name.endswith("_stats.json")]
        found.ignored += Counter({"statistics of a download": len(stats)})
        self._finished = {name.removesuffix("_stats.json") for name in stats}
        self._marked = {posixpath.dirname(name) for name in stats}
        self._tars = [name for name in files if _TAR.search(name)]
        kinds = {n: kind_of_table(tree, n) for n in files if extension_of(n) == ".parquet"}
        self._tables = {name: splits for name, (kind, splits) in kinds.items() if kind == "images"}
        self._downloads = {sample_id(n): n for n in kinds if kinds[n][0] == "downloads"}
        tables = [name for name in files if extension_of(name) in RECORD_EXTENSIONS]
        tables = [name for name in tables if name not in kinds or kinds[name][0] == "records"]
        self.records = read_records(tree, files, tables)
        used = self.records.used
        apart = {*stats, *self._tars, *self._tables, *self._downloads.values(), *used}
        self._files = [name for name in files if name not in apart]
        self.index = sorted([*self._tars, *kinds, *used])

    def parts(self) -> Iterator[_Part]:
        """The containers; a shard that a downloader has not marked, where it marks any, is noted
        instead."""
        for part in (*self._shards(), *self._folders()):
            marked = part.is_shard and posixpath.dirname(part.stem) in self._marked
            if marked and part.stem not in self._finished:
                self._found.notes.append((part.stem, _UNFINISHED))
                self._found.ignored["files of unfinished shards"] += part.files
            else:
                yield part

    def _shards(self) -> Iterator[_Part]:
        for name in self._tars:
            stem = _TAR.sub("", name)
            downloads = self._downloads.pop(stem, None)
            yield _Part(stem, split_of(stem), 1, True, partial(Tar, self._tree, name, downloads))
        for name, splits in self._tables.items():
            stem = sample_id(name)
            for split in splits:
                opened = partial(Table, self._tree, name, split)
                yield _Part(stem, split_of(stem, split), 1, True, opened)

    def _folders(self) -> Iterator[_Part]:
        """Files by split, and by the folder from which their ids are paths."""
        records, base_of = self.records, cache(self._base)
        groups: dict[tuple[str, str | None], tuple[list[str], list[Note]]] = {}
        for name in self._files:
            folder = posixpath.dirname(name)
            split = records.splits.get(sample_id(name)) if records.splits else None
            group = base_of(folder), split_of(folder, split)
            groups.setdefault(group, ([], []))[0].append(name)
        for folder, name, split, reason in records.missing:
            base = base_of(folder)
            below = posixpath.join(folder[len(base) + 1 if base else 0 :], name)
            group = base, split_of(folder, split)
            groups.setdefault(group, ([], []))[1].append((strip_extension(below), reason))
        for stem in self._downloads:  # those of tars are gone from there
            groups.setdefault((stem, split_of(stem)), ([], []))
        for (base, split), (names, missing) in groups.items():
            shard = bool(base) and self._is_shard(base)
            what = base, "files" if shard else "folder", names, records.captions, missing
            opened = partial(Folder, self._tree, *what, self._downloads.get(base))
            yield _Part(base, split, len(names), shard, opened)

    def _is_shard(self, folder: str) -> bool:
        numbered = _SHARD_NAME.match(posixpath.basename(folder))
        return bool(numbered) or folder in self._finished or folder in self._downloads

    def _base(self, folder: str) -> str:
        """The nearest folder around that is a downloader's shard or names a split."""
        while folder and not self._is_shard(folder) and not split_of(posixpath.basename(folder)):
            folder = posixpath.dirname(folder)
        return folder


def _open(parts: Sequence[_Part], found: Listing) -> dict[str, list[Container]]:
    """The containers of each split."""
    splits = {part.split for part in parts}
    in_folders = any(split_of(posixpath.dirname(part.stem)) for part in parts)
    if len(splits) == 1 and splits & {"val", "test"} and not in_folders:
        logger.warning("all files are named %s: taken as the training set", *splits)
        splits, parts = {None}, [part._replace(split=None) for part in parts]
    containers: dict[str, list[Container]] = {split: [] for split in SPLITS}
    for part in sorted(parts, key=lambda part: part.stem):
        if part.split is None and "train" in splits:
            found.ignored["files outside of what is named train, val or test"] += part.files
        else:
            containers[part.split or "train"].append(part.open())
    return containers
