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
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from itertools import accumulate
from typing import NamedTuple

from infogrowth.data.containers import Container, Folder, Note, Tar
from infogrowth.data.tables import (
    RECORD_EXTENSIONS,
    SPLITS,
    Records,
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
    parts, records, index = _parts(tree, found)
    containers = _open(parts, found)
    found.notes += records.notes
    for split in [split for split in SPLITS if not any(c.ids for c in containers[split])]:
        for container in containers.pop(split):  # there is nothing in them but notes
            found.notes += container.notes
            found.ignored += container.ignored
    sources = {split: Source(tree, some, index) for split, some in containers.items()}
    for source in list(sources.values())[:1]:  # what belongs to no split is reported once
        source.notes = [*found.notes, *source.notes]
        source.ignored = found.ignored + source.ignored
        source.repairs = records.repairs
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


def _parts(tree: Tree, found: Listing) -> tuple[list[_Part], Records, list[str]]:
    """The containers that the files of a tree are, what tables say of image files, and the paths
    of shards and tables. A shard that a downloader has not marked as finished, where it marks any,
    is noted instead."""
    stats = [name for name in found.files if name.endswith("_stats.json")]
    found.ignored += Counter({"statistics of a download": len(stats)})
    finished = {name.removesuffix("_stats.json") for name in stats}
    tars = [name for name in found.files if _TAR.search(name)]
    kinds = {n: kind_of_table(tree, n) for n in found.files if extension_of(n) == ".parquet"}
    downloads = {sample_id(n): n for n, (kind, _) in kinds.items() if kind == "downloads"}
    apart = {*stats, *tars, *(n for n, (kind, _) in kinds.items() if kind != "records")}
    files = [name for name in found.files if name not in apart]
    tables = [name for name in files if extension_of(name) in RECORD_EXTENSIONS]
    records = read_records(tree, found.files, tables)
    used = set(records.used)
    files = [name for name in files if name not in used]
    parts: list[_Part] = []
    for name in tars:
        stem = _TAR.sub("", name)
        opened = partial(Tar, tree, name, downloads.pop(stem, None))
        parts.append(_Part(stem, split_of(stem), 1, True, opened))
    for name, (kind, splits) in kinds.items():
        for split in splits if kind == "images" else ():
            stem, table = sample_id(name), partial(Table, tree, name, split)
            parts.append(_Part(stem, split_of(stem, split), 1, True, table))
    parts += _folders(tree, files, records, finished, downloads)
    marked = {posixpath.dirname(name) for name in stats}
    whole: list[_Part] = []
    for part in parts:
        if part.is_shard and posixpath.dirname(part.stem) in marked and part.stem not in finished:
            found.notes.append((part.stem, _UNFINISHED))
            found.ignored["files of unfinished shards"] += part.files
        else:
            whole.append(part)
    return whole, records, sorted([*tars, *kinds, *records.used])


def _folders(
    tree: Tree,
    files: Sequence[str],
    records: Records,
    finished: Collection[str],
    downloads: Mapping[str, str],
) -> Iterator[_Part]:
    """Files by split, and by the folder from which their ids are paths: the nearest one around
    that is a downloader's shard or names a split."""

    def is_shard(folder: str) -> bool:
        numbered = _SHARD_NAME.match(posixpath.basename(folder))
        return bool(numbered) or folder in finished or folder in downloads

    @cache
    def base_of(folder: str) -> str:
        while folder and not is_shard(folder) and not split_of(posixpath.basename(folder)):
            folder = posixpath.dirname(folder)
        return folder

    groups: dict[tuple[str, str | None], tuple[list[str], list[Note]]] = {}
    for name in files:
        folder = posixpath.dirname(name)
        split = records.splits.get(sample_id(name)) if records.splits else None
        groups.setdefault((base_of(folder), split_of(folder, split)), ([], []))[0].append(name)
    for folder, name, split, reason in records.missing:
        base = base_of(folder)
        below = posixpath.join(folder[len(base) + 1 if base else 0 :], name)
        lost = groups.setdefault((base, split_of(folder, split)), ([], []))[1]
        lost.append((strip_extension(below), reason))
    for stem in downloads:
        groups.setdefault((stem, split_of(stem)), ([], []))
    for (base, split), (names, missing) in groups.items():
        shard = bool(base) and is_shard(base)
        what = base, "files" if shard else "folder", names, records.captions, missing
        opened = partial(Folder, tree, *what, downloads.get(base))
        yield _Part(base, split, len(names), shard, opened)


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
