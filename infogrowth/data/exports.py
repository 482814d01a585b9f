"""Writing a dataset in other people's formats; the ending of the file says which.

    .json     the result JSON (spec §3)          .npy    DataComp's subset of uids, dtype u8,u8
    .jsonl    Hugging Face's metadata.jsonl      .parquet  a table (of decisions, or of samples)

Everything is written as it streams by, so the size of the dataset is no matter.
"""

import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from infogrowth.annotations import Annotation, save_annotations
from infogrowth.errors import UserError
from infogrowth.files import atomic_write, atomic_write_array

ENDINGS = (".json", ".jsonl", ".npy", ".parquet")
_UID = re.compile(r"[0-9a-fA-F]{32}")
_HAS_ENDING = re.compile(r"\.[A-Za-z0-9]{2,5}$")


@dataclass(frozen=True)
class ExportChoices:
    """How to write.

    Attributes:
        legacy_strings: JSON gains as strings, as in the paper's published files.
        repeats: per sample, how often its uid is repeated in a ``.npy``; None for once each.
        file_ending: added to ids without a file ending, for ``file_name`` in a ``.jsonl``.
    """

    legacy_strings: bool = False
    repeats: np.ndarray | None = None
    file_ending: str = ".jpg"


def is_folder_output(path: str) -> bool:
    """Whether an output is a folder of shards: it ends in a slash or has no file ending."""
    return path.endswith("/") or not Path(path).suffix


def check_outputs(paths: Sequence[str], folders: bool = False) -> None:
    """Refuse no output, outputs of unknown kind, or named twice, before any work is done.

    Args:
        folders: whether folders of webdataset shards may be written too.
    """
    if not paths:
        raise UserError("output is empty: give --output at least one file")
    seen: set[str] = set()
    for path in paths:
        is_folder = folders and is_folder_output(path)
        if Path(path).suffix not in ENDINGS and not is_folder:
            or_folder = ", or be a folder for webdataset shards" if folders else ""
            raise UserError(f"--output {path} must end in one of {', '.join(ENDINGS)}{or_folder}")
        if Path(path).is_dir() and not is_folder:
            raise UserError(f"--output {path} is a folder; give a file")
        place = os.path.realpath(path)
        if place in seen:
            raise UserError(f"--output {path} is given twice")
        seen.add(place)


def write_export(
    path: str | os.PathLike[str],
    samples: Iterable[Annotation],
    choices: ExportChoices = ExportChoices(),
    tables: Callable[[], Iterator[pa.Table]] | None = None,
) -> None:
    """Write ``samples`` to ``path``, whole or not at all.

    Args:
        samples: ``{"image", "caption", "gains"}`` in order.
        tables: makes the rows of a ``.parquet``, all of one schema and at least one table; without
            it the samples themselves are written.

    Raises:
        UserError: an unknown ending, an id that is no DataComp uid (``.npy``), or a full disk.
    """
    check_outputs([str(path)])
    ending = Path(path).suffix
    if ending == ".json":
        save_annotations(path, samples, choices.legacy_strings)
    elif ending == ".jsonl":
        _write_lines(path, samples, choices.file_ending)
    elif ending == ".npy":
        _write_uids(path, samples, choices.repeats)
    else:
        _write_table(path, tables() if tables else iter([_sample_table(samples)]))


def as_column(values: list[Any]) -> pa.Array:
    """Values as a column; as JSON text where no column could hold them together."""
    try:
        return pa.array(values)
    except (pa.ArrowException, OverflowError):
        return pa.array([None if v is None else json.dumps(v, ensure_ascii=False) for v in values])


def uid_repeats(normalized_gains: np.ndarray, most: int) -> np.ndarray:
    """Repeats ``(N,) int64`` in 1 … ``most`` for gains in [0, 1]: 1 + round(gain · (most − 1))."""
    return 1 + np.rint(normalized_gains * (most - 1)).astype(np.int64)


def _write_lines(
    path: str | os.PathLike[str], samples: Iterable[Annotation], file_ending: str
) -> None:
    with atomic_write(path, "w") as file:
        for sample in samples:
            name = sample["image"]
            if not _HAS_ENDING.search(name):
                name += file_ending
            entry: dict[str, Any] = {"file_name": name, "text": sample["caption"]}
            if "gains" in sample:
                entry["gain"] = sum(sample["gains"]) / 2
            file.write(json.dumps(entry, ensure_ascii=False) + "\n")


def _write_uids(
    path: str | os.PathLike[str], samples: Iterable[Annotation], repeats: np.ndarray | None
) -> None:
    pairs = []
    for sample in samples:
        uid = sample["image"]
        if not _UID.fullmatch(uid):
            raise UserError(
                f"sample {uid!r} has no DataComp uid (32 hex digits) as its id, so {path} "
                "cannot be written; choose another --output"
            )
        pairs.append((int(uid[:16], 16), int(uid[16:], 16)))
    uids = np.array(pairs, dtype="u8,u8")
    if repeats is not None:
        uids = np.repeat(uids, repeats)
    uids.sort()
    atomic_write_array(path, uids)


def _write_table(path: str | os.PathLike[str], tables: Iterator[pa.Table]) -> None:
    first = next(tables)
    with atomic_write(path) as file, pq.ParquetWriter(file, first.schema) as writer:
        writer.write_table(first)
        for table in tables:
            writer.write_table(table)


def _sample_table(samples: Iterable[Annotation]) -> pa.Table:
    """The samples as a table; where one caption is a list, all are (a column has one type)."""
    rows = list(samples)
    captions = [row["caption"] for row in rows]
    if any(isinstance(caption, list) for caption in captions):
        captions = [c if isinstance(c, list) else [c] for c in captions]
    columns: dict[str, Any] = {"image": [row["image"] for row in rows], "caption": captions}
    if rows and all("gains" in row for row in rows):
        columns["gain_image"] = [row["gains"][0] for row in rows]
        columns["gain_text"] = [row["gains"][1] for row in rows]
    return pa.table(columns)
