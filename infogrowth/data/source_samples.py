"""What all layouts share: the sample, why it cannot be used, and the failures of a download."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from infogrowth.data.lmdb_store import ENDINGS

# The order in which one is chosen where a key has several pictures.
PICTURE_SUFFIXES = tuple(ending.removeprefix(".") for ending in ENDINGS)
CAPTION_KEYS = ("caption", "text", "TEXT")
SUCCESS = "success"

reason_without_caption = "the caption is missing or empty"


class Unreadable(Exception):
    """A sample that is listed but cannot be used; ``reason`` says why."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


@dataclass(frozen=True)
class Sample:
    """One pair as it lies there.

    Attributes:
        id: its key, without image ending.
        caption: None if there is none.
        data: the encoded picture; None if it cannot be had, or was not asked for.
        problem: why the sample cannot be used, else None.
    """

    id: str
    caption: str | None
    data: bytes | None
    problem: str | None


class MetadataFailures:
    """What img2dataset's table beside a shard says: which downloads failed and which did not.

    Attributes:
        failed: reason by key.
        succeeded: the keys that the shard must hold.
        notes: (table, reason) if there is a table that cannot be read.
    """

    def __init__(self, table: Path) -> None:
        self.failed: dict[str, str] = {}
        self.succeeded: set[str] = set()
        self.notes: list[tuple[str, str]] = []
        if not table.is_file():
            return
        try:
            schema = pq.read_schema(table)
            if not {"key", "status"} <= set(schema.names):
                return
            columns = [c for c in ("key", "status", "error_message") if c in schema.names]
            rows = pq.read_table(table, columns=columns).to_pylist()
        except (OSError, pa.ArrowException) as error:
            detail = " ".join(str(error).split())[:120]
            self.notes.append((table.name, f"the table cannot be read: {detail}"))
            return
        for row in rows:
            if row["status"] == SUCCESS:
                self.succeeded.add(row["key"])
            else:
                self.failed[row["key"]] = failure(row["status"], row.get("error_message"))


def failure(status: Any, message: Any) -> str:
    """The reason for a record: the kind of failure; the server's own words stay in the table."""
    words = {
        "failed_to_download": "the download failed",
        "failed_to_resize": "the image could not be resized when it was downloaded",
    }
    return words.get(status, f"the download ended with status {status!r}")


def caption_of(text: bytes | None, metadata: bytes | None) -> str | None:
    """The caption from a ``.txt`` and a ``.json``, whichever has one; the text comes first.

    Raises:
        Unreadable: what there is cannot be read.
    """
    if text is not None:
        try:
            caption = text.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise Unreadable("the caption is not UTF-8 text") from error
        if caption.strip():
            return caption
    if metadata is None:
        return None
    try:
        content = json.loads(metadata.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise Unreadable("the .json beside the image is not valid JSON") from error
    return caption_in(content)


def caption_in(content: Any) -> str | None:
    """The caption of a metadata record, under any of its usual names."""
    if not isinstance(content, dict):
        return None
    found = (content.get(key) for key in CAPTION_KEYS)
    return next((value for value in found if isinstance(value, str) and value.strip()), None)
