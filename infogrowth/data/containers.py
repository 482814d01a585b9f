"""What holds samples made of several files each, folders and tars, and which files are a sample."""

import json
import posixpath
import tarfile
from array import array
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from infogrowth.annotations import as_id
from infogrowth.data.text import (
    IMAGE_EXTENSIONS,
    Captioned,
    caption_of,
    decode_text,
    extension_of,
    image_id,
    no_caption,
    sample_id,
)
from infogrowth.data.tree import DAMAGE, HIDDEN, NO_FILES, Tree, is_hidden
from infogrowth.errors import BadSample, shorten

Note = tuple[str, str]  # what could not be used, and why
NO_IMAGE = "there is no image of this name"
ANOTHER_FORMAT = "there is no image of this name, only a file in a format that is not read"

_FAILURES = {
    "failed_to_download": "the download failed",
    "failed_to_resize": "the image could not be resized when it was downloaded",
}
_CAPTIONS = (".txt", ".caption", ".text", ".json")  # in order of preference
_UNUSUAL = "image"  # instead of the extension of an image that does not have one
_IMAGES = frozenset((*IMAGE_EXTENSIONS, _UNUSUAL))
_RANK = {kind: n for n, kind in enumerate((*IMAGE_EXTENSIONS, _UNUSUAL, *_CAPTIONS))}


def unreadable(table: str, error: Exception) -> Note:
    """The note of a table that cannot be read."""
    return table, f"the table cannot be read: {shorten(error)}"


def download_problem(status: Any) -> str | None:
    """The kind of failure for a record; the server's own words stay in the downloader's table."""
    if status == "success":
        return None
    return _FAILURES.get(status, f"the download ended with status {status!r}")


class Container:
    """Samples by number.

    Attributes:
        name: the path in the tree.
        kind: what it is, in a word.
        repeats: samples of one id are the same sample again, not others of one name.
        ids: those of all samples in order, bad ones and repeats included.
        notes: what could not be used at all.
        ignored: how many of what kind in it are no part of a sample.
    """

    repeats = True

    def __init__(self, tree: Tree, name: str, kind: str) -> None:
        self._tree, self.name, self.kind = tree, name, kind
        self.ids: list[str] = []
        self.notes: list[Note] = []
        self.ignored: Counter[str] = Counter()

    def caption(self, number: int) -> Captioned:
        """The caption; raises BadSample with the reason."""
        raise NotImplementedError

    def data(self, number: int) -> bytes:
        """The encoded image; raises BadSample with the reason."""
        raise NotImplementedError


class Entry(NamedTuple):
    """An image with its captions, as numbers of files.

    Attributes:
        id: their common name, which is the id of the sample.
        image: -1 if there is none.
        captions: surest first.
        problem: why there is no image.
    """

    id: str
    image: int
    captions: tuple[int, ...]
    problem: str | None


class Files(Container):
    """Samples made of several files each."""

    _records: Mapping[int, Sequence[Captioned | str]] = {}  # what they say of an image file

    def _index(self, names: Sequence[str], entries: list[Entry], downloads: str | None) -> None:
        """Take the samples that the files are, and those that a download should have made.

        Args:
            downloads: the downloader's table of what should be there.
        """
        self._is_json = bytes(extension_of(file) == ".json" for file in names)
        problems: dict[str, str | None] = {}  # why a download failed; None if it must be there
        if downloads:
            try:
                with self._tree.path(downloads).open("rb") as file:
                    rows = pq.read_table(file, columns=["key", "status"])
            except (OSError, pa.ArrowException) as error:
                self.notes.append(unreadable(downloads, error))
            else:
                keys = [image_id(as_id(key) or "") for key in rows["key"].to_pylist()]
                reasons = list(map(download_problem, rows["status"].to_pylist()))
                failed = {key: why for key, why in zip(keys, reasons, strict=True) if why}
                problems = {**dict.fromkeys(keys), **failed}
        missing = problems.keys() - {entry.id for entry in entries}
        entries = [*entries, *(Entry(key, -1, (), NO_IMAGE) for key in missing)]
        entries.sort(key=lambda entry: entry.id)
        self.ids = [entry.id for entry in entries]
        self._problems = {
            number: problems.get(entry.id) or entry.problem
            for number, entry in enumerate(entries)
            if entry.problem
        }
        # Millions of numbers take a few bytes each.
        self._images = array("q", (entry.image for entry in entries))
        self._captions = array("q", (file for entry in entries for file in entry.captions))
        self._ends = array("q", np.cumsum([0, *(len(entry.captions) for entry in entries)]))

    def _read(self, file: int) -> bytes:
        raise NotImplementedError

    def caption(self, number: int) -> Captioned:
        """The captions of all records; else of the files the first that is whole, or repaired."""
        if problem := self._problems.get(number):
            raise BadSample(problem)
        records = self._records.get(self._images[number], ())
        if found := [record for record in records if not isinstance(record, str)]:
            lists = [one if isinstance(one, list) else [one] for one, _ in found]
            texts = dict.fromkeys(text for several in lists for text in several)
            return caption_of(list(texts))[0], tuple(r for _, repairs in found for r in repairs)
        reasons = [record for record in records if isinstance(record, str)]
        repaired: Captioned | None = None
        for file in self._captions[self._ends[number] : self._ends[number + 1]]:
            try:
                text, repairs = decode_text(self._read(file))
                caption, more = caption_of(json.loads(text) if self._is_json[file] else text)
            except BadSample as error:
                reasons.append(str(error))
            except (ValueError, RecursionError):
                reasons.append("the .json beside the image is not valid JSON")
            else:
                if not (repairs or more):
                    return caption, ()
                repaired = repaired or (caption, (*repairs, *more))
        if repaired is None:
            raise no_caption(reasons)
        return repaired

    def data(self, number: int) -> bytes:
        if problem := self._problems.get(number):
            raise BadSample(problem)
        return self._read(self._images[number])


class Folder(Files):
    """Image files with captions beside them or in records.

    Args:
        name: the folder; ids are the paths below it.
        files: its files, as paths in the tree.
        records: what records say of image files, by their paths.
        missing: (id, reason) of images that records name and that are not there.
        downloads: the downloader's table of what should be there.
    """

    def __init__(
        self,
        tree: Tree,
        name: str,
        kind: str,
        files: Sequence[str],
        records: Mapping[str, Sequence[Captioned | str]],
        missing: Sequence[Note],
        downloads: str | None,
    ) -> None:
        super().__init__(tree, name, kind)
        self._files = files
        self._records = {n: records[file] for n, file in enumerate(files) if file in records}
        start = len(name) + 1 if name else 0
        below = [file[start:] for file in files]
        entries, self.ignored = entries_of(below, named=self._records)
        entries += [Entry(lost, -1, (), reason) for lost, reason in missing]
        self._index(files, entries, downloads)

    def _read(self, file: int) -> bytes:
        return self._tree.read(self._files[file])


class Tar(Files):
    """Members of a tar, compressed or not; one that breaks off is read as far as it goes.

    Args:
        downloads: the downloader's table of what should be there.
    """

    def __init__(self, tree: Tree, name: str, downloads: str | None) -> None:
        super().__init__(tree, name, "webdataset")
        self._path, self._plain = tree.path(name), tree.is_plain(name)
        self._offsets, self._sizes = array("q"), array("q")
        names: list[str] = []
        ignored: Counter[str] = Counter()
        damage: list[Note] = []
        try:
            with self._open() as file, tarfile.open(fileobj=file, mode="r:") as archive:
                for member in archive:
                    archive.members = []  # type: ignore[attr-defined]  # it would keep them all
                    linked = member.linkname in names if member.islnk() else None
                    if is_hidden(member.name):
                        ignored[HIDDEN] += 1
                    elif linked or (member.isreg() and not member.issparse()):
                        original = names.index(member.linkname) if linked else -1
                        names.append(member.name)
                        offset, size = member.offset_data, member.size
                        self._offsets.append(self._offsets[original] if linked else offset)
                        self._sizes.append(self._sizes[original] if linked else size)
                    elif not member.isdir():
                        ignored[NO_FILES] += 1
        except DAMAGE as error:
            damage = [(name, f"the tar is damaged or breaks off: {shorten(error)}")]
        entries, others = entries_of(names, archive=True)
        self.ignored = others + ignored
        self._index(names, entries, downloads)
        self.notes += damage

    def _open(self) -> BinaryIO:
        return self._path.open("rb") if self._plain else self._tree.open_copy(self.name)

    def _read(self, file: int) -> bytes:
        with self._open() as tar:
            tar.seek(self._offsets[file])
            data = tar.read(self._sizes[file])
        if len(data) < self._sizes[file]:
            raise BadSample(f"{self.name} breaks off in this sample")
        return data


def entries_of(
    names: Sequence[str], archive: bool = False, named: Collection[int] = ()
) -> tuple[list[Entry], Counter[str]]:
    """The samples that some files make, and how many of what kind make none.

    A sample is one image with all captions of its name; several images of one name are several
    samples of one id. In an archive a name may occur again: then only members that follow one
    another belong together. There, ``x.image.png`` and ``x.caption.txt`` are a sample too, as
    webdataset has it, unless an extension would be a number, as in ``22.05.png``.

    Args:
        archive: names may repeat, and their order matters.
        named: numbers of files that are images whatever their extension, since a record says so.
    """
    kinds = [extension_of(name) for name in names]
    for n in named:
        kinds[n] = kinds[n] if kinds[n] in IMAGE_EXTENSIONS else _UNUSUAL
    found: dict[str, list[int]] = {}
    for number, name in enumerate(names):
        found.setdefault(sample_id(name), []).append(number)
    if archive:
        _join_up_to_first_dot(found, kinds)
    with_images = {
        name.rpartition("/")[0] for name, kind in zip(names, kinds, strict=True) if kind in _IMAGES
    }
    entries: list[Entry] = []
    ignored: Counter[str] = Counter()
    for key, numbers in found.items():
        for part in _runs(numbers, names) if archive else [numbers]:
            part.sort(key=lambda n: (_RANK.get(kinds[n], 0), names[n]))
            images = [n for n in part if kinds[n] in _IMAGES]
            captions = [n for n in part if kinds[n] in _CAPTIONS]
            others = sorted(n for n in part if kinds[n] not in _RANK)
            if not images and captions and others:
                problem = f"{ANOTHER_FORMAT}: {kinds[others[0]]}"
                entries.append(Entry(key, others.pop(0), tuple(captions), problem))
            elif not images and captions:
                if names[captions[0]].rpartition("/")[0] in with_images:
                    entries.append(Entry(key, -1, tuple(captions), NO_IMAGE))
                else:
                    others += captions
            entries.extend(_with_captions(key, images, captions, names))
            ignored.update(kinds[n] or "files without extension" for n in others)
    return entries, ignored


def _with_captions(
    key: str, images: list[int], captions: list[int], names: Sequence[str]
) -> Iterator[Entry]:
    """Each image with the captions that are its own (``x.png.txt``), then those of the name."""
    owners = {n: posixpath.splitext(names[n])[0] for n in captions}
    present = {names[image] for image in images}
    for position, image in enumerate(images):
        own = [n for n in captions if owners[n] == names[image]]
        shared = [n for n in captions if owners[n] not in present]
        apart = f"-{extension_of(names[image])[1:]}" if own and position else ""
        yield Entry(key + apart, image, (*own, *shared), None)


def _runs(numbers: list[int], names: Sequence[str]) -> list[list[int]]:
    """The members of one key; where a name occurs twice, the runs without a repetition."""
    if len({names[n] for n in numbers}) == len(numbers):
        return [numbers]
    runs: list[list[int]] = [[]]
    for n in numbers:
        run = runs[-1]
        if run and (n != run[-1] + 1 or names[n] in {names[m] for m in run}):
            runs.append(run := [])
        run.append(n)
    return runs


def _join_up_to_first_dot(found: dict[str, list[int]], kinds: Sequence[str]) -> None:
    """Join keys that are no sample by themselves but are one up to their first dot."""
    joined: dict[str, list[str]] = {}
    for key in found:
        folder, slash, base = key.rpartition("/")
        first, _, rest = base.partition(".")
        if first and not rest[:1].isdigit():
            joined.setdefault(folder + slash + first, []).append(key)
    for key, parts in joined.items():
        if len(parts) < 2:
            continue
        images = [sum(kinds[n] in _IMAGES for n in found[part]) for part in parts]
        captions = [sum(kinds[n] in _CAPTIONS for n in found[part]) for part in parts]
        whole = any(image and caption for image, caption in zip(images, captions, strict=True))
        if sum(images) == 1 and any(captions) and not whole:
            found[key] = sorted(n for part in parts for n in found.pop(part))
