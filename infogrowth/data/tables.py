"""Tables: parquet files with images inside, and records that name image files and caption them."""

import csv
import io
import json
import os
import posixpath
import re
import sys
import threading
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from infogrowth.annotations import as_id
from infogrowth.data.containers import Container, Note, download_problem, unreadable
from infogrowth.data.text import (
    CAPTION_FIELDS,
    IMAGE_EXTENSIONS,
    Captioned,
    caption_of,
    clean_name,
    decode_text,
    extension_of,
    image_id,
    sample_id,
)
from infogrowth.data.tree import Tree
from infogrowth.errors import BadSample

RECORD_EXTENSIONS = (".jsonl", ".ndjson", ".csv", ".tsv", ".parquet")
SPLITS = ("train", "val", "test")

_FILE_FIELDS = (
    *("file_name", "filename", "image", "image_path", "image_name", "filepath", "file_path"),
    *("file", "path", "img", "img_path"),
)
_IMAGE_COLUMNS = (*(extension[1:] for extension in IMAGE_EXTENSIONS), "image", "img", "picture")
_NAMING = ("key", "__key__", "uid", "id", "image_id", "filename", "file_name", "image_path")
_KEYS = _NAMING[:3]  # which stand for one sample: repeats are repeats, not other images
_SPLIT_WORDS = {
    **dict.fromkeys(("train", "training", "restval"), "train"),
    **dict.fromkeys(("val", "valid", "validation", "dev"), "val"),
    **dict.fromkeys(("test", "testing", "eval", "evaluation"), "test"),
}
_OUTSIDE = "its file_name leads out of the folder"
_GONE = "the file that the metadata names is missing"
_WORD = re.compile("[A-Z]?[a-z]+|[A-Z]+")
_DELIMITERS = (",", "\t", ";", "|")


def split_of(*names: Any) -> str | None:
    """The split that the words of some paths or fields name: test before val before train."""
    words = (word for name in names if isinstance(name, str) for word in _WORD.findall(name))
    found = {_SPLIT_WORDS.get(word.lower()) for word in words}
    return next((split for split in reversed(SPLITS) if split in found), None)


def kind_of_table(tree: Tree, name: str) -> tuple[str, list[str | None]]:
    """What a parquet file is: ``images`` (as is a damaged one), ``downloads`` or ``records``; and
    the splits that a field ``split`` of a table of images names, ``[None]`` without one."""
    try:
        with tree.path(name).open("rb") as file:
            table = pq.ParquetFile(file)
            names = table.schema_arrow.names
            if _image_column(table.schema_arrow) is None:
                return "downloads" if {"key", "status"} <= set(names) else "records", [None]
            split = next((column for column in names if column.lower() == "split"), None)
            if split is None:
                return "images", [None]
            values = table.read([split])[split].unique().to_pylist()
    except (OSError, pa.ArrowException):
        return "images", [None]
    return "images", [*sorted({split_of(value) or "train" for value in values})]


def _image_column(schema: pa.Schema) -> str | None:
    """The column of encoded images: named after a format or ``image``, else any with bytes."""
    found: dict[int, str] = {}  # by preference
    for column in reversed(schema):
        kind = column.type.value_type if pa.types.is_list(column.type) else column.type
        name = column.name.lower()
        if pa.types.is_struct(kind):
            holds = kind.get_field_index("bytes") >= 0
        else:
            binary = pa.types.is_binary(kind) or pa.types.is_large_binary(kind)
            holds = binary and name in _IMAGE_COLUMNS
        if holds:
            rank = _IMAGE_COLUMNS.index(name) if name in _IMAGE_COLUMNS else len(_IMAGE_COLUMNS)
            found[rank] = column.name
    return found[min(found)] if found else None


class Table(Container):
    """A parquet file with a row per sample, the encoded image in a column.

    Args:
        split: take only the rows whose field ``split`` names this one; None takes all.
    """

    def __init__(self, tree: Tree, name: str, split: str | None = None) -> None:
        super().__init__(tree, name, "parquet")
        self.repeats = False
        try:
            with tree.path(name).open("rb") as file:
                self._index(pq.ParquetFile(file), split)
        except (OSError, pa.ArrowException, ValueError) as error:
            self.notes.append(unreadable(name, error))

    def _index(self, file: pq.ParquetFile, split: str | None) -> None:
        column = {name.lower(): name for name in reversed(file.schema_arrow.names)}
        self._image = _image_column(file.schema_arrow) or ""
        self._captions = [column[name] for name in CAPTION_FIELDS if name in column]
        naming = next((column[name] for name in _NAMING if name in column), None)
        self.repeats = naming is not None and naming.lower() in _KEYS
        light = file.read([n for n in (naming, column.get("status"), column.get("split")) if n])
        count = file.metadata.num_rows
        kind = file.schema_arrow.field(self._image).type
        if naming:
            names = light[naming].to_pylist()
        elif pa.types.is_struct(kind) and kind.get_field_index("path") >= 0:
            # Hugging Face's image column may have the file name that an image had.
            values = file.read([f"{self._image}.path"])[self._image].to_pylist()
            names = [value["path"] if value else None for value in values]
        else:
            names = [None] * count
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
            raise BadSample(problem)
        return caption_of({name: self._cell(row, name) for name in self._captions})

    def data(self, number: int) -> bytes:
        """The image column, or the file that it names."""
        value = self._cell(self._rows[number], self._image)
        if isinstance(value, list):
            value = value[0] if value else None
        if isinstance(value, dict):
            path, value = value.get("path"), value.get("bytes")
            if value is None and path and image_id(path) in path:
                beside = posixpath.join(posixpath.dirname(self.name), path)
                with suppress(FileNotFoundError):
                    return self._tree.path(beside).read_bytes()
        if not isinstance(value, bytes):
            raise BadSample("there is no image in its row")
        return value

    def _cell(self, row: int, column: str) -> Any:
        group = int(np.searchsorted(self._starts, row, side="right")) - 1
        columns = (*self._captions, self._image)
        try:
            with _reading:
                table = _row_group(self._tree, self.name, group, columns)
            return table[column][row - int(self._starts[group])].as_py()
        except (pa.ArrowException, ValueError) as error:
            raise BadSample(f"{self.name} is damaged here") from error


_reading = threading.Lock()  # so that threads which want one row group read it once


@lru_cache(maxsize=8)  # groups in memory; img2dataset's are of 100 rows
def _row_group(tree: Tree, name: str, group: int, columns: tuple[str, ...]) -> pa.Table:
    return _parquet(tree, name).read_row_group(group, list(columns), use_threads=False)


@lru_cache(maxsize=16)
def _parquet(tree: Tree, name: str) -> pq.ParquetFile:
    return pq.ParquetFile(tree.path(name).open("rb"))


os.register_at_fork(after_in_child=_parquet.cache_clear)  # a child would move the parent's files


@dataclass
class Records:
    """All records below a folder that name image files.

    Attributes:
        captions: what the records of each file say, in order, by its path in the tree: a caption,
            or why there is none.
        missing: (folder of the table, name, split, reason) of images that are not there.
        splits: what the records, or the names of their tables, say of a file's split, by its id.
        used: the tables that name images.
        notes: lines that name none.
        repairs: how many tables took which repair.
    """

    captions: dict[str, list[Captioned | str]] = field(default_factory=dict)
    missing: list[tuple[str, str, str | None, str]] = field(default_factory=list)
    splits: dict[str, str] = field(default_factory=dict)
    used: list[str] = field(default_factory=list)
    notes: list[Note] = field(default_factory=list)
    repairs: Counter[str] = field(default_factory=Counter)


def read_records(tree: Tree, files: Sequence[str], tables: Sequence[str]) -> Records:
    """The records of those tables that name images among the files."""
    records = Records()
    known: dict[str, str] = {}  # by path and, after those, by path without extension
    if tables:
        images = [name for name in files if extension_of(name) in IMAGE_EXTENSIONS]
        known = {sample_id(name): name for name in images}
        known.update((clean_name(name), name) for name in files)
    for table in tables:
        folder = posixpath.dirname(table)
        found: list[tuple[str, Captioned | str, str | None]] = []
        missing, notes = [], []
        try:
            lines, repairs = _lines(tree, table)
            for line, record, problem in lines:
                items = record.items() if isinstance(record, Mapping) else ()
                fields = {str(field).strip().lower(): value for field, value in items}
                names = (as_id(fields.get(field)) or "" for field in _FILE_FIELDS)
                name = next((name.strip() for name in names if name.strip()), None)
                split = split_of(table, fields.get("split"))
                if name is None:
                    notes.append((f"{table}:{line}", problem or "the line names no file_name"))
                elif (file := _find(name, folder, tree.root, known)) is not None:
                    try:
                        found.append((file, problem or caption_of(fields), split))
                    except BadSample as error:
                        found.append((file, str(error), split))
                else:
                    form = name.replace("\\", "/")
                    outside = form.startswith("/") or ".." in form.split("/")
                    missing.append((folder, name, split, _OUTSIDE if outside else _GONE))
        except (OSError, pa.ArrowException, ValueError, RecursionError) as error:
            records.notes.append(unreadable(table, error))
            continue
        if not found and not posixpath.basename(table).lower().startswith("metadata."):
            continue
        records.used.append(table)
        records.repairs.update(repairs)
        records.missing += missing
        records.notes += notes
        for file, caption, split in found:
            records.captions.setdefault(file, []).append(caption)
            if split:
                records.splits[sample_id(file)] = split
    return records


def _find(name: str, folder: str, root: str, known: Mapping[str, str]) -> str | None:
    """The file that a record means, in or below a folder above it: its path as it is."""
    for form in (name, name.replace("\\", "/"), re.sub(r"^(\d+)\.0$", r"\1", name)):
        form = form.removeprefix(f"{root}/")
        above: str | None = None if form.startswith("/") else folder
        while above is not None:
            path = posixpath.normpath(posixpath.join(above, form))
            if not path.startswith("../") and clean_name(path) in known:
                return known[clean_name(path)]
            above = posixpath.dirname(above) if above else None
    return None


Line = tuple[int, Any, str | None]  # number, record (a mapping, or it is none), problem


def _lines(tree: Tree, table: str) -> tuple[Iterable[Line], tuple[str, ...]]:
    """The lines of a table, and how its text was repaired."""
    repairs: tuple[str, ...] = ()
    if extension_of(table) == ".parquet":
        with tree.path(table).open("rb") as file:
            records = pq.read_table(file).to_pylist()
    else:
        text, repairs = decode_text(tree.path(table).read_bytes())
        if extension_of(table) in (".csv", ".tsv"):
            return _csv_lines(text), repairs
        if not text.lstrip().startswith("["):
            lines = enumerate(text.split("\n"), 1)
            return (_json_line(number, line) for number, line in lines if line.strip()), repairs
        records = json.loads(text)
    return ((number, record, None) for number, record in enumerate(records, 1)), repairs


def _json_line(number: int, line: str) -> Line:
    try:
        return number, json.loads(line), None
    except (ValueError, RecursionError):
        return number, None, "the line is not valid JSON"


def _csv_lines(text: str) -> Iterator[Line]:
    """The lines of a CSV: its delimiter and whether it has a header are seen from the first."""
    first = text.lstrip("\r\n").split("\n", 1)[0]
    delimiter = max(_DELIMITERS, key=first.count)
    csv.field_size_limit(sys.maxsize)
    try:
        reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
        rows = [(reader.line_num, row) for row in reader if row]
    except csv.Error:  # quotes that do not match: they cost their line, not all that follow
        lines = enumerate(text.splitlines(), 1)
        rows = [(n, row) for n, line in lines for row in csv.reader([line], delimiter=delimiter)]
    header = rows[0][1] if rows else []
    if header and extension_of(header[0].strip()) in IMAGE_EXTENSIONS:
        header = ["file_name", "text"]
    else:
        rows = rows[1:]
    too_many = "the line has more fields than the header: quote what holds a comma"
    for line, row in rows:
        problem = too_many if any(row[len(header) :]) else None
        yield line, dict(zip(header, row, strict=False)), problem
