"""What holds samples: folders, tars, and tables with the images inside, each read in any order."""

import json
import os
import posixpath
import tarfile
import threading
from array import array
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache, partial
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from infogrowth.annotations import as_id
from infogrowth.data.captions import (
    CAPTION_FIELDS,
    Captioned,
    Unusable,
    caption_of,
    decode_text,
    no_caption,
)
from infogrowth.data.names import NO_IMAGE, Entry, entries_of, extension_of, image_id
from infogrowth.data.tables import (
    Note,
    Records,
    download_problem,
    image_column,
    read_downloads,
    split_of,
    unreadable,
)
from infogrowth.data.tree import DAMAGE, HIDDEN, NO_FILES, Tree, is_hidden
from infogrowth.errors import shorten

_NAMING = ("key", "__key__", "uid", "id", "image_id", "filename", "file_name", "image_path")
_KEYS = _NAMING[:3]  # which stand for one sample: repeats are repeats, not other images


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

    def __init__(self, name: str, kind: str, repeats: bool) -> None:
        self.name, self.kind, self.repeats = name, kind, repeats
        self.ids: list[str] = []
        self.notes: list[Note] = []
        self.ignored: Counter[str] = Counter()

    def caption(self, number: int) -> Captioned:
        """The caption; raises Unusable with the reason."""
        raise NotImplementedError

    def data(self, number: int) -> bytes:
        """The encoded image; raises Unusable with the reason."""
        raise NotImplementedError


class Files(Container):
    """Samples made of several files each, in a folder or a tar.

    Args:
        read: the content of a file by its number.
        names: those of the files, whose extensions matter.
        entries: which files are a sample.
        downloads: the downloader's table of what should be there.
        records: by number of an image file what records say of it.
    """

    def __init__(
        self,
        tree: Tree,
        name: str,
        kind: str,
        read: Callable[[int], bytes],
        names: Sequence[str],
        entries: list[Entry],
        downloads: str | None,
        records: Mapping[int, Sequence[Captioned | str]] = {},
    ) -> None:
        super().__init__(name, kind, repeats=True)
        self._read, self._records = read, records
        self._is_json = bytes(extension_of(file) == ".json" for file in names)
        problems = read_downloads(tree, downloads, self.notes) if downloads else {}
        missing = problems.keys() - {entry.id for entry in entries}
        entries = [*entries, *(Entry(key, -1, (), NO_IMAGE) for key in missing)]
        entries.sort(key=lambda entry: entry.id)
        self.ids = [entry.id for entry in entries]
        self._problems = {
            number: problems.get(entry.id) or entry.problem
            for number, entry in enumerate(entries)
            if entry.problem
        }
        self._images = array("q", (entry.image for entry in entries))
        self._captions = array("q", (file for entry in entries for file in entry.captions))
        self._ends = array("q", np.cumsum([0, *(len(entry.captions) for entry in entries)]))

    def caption(self, number: int) -> Captioned:
        """The captions of all records; else of the files the first that is whole, or repaired."""
        if problem := self._problems.get(number):
            raise Unusable(problem)
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
            except Unusable as error:
                reasons.append(error.reason)
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
            raise Unusable(problem)
        return self._read(self._images[number])


def open_folder(
    tree: Tree,
    name: str,
    kind: str,
    files: Sequence[str],
    records: Records,
    missing: Sequence[Note],
    downloads: str | None,
) -> Files:
    """Image files with captions beside them or in records.

    Args:
        name: the folder; ids are the paths below it.
        files: its files, as paths in the tree.
        missing: (id, reason) of images that metadata names and that are not there.
    """
    captions = records.captions
    of_file = {number: captions[file] for number, file in enumerate(files) if file in captions}
    start = len(name) + 1 if name else 0
    entries, ignored = entries_of([file[start:] for file in files], named=of_file)
    entries += [Entry(lost, -1, (), reason) for lost, reason in missing]
    read = partial(_read_file, tree, files)
    folder = Files(tree, name, kind, read, files, entries, downloads, of_file)
    folder.ignored = ignored
    return folder


def _read_file(tree: Tree, files: Sequence[str], number: int) -> bytes:
    return tree.read(files[number])


def open_tar(tree: Tree, name: str, downloads: str | None) -> Files:
    """Members of a tar, compressed or not; one that breaks off is read as far as it goes."""
    opened = tree.open if tree.is_plain(name) else tree.open_copy
    names: list[str] = []
    offsets, sizes = array("q"), array("q")
    notes: list[Note] = []
    other: Counter[str] = Counter()
    try:
        with opened(name) as file, tarfile.open(fileobj=file, mode="r:") as archive:
            for member in archive:
                archive.members = []  # type: ignore[attr-defined]  # it would keep them all
                linked = member.linkname in names if member.islnk() else None
                if is_hidden(member.name):
                    other[HIDDEN] += 1
                elif linked or (member.isreg() and not member.issparse()):
                    original = names.index(member.linkname) if linked else -1
                    names.append(member.name)
                    offsets.append(offsets[original] if linked else member.offset_data)
                    sizes.append(sizes[original] if linked else member.size)
                elif not member.isdir():
                    other[NO_FILES] += 1
    except DAMAGE as error:
        notes = [(name, f"the tar is damaged or breaks off: {shorten(error)}")]
    entries, ignored = entries_of(names, archive=True)
    read = partial(_read_member, opened, name, offsets, sizes)
    tar = Files(tree, name, "webdataset", read, names, entries, downloads)
    tar.ignored, tar.notes = ignored + other, tar.notes + notes
    return tar


def _read_member(
    opened: Callable[[str], BinaryIO], name: str, offsets: Any, sizes: Any, number: int
) -> bytes:
    with opened(name) as file:
        file.seek(offsets[number])
        data = file.read(sizes[number])
    if len(data) < sizes[number]:
        raise Unusable(f"{name} breaks off in this sample")
    return data


class Table(Container):
    """A parquet file with a row per sample, the encoded image in a column.

    Args:
        split: take only the rows whose field ``split`` names this one; None takes all.
    """

    def __init__(self, tree: Tree, name: str, split: str | None = None) -> None:
        super().__init__(name, "parquet", repeats=False)
        self._tree = tree
        try:
            with tree.open(name) as file:
                self._index(pq.ParquetFile(file), split)
        except (OSError, pa.ArrowException, ValueError) as error:
            self.notes.append(unreadable(name, error))

    def _index(self, file: pq.ParquetFile, split: str | None) -> None:
        column = {name.lower(): name for name in reversed(file.schema_arrow.names)}
        self._image = image_column(file.schema_arrow) or ""
        self._captions = [column[name] for name in CAPTION_FIELDS if name in column]
        naming = next((column[name] for name in _NAMING if name in column), None)
        self.repeats = naming is not None and naming.lower() in _KEYS
        light = file.read([n for n in (naming, column.get("status"), column.get("split")) if n])
        count = file.metadata.num_rows
        names = light[naming].to_pylist() if naming else _paths(file, self._image) or [None] * count
        stem = posixpath.basename(self.name).partition(".")[0]
        ids = [image_id(as_id(name) or f"{stem}-{row:06d}") for row, name in enumerate(names)]
        rows: Sequence[int] = range(count)
        if split is not None:
            named = light[column["split"]].to_pylist()
            rows = [row for row in rows if (split_of(named[row]) or "train") == split]
        self._rows = sorted(rows, key=lambda row: (ids[row], row))
        self.ids = [ids[row] for row in self._rows]
        status = light[column["status"]].to_pylist() if "status" in column else []
        self._problems = list(map(download_problem, status))
        sizes = [file.metadata.row_group(g).num_rows for g in range(file.num_row_groups)]
        self._starts = np.cumsum([0, *sizes])

    def caption(self, number: int) -> Captioned:
        """The caption columns, in their order of preference."""
        row = self._rows[number]
        if self._problems and (problem := self._problems[row]):
            raise Unusable(problem)
        return caption_of({name: self._cell(row, name) for name in self._captions})

    def data(self, number: int) -> bytes:
        """The image column, or the file that it names."""
        value = self._cell(self._rows[number], self._image)
        if isinstance(value, list):
            value = value[0] if value else None
        if isinstance(value, dict):
            path, value = value.get("path"), value.get("bytes")
            if value is None and path and image_id(path) in path:
                try:
                    return self._tree.read(posixpath.join(posixpath.dirname(self.name), path))
                except FileNotFoundError:
                    pass
        if not isinstance(value, bytes):
            raise Unusable("there is no image in its row")
        return value

    def _cell(self, row: int, column: str) -> Any:
        group = int(np.searchsorted(self._starts, row, side="right")) - 1
        columns = (*self._captions, self._image)
        try:
            with _reading:
                table = _row_group(self._tree, self.name, group, columns)
            return table[column][row - int(self._starts[group])].as_py()
        except (pa.ArrowException, ValueError) as error:
            raise Unusable(f"{self.name} is damaged here") from error


_reading = threading.Lock()  # so that threads which want one row group read it once


@lru_cache(maxsize=8)  # groups in memory; img2dataset's are of 100 rows
def _row_group(tree: Tree, name: str, group: int, columns: tuple[str, ...]) -> pa.Table:
    return _parquet(tree, name).read_row_group(group, list(columns), use_threads=False)


@lru_cache(maxsize=16)
def _parquet(tree: Tree, name: str) -> pq.ParquetFile:
    return pq.ParquetFile(tree.open(name))


os.register_at_fork(after_in_child=_parquet.cache_clear)  # a child would move the parent's files


def _paths(file: pq.ParquetFile, image: str) -> list[str | None] | None:
    """Hugging Face's image column may have the file name that an image had."""
    kind = file.schema_arrow.field(image).type
    if not pa.types.is_struct(kind) or kind.get_field_index("path") < 0:
        return None
    values = file.read([f"{image}.path"])[image].to_pylist()
    return [value["path"] if value else None for value in values]
