"""Layouts of single files: img2dataset's folders, the paper's flat folder, Hugging Face's."""

import csv
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from infogrowth.data.lmdb_store import ENDINGS, strip_ending
from infogrowth.data.source_samples import (
    MetadataFailures,
    Unreadable,
    caption_in,
    caption_of,
)
from infogrowth.errors import UserError


class FilesShard:
    """One folder of ``{key}.jpg``, ``{key}.txt``, ``{key}.json``; failed downloads are samples too.

    Two pictures of one key (``x.jpg``, ``x.png``) are two samples of one id.

    Args:
        folder: where the files are.
        failures: what the table beside the folder says.
        ignore: file names that are not part of it.
    """

    def __init__(
        self, folder: Path, failures: MetadataFailures, ignore: Sequence[str] = ()
    ) -> None:
        self._folder, self._failed, self.notes = folder, failures.failed, failures.notes
        pictures, captioned = _listing(folder, ignore)
        # A caption without a picture is a sample with a problem; so is a picture that is promised.
        lacking = (captioned | failures.failed.keys() | failures.succeeded) - {
            key for key, _ in pictures
        }
        listed = sorted([*pictures, *((key, "") for key in lacking)])
        self.ids = [key for key, _ in listed]
        self._files = [file for _, file in listed]

    def caption(self, number: int) -> str | None:
        """The caption of the ``.txt``, else of the ``.json``."""
        key = self.ids[number]
        if not self._files[number] and key in self._failed:
            raise Unreadable(self._failed[key])
        return caption_of(self._beside(key, ".txt"), self._beside(key, ".json"))

    def data(self, number: int) -> bytes:
        """The encoded picture."""
        if not self._files[number]:
            raise Unreadable("there is no image beside the caption")
        return (self._folder / self._files[number]).read_bytes()

    def _beside(self, key: str, suffix: str) -> bytes | None:
        try:
            return (self._folder / (key + suffix)).read_bytes()
        except FileNotFoundError:
            return None


def flat_folder(folder: Path, ignore: Sequence[str]) -> FilesShard:
    """The paper's layout: all pictures in one folder, without a downloader's table."""
    return FilesShard(folder, MetadataFailures(folder / "no table"), ignore)


def has_pictures(folder: Path) -> bool:
    """Whether a folder directly holds a picture file, going by the names."""
    with os.scandir(folder) as entries:
        return any(_is_picture(entry.name) for entry in entries)


class ImageFolderShard:
    """Hugging Face's imagefolder: a metadata file names the pictures and gives their captions.

    Ids are the paths as the file gives them, without image ending. Pictures in the folder that it
    does not name are samples without a caption.

    Raises:
        UserError: the metadata file cannot be read, or has no ``file_name``.
    """

    def __init__(self, folder: Path, metadata: Path) -> None:
        self._folder = folder
        self.notes: list[tuple[str, str]] = []
        listed: list[tuple[str, str, str | None]] = []
        for number, record in enumerate(_records(metadata), 1):
            name = record.get("file_name") if isinstance(record, dict) else None
            if not isinstance(name, str) or not name:
                self.notes.append((f"{metadata.name}:{number}", "the line names no file_name"))
                continue
            name = str(PurePosixPath(name))
            listed.append((strip_ending(name), name, caption_in(record)))
        if not listed and self.notes:
            raise UserError(f"{metadata} names no picture: its lines need the key file_name")
        named = {name for _, name, _ in listed}
        extra = [name for name in _pictures_below(folder) if name not in named]
        listed.extend((strip_ending(name), name, None) for name in extra)
        listed.sort(key=lambda row: row[:2])
        self.ids = [row[0] for row in listed]
        self._rows = listed

    def caption(self, number: int) -> str | None:
        """The caption that the metadata file gives."""
        return self._rows[number][2]

    def data(self, number: int) -> bytes:
        """The encoded picture."""
        name = self._rows[number][1]
        if name.startswith("/") or ".." in PurePosixPath(name).parts:
            raise Unreadable("its file_name leads out of the folder")
        try:
            return (self._folder / name).read_bytes()
        except (FileNotFoundError, ValueError) as error:
            raise Unreadable("the file that the metadata names is missing") from error


def _listing(folder: Path, ignore: Sequence[str]) -> tuple[list[tuple[str, str]], set[str]]:
    """Pictures as (key, file name), and the keys that have a caption file."""
    pictures, captioned = [], set()
    with os.scandir(folder) as entries:
        for entry in entries:
            name = entry.name
            if name in ignore or name.startswith("."):
                continue
            if _is_picture(name):
                pictures.append((strip_ending(name), name))
            elif name.endswith((".txt", ".json")):
                captioned.add(name.rsplit(".", 1)[0])
    return pictures, captioned


def _pictures_below(folder: Path) -> Iterator[str]:
    for place, _, files in os.walk(folder):
        for name in files:
            if _is_picture(name):
                yield (Path(place) / name).relative_to(folder).as_posix()


def _is_picture(name: str) -> bool:
    return name.lower().endswith(ENDINGS) and not name.startswith(".")


def _records(metadata: Path) -> Iterator[Any]:
    """The lines of a metadata file; a line that is not JSON comes as None."""
    try:
        if metadata.suffix == ".parquet":
            yield from pq.read_table(metadata).to_pylist()
        elif metadata.suffix == ".csv":
            with open(metadata, encoding="utf-8-sig", newline="") as file:
                yield from csv.DictReader(file)
        else:
            with open(metadata, encoding="utf-8-sig") as file:
                for line in file:
                    if line.strip():
                        yield _parsed(line)
    except (OSError, UnicodeDecodeError, csv.Error, pa.ArrowException) as error:
        detail = " ".join(str(error).split())[:120]
        raise UserError(f"the metadata file {metadata} cannot be read: {detail}") from error


def _parsed(line: str) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        return None
