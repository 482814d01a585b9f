"""Image–caption pairs as people have them: a folder is walked, its containers hold the samples.

    tree.py        all files below a folder, whatever its depth
    containers.py  folders of images, tars (compressed or not), parquet files with images inside
    entries.py     which files together are a sample; records.py: what tables say of image files
    captions.py    text and captions, wherever they come from

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
from functools import partial
from itertools import accumulate
from typing import NamedTuple

from infogrowth.data.captions import Caption, Unusable
from infogrowth.data.containers import Container, Folder, Table, Tar
from infogrowth.data.entries import extension_of, key_of
from infogrowth.data.lmdb_store import strip_extension
from infogrowth.data.records import (
    RECORD_EXTENSIONS,
    SPLITS,
    Downloads,
    Records,
    kind_of_table,
    split_of,
    splits_in_table,
)
from infogrowth.data.tree import Tree
from infogrowth.errors import UserError

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
        data: the encoded image; None if it cannot be had, or was not asked for.
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
        _make_unique(containers)

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
        except (Unusable, OSError) as error:
            problem = _reason(error)
        try:
            data = container.data(local)
        except (Unusable, OSError) as error:
            problem = problem or _reason(error)
        return Sample(container.ids[local], caption, data, problem, repairs)


def _reason(error: Unusable | OSError) -> str:
    if isinstance(error, Unusable):
        return error.reason
    return f"cannot be read: {error.strerror or error}"


def _make_unique(containers: Sequence[Container]) -> None:
    """Let ids tell apart images of one name: the first keeps it, others get their container's."""
    taken: set[str] = set()
    for part in containers:
        stem = _TAR.sub("", part.name) if isinstance(part, Tar) else key_of(part.name)
        own: set[str] = set()
        for number, name in enumerate(part.ids):
            unique, times = name, 1
            while unique in taken or (unique in own and not part.repeats):
                unique = f"{stem}/{name}" + (f"-{times}" if times > 1 else "")
                times += 1
            own.add(unique)
            part.ids[number] = unique
        taken |= own


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

    Folders and files tell their split by the words in their names, records by a field ``split``.
    What names none is for training, unless something else is. A folder in which all files, but no
    folders, name one and the same split is taken as a training set: it is all that there is.

    Raises:
        UserError: no such folder, no sample in it, or a folder of a split without any.
    """
    tree = Tree(path)
    found = _Found(tree)
    sources = found.sources()
    for folder in found.folders:
        split = split_of(folder)
        if "/" not in folder and split and split not in sources:
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
    """A container before it is opened: its path without extension, its split, whether it is a
    shard of a download, how many files it is, and how it is opened."""

    stem: str
    split: str | None
    shard: bool
    files: int
    open: Callable[[], Container]


class _Found:
    """What a walk found, sorted into containers."""

    def __init__(self, tree: Tree) -> None:
        self._tree, listing = tree, tree.walk()
        self.folders, self.ignored, self.notes = listing.folders, listing.ignored, listing.notes
        files = listing.files
        stats = [name for name in files if name.endswith("_stats.json")]
        self._finished = {name.removesuffix("_stats.json") for name in stats}
        self._ignore("statistics of a download", len(stats))
        tars = [name for name in files if _TAR.search(name)]
        kinds = {n: kind_of_table(tree, n) for n in files if extension_of(n) == ".parquet"}
        images = [name for name, kind in kinds.items() if kind == "images"]
        self._downloads = {key_of(n): n for n, kind in kinds.items() if kind == "downloads"}
        candidates = [n for n in files if extension_of(n) in RECORD_EXTENSIONS]
        candidates = [n for n in candidates if kinds.get(n, "records") == "records"]
        self._records = Records(tree, files, candidates)
        apart = {*stats, *tars, *images, *self._downloads.values(), *self._records.used}
        self._index = sorted([*tars, *kinds, *self._records.used])
        self._parts = [self._tar(name) for name in tars]
        self._parts += [part for name in images for part in self._tables(name)]
        self._parts += self._folders([name for name in files if name not in apart])

    def sources(self) -> dict[str, Source]:
        """A source for each split that has samples."""
        parts = self._without_unfinished()
        splits = {part.split for part in parts}
        in_folders = any(split_of(posixpath.dirname(part.stem)) for part in parts)
        if len(splits) == 1 and splits & {"val", "test"} and not in_folders:
            logger.warning("all files are named %s: taken as the training set", *splits)
            splits, parts = {None}, [part._replace(split=None) for part in parts]
        opened: dict[str, list[Container]] = {split: [] for split in SPLITS}
        for part in sorted(parts, key=lambda part: part.stem):
            if part.split is None and "train" in splits:
                self._ignore("files outside of what is named train, val or test", part.files)
            else:
                opened[part.split or "train"].append(part.open())
        self.notes += self._records.notes
        for split in [split for split in SPLITS if not any(c.ids for c in opened[split])]:
            for container in opened.pop(split):
                self.notes += container.notes
                self.ignored += container.ignored
        sources = {split: Source(self._tree, parts, self._index) for split, parts in opened.items()}
        for source in list(sources.values())[:1]:  # what belongs to no split is told once
            source.notes = [*self.notes, *source.notes]
            source.ignored = self.ignored + source.ignored
            source.repairs = self._records.repairs
        return sources

    def _ignore(self, kind: str, count: int) -> None:
        if count:
            self.ignored[kind] += count

    def _tar(self, name: str) -> _Part:
        stem = _TAR.sub("", name)
        table = self._downloads.pop(stem, None)
        downloads = Downloads(self._tree, table)
        return _Part(stem, split_of(stem), True, 1, lambda: Tar(self._tree, name, downloads))

    def _tables(self, name: str) -> Iterator[_Part]:
        stem = key_of(name)
        for split in splits_in_table(self._tree, name):
            opened = partial(Table, self._tree, name, split)
            yield _Part(stem, split_of(stem, split), True, 1, opened)

    def _folders(self, files: list[str]) -> Iterator[_Part]:
        """Files by split, and by the folder from which their ids are paths."""
        groups: dict[tuple[str, str | None], list[str]] = {}
        missing: dict[tuple[str, str | None], list[tuple[str, str]]] = {}
        bases: dict[str, str] = {}
        for name in files:
            folder = posixpath.dirname(name)
            if folder not in bases:
                bases[folder] = self._base(folder)
            split = self._records.splits.get(key_of(name)) if self._records.splits else None
            group = bases[folder], split_of(folder, split)
            groups.setdefault(group, []).append(name)
        for folder, name, split, reason in self._records.missing:
            base = self._base(folder)
            below = posixpath.join(folder[len(base) + 1 if base else 0 :], name)
            group = base, split_of(folder, split)
            missing.setdefault(group, []).append((strip_extension(below), reason))
            groups.setdefault(group, [])
        for stem in self._downloads:
            groups.setdefault((stem, split_of(stem)), [])
        for (base, split), names in groups.items():
            downloads = Downloads(self._tree, self._downloads.get(base))
            shard = bool(base) and self._is_shard(base)
            kind = "files" if shard else "folder"
            lost = missing.get((base, split), [])
            opened = partial(
                Folder, self._tree, base, kind, names, self._records.of_file, lost, downloads
            )
            yield _Part(base, split, shard, len(names), opened)

    def _base(self, folder: str) -> str:
        """The nearest folder around that is a downloader's shard or names a split."""
        while folder and not self._is_shard(folder) and not split_of(posixpath.basename(folder)):
            folder = posixpath.dirname(folder)
        return folder

    def _is_shard(self, folder: str) -> bool:
        numbered = _SHARD_NAME.match(posixpath.basename(folder))
        return bool(numbered) or folder in self._finished or folder in self._downloads

    def _without_unfinished(self) -> list[_Part]:
        """The parts but those that a downloader has not marked, where it marks any."""
        marking = {posixpath.dirname(stem) for stem in self._finished}
        finished: list[_Part] = []
        for part in self._parts:
            marked = part.stem in self._finished or posixpath.dirname(part.stem) not in marking
            if part.shard and not marked:
                self.notes.append((part.stem, _UNFINISHED))
                self._ignore("files of unfinished shards", part.files)
            else:
                finished.append(part)
        return finished
