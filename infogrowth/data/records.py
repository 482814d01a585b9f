"""Tables: what a download did, and records that name image files and give their captions."""

import csv
import io
import json
import posixpath
import re
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from infogrowth.annotations import as_id
from infogrowth.data.captions import decode_text
from infogrowth.data.entries import clean_name, extension_of, image_id, key_of
from infogrowth.data.lmdb_store import IMAGE_EXTENSIONS
from infogrowth.data.tree import Tree
from infogrowth.errors import shorten

RECORD_EXTENSIONS = (".jsonl", ".ndjson", ".csv", ".tsv", ".parquet")
FILE_FIELDS = (
    *("file_name", "filename", "image", "image_path", "image_name", "filepath", "file_path"),
    *("file", "path", "img", "img_path"),
)
_IMAGE_COLUMNS = (*(extension[1:] for extension in IMAGE_EXTENSIONS), "image", "img", "picture")
SPLITS = ("train", "val", "test")
_SPLIT_WORDS = {
    **dict.fromkeys(("train", "training", "restval"), "train"),
    **dict.fromkeys(("val", "valid", "validation", "dev"), "val"),
    **dict.fromkeys(("test", "testing", "eval", "evaluation"), "test"),
}
_WORD = re.compile("[A-Z]?[a-z]+|[A-Z]+")
_DELIMITERS = (",", "\t", ";", "|")
Row = Mapping[str, Any] | str  # a record, or what is wrong with its line
NO_NAME = "the line names no file_name"
PROBLEM = "\0problem"  # stands for a field, under a name that no file can give


def split_of(*names: Any) -> str | None:
    """The split that the words of some paths or fields name: test before val before train."""
    words = (word for name in names if isinstance(name, str) for word in _WORD.findall(name))
    found = {_SPLIT_WORDS.get(word.lower()) for word in words}
    return next((split for split in reversed(SPLITS) if split in found), None)


class Downloads:
    """What img2dataset's table beside a shard says of its downloads.

    Attributes:
        failed: reason by key.
        keys: all keys, those that the shard must hold and those that failed.
        notes: (table, reason) if the table cannot be read.
    """

    def __init__(self, tree: Tree, table: str | None) -> None:
        self.failed: dict[str, str] = {}
        self.keys: set[str] = set()
        self.notes: list[tuple[str, str]] = []
        if table is None:
            return
        try:
            with tree.open(table) as file:
                rows = pq.read_table(file, columns=["key", "status"])
        except (OSError, pa.ArrowException) as error:
            self.notes.append((table, f"the table cannot be read: {shorten(error)}"))
            return
        keys = [image_id(as_id(key) or "") for key in rows["key"].to_pylist()]
        self.keys.update(keys)
        for key, status in zip(keys, rows["status"].to_pylist(), strict=True):
            if status != "success":
                self.failed[key] = download_problem(status)


def download_problem(status: Any) -> str:
    """The kind of failure for a record; the server's own words stay in the table."""
    words = {
        "failed_to_download": "the download failed",
        "failed_to_resize": "the image could not be resized when it was downloaded",
    }
    return words.get(status, f"the download ended with status {status!r}")


def kind_of_table(tree: Tree, name: str) -> str:
    """What a parquet file is: ``images``, ``downloads`` or ``records``; a damaged one: images."""
    try:
        with tree.open(name) as file:
            schema = pq.read_schema(file)
    except (OSError, pa.ArrowException):
        return "images"
    if image_column(schema) is not None:
        return "images"
    return "downloads" if {"key", "status"} <= set(schema.names) else "records"


def splits_in_table(tree: Tree, name: str) -> list[str | None]:
    """The splits that a field ``split`` of a table of images names; ``[None]`` without one."""
    try:
        with tree.open(name) as file:
            field = pq.ParquetFile(file)
            column = next(c for c in field.schema_arrow.names if c.lower() == "split")
            values = field.read([column])[column].unique().to_pylist()
    except (OSError, pa.ArrowException, StopIteration):
        return [None]
    return [*sorted({split_of(value) or "train" for value in values})]


def image_column(schema: pa.Schema) -> str | None:
    """The column of encoded images: named after a format or ``image``, else any with bytes."""

    def holds_images(field: pa.Field) -> bool:
        kind = field.type.value_type if pa.types.is_list(field.type) else field.type
        if pa.types.is_struct(kind):
            return kind.get_field_index("bytes") >= 0
        binary = pa.types.is_binary(kind) or pa.types.is_large_binary(kind)
        return binary and field.name.lower() in _IMAGE_COLUMNS

    fields = [field for field in schema if holds_images(field)]
    rank = {name: position for position, name in enumerate(_IMAGE_COLUMNS)}
    fields.sort(key=lambda field: rank.get(field.name.lower(), len(rank)))
    return fields[0].name if fields else None


class Records:
    """All records below a folder that name image files.

    Attributes:
        of_file: the records of each file, in order, by its path in the tree.
        missing: (folder of the table, name, split, reason) of images that are not there.
        splits: what the records, or the names of their tables, say of a file's split, by its key.
        used: the tables that name images.
        notes: (table and line, reason) of lines that name none.
        repairs: how many tables took which repair.
    """

    def __init__(self, tree: Tree, files: Sequence[str], tables: Sequence[str]) -> None:
        self.of_file: dict[str, list[Row]] = {}
        self.missing: list[tuple[str, str, str | None, str]] = []
        self.splits: dict[str, str] = {}
        self.used: list[str] = []
        self.notes: list[tuple[str, str]] = []
        self.repairs: Counter[str] = Counter()
        self._tree = tree
        self._files: dict[str, str] = {}  # by path and, after those, by path without extension
        if tables:
            images = [name for name in files if extension_of(name) in IMAGE_EXTENSIONS]
            self._files = {key_of(name): name for name in images}
            self._files.update((clean_name(name), name) for name in files)
        for table in tables:
            self._read(table)

    def _read(self, table: str) -> None:
        folder = posixpath.dirname(table)
        named: list[tuple[str, Row, str | None]] = []
        missing, notes = [], []
        try:
            rows, repairs = _rows(self._tree, table)
            for line, name, row in rows:
                split = split_of(table, row.get("split") if isinstance(row, Mapping) else None)
                if name is None:
                    notes.append((f"{table}:{line}", str(row)))
                elif (file := self._find(folder, name)) is not None:
                    named.append((file, row, split))
                else:
                    missing.append((folder, name, split, _reason_missing(name)))
        except (OSError, pa.ArrowException, ValueError, RecursionError) as error:
            self.notes.append((table, f"the table cannot be read: {shorten(error)}"))
            return
        if named or posixpath.basename(table).lower().startswith("metadata."):
            self.used.append(table)
            self.repairs.update(repairs)
            self.missing += missing
            self.notes += notes
            for file, row, split in named:
                self.of_file.setdefault(file, []).append(row)
                if split:
                    self.splits[key_of(file)] = split

    def _find(self, folder: str, name: str) -> str | None:
        """The file that a record means, in or below a folder above it: its path as it is."""
        root = f"{self._tree.root}/"
        for form in (name, name.replace("\\", "/"), re.sub(r"^(\d+)\.0$", r"\1", name)):
            form = form.removeprefix(root)
            above = folder
            while not form.startswith("/"):
                path = posixpath.normpath(posixpath.join(above, form))
                if not path.startswith("../") and clean_name(path) in self._files:
                    return self._files[clean_name(path)]
                if not above:
                    break
                above = posixpath.dirname(above)
        return None


def _reason_missing(name: str) -> str:
    form = name.replace("\\", "/")
    if form.startswith("/") or ".." in form.split("/"):
        return "its file_name leads out of the folder"
    return "the file that the metadata names is missing"


def _rows(tree: Tree, table: str) -> tuple[Iterator[tuple[int, str | None, Row]], tuple[str, ...]]:
    """Line number, name of the image, and record of every line; and how the text was repaired."""
    if extension_of(table) == ".parquet":
        with tree.open(table) as file:
            return _named(enumerate(pq.read_table(file).to_pylist(), 1)), ()
    text, repairs = decode_text(tree.read(table))
    if extension_of(table) in (".csv", ".tsv"):
        return _named(_csv_records(text)), repairs
    if text.lstrip().startswith("["):
        return _named(enumerate(json.loads(text), 1)), repairs
    lines = ((n, line) for n, line in enumerate(text.split("\n"), 1) if line.strip())
    return _named((number, _json_record(line)) for number, line in lines), repairs


def _named(records: Iterable[tuple[int, Any]]) -> Iterator[tuple[int, str | None, Row]]:
    for number, record in records:
        if not isinstance(record, Mapping):
            yield number, None, record if isinstance(record, str) else NO_NAME
            continue
        fields = {str(field).strip().lower(): value for field, value in record.items()}
        values = (fields.get(field) for field in FILE_FIELDS)
        name = next((name for value in values if (name := (as_id(value) or "").strip())), None)
        yield number, name, fields.get(PROBLEM, fields if name else NO_NAME)


def _json_record(line: str) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        return "the line is not valid JSON"


def _csv_records(text: str) -> Iterator[tuple[int, dict[str, str]]]:
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
    if not rows:
        return
    header = [name.strip().lower() for name in rows[0][1]]
    if header and extension_of(header[0]) in IMAGE_EXTENSIONS:
        header = ["file_name", "text"]
    else:
        rows = rows[1:]
    for line, row in rows:
        record = dict(zip(header, row, strict=False))
        if any(row[len(header) :]):
            record[PROBLEM] = "the line has more fields than the header: quote what holds a comma"
        yield line, record
