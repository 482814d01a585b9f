"""What holds samples: folders, tars, and tables with the images inside, each read in any order."""

import json
import posixpath
import tarfile
import threading
from array import array
from collections import Counter, OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from infogrowth.annotations import as_id
from infogrowth.data.captions import (
    CAPTION_FIELDS,
    NO_CAPTION,
    Caption,
    Unusable,
    caption_of,
    decode_text,
)
from infogrowth.data.entries import NO_IMAGE, Entry, entries_of, extension_of, image_id
from infogrowth.data.records import (
    Downloads,
    Row,
    download_problem,
    image_column,
    split_of,
)
from infogrowth.data.tree import DAMAGE, HIDDEN, Tree, is_hidden
from infogrowth.errors import shorten

_NAMING = ("key", "__key__", "uid", "id", "image_id", "filename", "file_name", "image_path")
_KEYS = _NAMING[:3]  # which stand for one sample: repeats are repeats, not other images
_GROUPS_HELD = 8  # row groups in memory; img2dataset's are of 100 rows

Found = tuple[Caption, tuple[str, ...]]  # a caption, and the repairs that it took


class _Files:
    """Samples made of several files each: what folders and archives have in common.

    As of all containers: ``name`` is its path in the tree, ``kind`` what it is in a word, ``ids``
    are those of all samples in order, bad ones and repeats included; ``repeats``: samples of one
    id are the same sample again, not others of one name; ``notes``: (name, reason) of what could
    not be used at all; ``ignored``: how many of what kind in it are no part of a sample.
    """

    name: str
    notes: list[tuple[str, str]]
    ignored: Counter[str]
    repeats = True

    def _hold(self, entries: list[Entry], downloads: Downloads) -> None:
        """Keep the entries, and those that a download promised, in the order of their ids."""
        missing = downloads.keys.difference(entry.id for entry in entries)
        entries += [Entry(key, -1, (), NO_IMAGE) for key in missing]
        entries.sort(key=lambda entry: entry.id)
        self.ids = [entry.id for entry in entries]
        self._problems = {
            number: downloads.failed.get(entry.id, entry.problem)
            for number, entry in enumerate(entries)
            if entry.problem
        }
        self._images = array("q", (entry.image for entry in entries))
        self._captions = array("q", (member for entry in entries for member in entry.captions))
        self._ends = array("q", np.cumsum([0, *(len(entry.captions) for entry in entries)]))

    def caption(self, number: int) -> Found:
        """The first caption there is, one that is whole before one that had to be repaired.

        Raises Unusable with the reason of the surest file, or of the download.
        """
        if number in self._problems:
            raise Unusable(self._problems[number])
        reason, found = NO_CAPTION, None
        for member in self._captions[self._ends[number] : self._ends[number + 1]]:
            try:
                caption, repairs = self._caption_in(member)
            except Unusable as error:
                reason = error.reason if reason == NO_CAPTION else reason
                continue
            if not repairs:
                return caption, ()
            found = found or (caption, repairs)
        if found is None:
            raise Unusable(reason)
        return found

    def _caption_in(self, member: int) -> Found:
        text, repairs = decode_text(self._read(member))
        try:
            caption, more = caption_of(json.loads(text) if self._is_json(member) else text)
        except (ValueError, RecursionError) as error:
            raise Unusable("the .json beside the image is not valid JSON") from error
        return caption, (*repairs, *more)

    def data(self, number: int) -> bytes:
        """The encoded image."""
        if number in self._problems:
            raise Unusable(self._problems[number])
        return self._read(self._images[number])

    def _read(self, member: int) -> bytes:
        raise NotImplementedError

    def _is_json(self, member: int) -> bool:
        raise NotImplementedError


class Folder(_Files):
    """Image files with captions beside them or in records.

    Args:
        name: the folder; ids are the paths below it.
        files: its files, as paths in the tree.
        records: what metadata says of files, by their paths.
        missing: (name, reason) of images that metadata names and that are not there.
    """

    def __init__(
        self,
        tree: Tree,
        name: str,
        kind: str,
        files: Sequence[str],
        records: Mapping[str, list[Row]],
        missing: Sequence[tuple[str, str]],
        downloads: Downloads,
    ) -> None:
        self._tree, self.name, self.kind = tree, name, kind
        self.notes = list(downloads.notes)
        self._names = list(files)
        self._records = {n: records[file] for n, file in enumerate(files) if file in records}
        start = len(name) + 1 if name else 0
        below = [file[start:] for file in files]
        entries, self.ignored = entries_of(below, named=frozenset(self._records))
        self._hold([*entries, *(Entry(name, -1, (), why) for name, why in missing)], downloads)

    def caption(self, number: int) -> Found:
        """The captions of all records, else that of the files beside the image."""
        found: list[Found] = []
        reason = NO_CAPTION
        for row in self._records.get(self._images[number], ()):
            try:
                if isinstance(row, str):
                    raise Unusable(row)
                found.append(caption_of(row))
            except Unusable as error:
                reason = error.reason if reason == NO_CAPTION else reason
        if found:
            texts = [text for one, _ in found for text in (one if isinstance(one, list) else [one])]
            repairs = tuple(repair for _, some in found for repair in some)
            return caption_of(list(dict.fromkeys(texts)))[0], repairs
        try:
            return super().caption(number)
        except Unusable as error:
            raise Unusable(error.reason if reason == NO_CAPTION else reason) from error

    def _read(self, member: int) -> bytes:
        return self._tree.read(self._names[member])

    def _is_json(self, member: int) -> bool:
        return extension_of(self._names[member]) == ".json"


class Tar(_Files):
    """Members of a tar, compressed or not, by their places in it.

    One that breaks off is read as far as it goes.
    """

    kind = "webdataset"

    def __init__(self, tree: Tree, name: str, downloads: Downloads) -> None:
        self._tree, self.name = tree, name
        self._open = tree.open if tree.is_plain(name) else tree.open_copy
        self.notes = list(downloads.notes)
        self._offsets, self._sizes = array("q"), array("q")
        names: list[str] = []
        other: Counter[str] = Counter()
        try:
            for member in self._members():
                linked = member.linkname in names if member.islnk() else None
                if is_hidden(member.name):
                    other[HIDDEN] += 1
                elif linked or (member.isreg() and not member.issparse()):
                    original = names.index(member.linkname) if linked else -1
                    names.append(member.name)
                    self._offsets.append(self._offsets[original] if linked else member.offset_data)
                    self._sizes.append(self._sizes[original] if linked else member.size)
                elif not member.isdir():
                    other["neither files nor folders"] += 1
        except DAMAGE as error:
            self.notes.append((name, f"the tar is damaged or breaks off: {shorten(error)}"))
        self._json = bytes(extension_of(member) == ".json" for member in names)
        entries, self.ignored = entries_of(names, archive=True)
        self.ignored.update(other)
        self._hold(entries, downloads)

    def _members(self) -> Iterator[tarfile.TarInfo]:
        with self._open(self.name) as file, tarfile.open(fileobj=file, mode="r:") as archive:
            for member in archive:
                archive.members = []  # type: ignore[attr-defined]  # it would keep them all
                yield member

    def _read(self, member: int) -> bytes:
        with self._open(self.name) as file:
            file.seek(self._offsets[member])
            data = file.read(self._sizes[member])
        if len(data) < self._sizes[member]:
            raise Unusable(f"{self.name} breaks off in this sample")
        return data

    def _is_json(self, member: int) -> bool:
        return bool(self._json[member])


class Table:
    """A parquet file with a row per sample, the encoded image in a column.

    Args:
        split: take only the rows whose field ``split`` names this one; None takes all.
    """

    kind = "parquet"
    _file: pq.ParquetFile | None

    def __init__(self, tree: Tree, name: str, split: str | None = None) -> None:
        self._tree, self.name = tree, name
        self.notes: list[tuple[str, str]] = []
        self.ids: list[str] = []
        self.ignored: Counter[str] = Counter()
        self.repeats = False
        self._fresh()
        try:
            with tree.open(name) as file:
                self._index(pq.ParquetFile(file), split)
        except (OSError, pa.ArrowException, ValueError) as error:
            self.notes.append((name, f"the table cannot be read: {shorten(error)}"))

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
        self._failed = {
            row: download_problem(state) for row, state in enumerate(status) if state != "success"
        }
        sizes = [file.metadata.row_group(g).num_rows for g in range(file.num_row_groups)]
        self._starts = np.cumsum([0, *sizes])

    def caption(self, number: int) -> Found:
        """The caption columns, in their order of preference."""
        row = self._rows[number]
        if row in self._failed:
            raise Unusable(self._failed[row])
        return caption_of({name: self._cell(row, name) for name in self._captions})

    def data(self, number: int) -> bytes:
        """The image column, or the file that it names."""
        value = self._cell(self._rows[number], self._image)
        if isinstance(value, list):
            value = value[0] if value else None
        if isinstance(value, dict):
            path = value.get("path")
            value = value.get("bytes")
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
        try:
            with self._lock:
                return self._group(group, column)[row - int(self._starts[group])].as_py()
        except (pa.ArrowException, ValueError) as error:
            raise Unusable(f"{self.name} is damaged here") from error

    def _group(self, group: int, column: str) -> pa.ChunkedArray:
        """One column of a row group, of which the last few are kept."""
        held = self._held.pop((group, column), None)
        if held is None:
            if self._file is None:
                self._file = pq.ParquetFile(self._tree.open(self.name))
            held = self._file.read_row_group(group, [column], use_threads=False)[column]
        self._held[group, column] = held
        while len(self._held) > _GROUPS_HELD * (1 + len(self._captions)):
            self._held.popitem(last=False)
        return held

    def _fresh(self) -> None:
        self._lock = threading.Lock()
        self._file = None
        self._held: OrderedDict[tuple[int, str], pa.ChunkedArray] = OrderedDict()

    def __getstate__(self) -> dict[str, Any]:
        dropped = ("_lock", "_file", "_held")
        return {key: value for key, value in self.__dict__.items() if key not in dropped}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._fresh()


Container = Folder | Tar | Table


def _paths(file: pq.ParquetFile, image: str) -> list[str | None] | None:
    """Hugging Face's image column may tell the file name that an image had."""
    kind = file.schema_arrow.field(image).type
    if not pa.types.is_struct(kind) or kind.get_field_index("path") < 0:
        return None
    values = file.read([f"{image}.path"])[image].to_pylist()
    return [value["path"] if value else None for value in values]
