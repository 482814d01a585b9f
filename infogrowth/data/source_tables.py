"""Parquet shards with the pictures inside: img2dataset's, and Hugging Face's image column."""

import threading
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from infogrowth.data.lmdb_store import strip_ending
from infogrowth.data.source_samples import (
    CAPTION_KEYS,
    PICTURE_SUFFIXES,
    SUCCESS,
    Unreadable,
    failure,
)

_KEY_COLUMNS = ("key", "id", "__key__", "uid")
_GROUPS_HELD = 8  # decoded row groups; the downloader's are of 100 rows


class ParquetShard:
    """One table with a row per download, the picture in a binary column."""

    _file: pq.ParquetFile | None

    def __init__(self, path: Path) -> None:
        self._path = path
        self.notes: list[tuple[str, str]] = []
        self.ids: list[str] = []
        self._rows: list[int] = []
        self._fresh()
        try:
            self._open()
        except (OSError, pa.ArrowException, ValueError) as error:
            detail = " ".join(str(error).split())[:120]
            self.notes.append((path.name, f"the table cannot be read: {detail}"))

    def _open(self) -> None:
        file = pq.ParquetFile(self._path)
        names = file.schema_arrow.names
        picture = picture_column(file.schema_arrow)
        if picture is None:
            raise ValueError("it has no column of pictures")
        caption = next((name for name in CAPTION_KEYS if name in names), None)
        self._columns = {"picture": picture, "caption": caption}
        light = [c for c in ("status", "error_message") if c in names]
        key = next((name for name in _KEY_COLUMNS if name in names), None)
        table = file.read(columns=[*light, *([key] if key else [])])
        keys = table[key].to_pylist() if key else self._paths_in(file, picture)
        named = [
            strip_ending(str(name)) if name is not None else f"{self._path.stem}-{row:06d}"
            for row, name in enumerate(keys)
        ]
        self._rows = sorted(range(len(named)), key=lambda row: (named[row], row))
        self.ids = [named[row] for row in self._rows]
        status = table["status"].to_pylist() if "status" in names else [SUCCESS] * len(named)
        self._failed = {
            row: failure(state, None) for row, state in enumerate(status) if state != SUCCESS
        }
        sizes = [file.metadata.row_group(g).num_rows for g in range(file.num_row_groups)]
        self._starts = np.cumsum([0, *sizes])

    def caption(self, number: int) -> str | None:
        """The caption column."""
        row = self._rows[number]
        if row in self._failed:
            raise Unreadable(self._failed[row])
        column = self._columns["caption"]
        value = self._cell(row, column) if column else None
        return value if isinstance(value, str) else None

    def data(self, number: int) -> bytes:
        """The picture column."""
        value = self._cell(self._rows[number], str(self._columns["picture"]))
        if isinstance(value, dict):
            value = value.get("bytes")
        if not isinstance(value, bytes):
            raise Unreadable("there is no image in its row")
        return value

    def _cell(self, row: int, column: str) -> Any:
        group = int(np.searchsorted(self._starts, row, side="right")) - 1
        try:
            with self._lock:
                return self._group(group, column)[row - int(self._starts[group])].as_py()
        except (pa.ArrowException, ValueError) as error:
            raise Unreadable(f"{self._path.name} is damaged here") from error

    def _group(self, group: int, column: str) -> pa.ChunkedArray:
        """One column of a row group, of which the last few are kept."""
        held = self._held.pop((group, column), None)
        if held is None:
            if self._file is None:
                self._file = pq.ParquetFile(self._path)
            held = self._file.read_row_group(group, [column], use_threads=False)[column]
        self._held[group, column] = held
        while len(self._held) > 2 * _GROUPS_HELD:
            self._held.popitem(last=False)
        return held

    @staticmethod
    def _paths_in(file: pq.ParquetFile, picture: str) -> list[str | None]:
        """Hugging Face's image column may tell the file name that a picture had."""
        kind = file.schema_arrow.field(picture).type
        if not pa.types.is_struct(kind) or kind.get_field_index("path") < 0:
            return [None] * file.metadata.num_rows
        paths = file.read(columns=[f"{picture}.path"])[picture]
        return [value["path"] if value else None for value in paths.to_pylist()]

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


def picture_column(schema: pa.Schema) -> str | None:
    """The column that holds encoded pictures: named after the encoding, or a struct with bytes."""
    for name in (*PICTURE_SUFFIXES, "image"):
        index = schema.get_field_index(name)
        if index < 0:
            continue
        kind = schema.field(index).type
        if pa.types.is_binary(kind) or pa.types.is_large_binary(kind):
            return name
        if pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0:
            return name
    return None


def holds_pictures(table: Path) -> bool:
    """Whether a parquet file has a column of pictures; one that cannot be read may have."""
    try:
        return picture_column(pq.read_schema(table)) is not None
    except (OSError, pa.ArrowException):
        return True
