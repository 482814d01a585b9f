"""Writing a dataset in other people's formats; the extension of the output says which.

    .json     the result JSON (docs/contract.md §3)    .npy      DataComp's subset, dtype u8,u8
    .jsonl    Hugging Face's metadata.jsonl            .parquet  a table of decisions or samples

A folder gets webdataset shards, which open_clip and others train on:

    00000.tar      KEY.jpg|png|…, KEY.txt and KEY.json (caption, gains, provenance) per sample
    00000.parquet  a row per sample: key, id, caption, status, error_message, gain, …; what could
                   not be written is here only, with its reason (as img2dataset does it)
    sizes.json     samples per shard, as open_clip looks for it; written last

A tar that is there is whole, so a run that was stopped goes on behind it, and ends with the same
bytes. KEY is the sample's id, percent-encoded where a tar or webdataset would misread it.
Everything is written as it streams by, so the size of the dataset is no matter.
"""

import hashlib
import io
import itertools
import json
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image
from tqdm import tqdm

from infogrowth.annotations import Annotation, save_annotations
from infogrowth.data.images import FORMATS
from infogrowth.errors import BadSample, UserError
from infogrowth.files import atomic_write, atomic_write_array, atomic_write_json, remove_leftovers

_FILES = (".json", ".jsonl", ".npy", ".parquet")
_SIZES = "sizes.json"
_UID = re.compile(r"[0-9a-fA-F]{32}")
_HAS_EXTENSION = re.compile(r"\.[A-Za-z0-9]{2,5}$")
_EXTENSIONS = {"JPEG": "jpg", "JPEG2000": "jp2", "TIFF": "tif"}  # else the format in small letters
_USUAL = ("jpg", "png", "webp")  # what open_clip's loader takes
_DIGEST = b"infogrowth.digest"


def is_folder_output(path: str) -> bool:
    """Whether an output is a folder of shards: it ends in a slash or has no file extension."""
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
        if Path(path).suffix not in _FILES and not is_folder:
            or_folder = ", or be a folder for webdataset shards" if folders else ""
            raise UserError(f"--output {path} must end in one of {', '.join(_FILES)}{or_folder}")
        if Path(path).is_dir() and not is_folder:
            raise UserError(f"--output {path} is a folder; give a file")
        if (real_path := os.path.realpath(path)) in seen:
            raise UserError(f"--output {path} is given twice")
        seen.add(real_path)


def write_export(
    path: str | os.PathLike[str],
    samples: Iterable[Annotation],
    tables: Callable[[], Iterator[pa.Table]] | None = None,
    legacy_strings: bool = False,
    repeats: Callable[[], np.ndarray] | None = None,
    extension: str = ".jpg",
) -> None:
    """Write ``samples`` to a file, whole or not at all.

    Args:
        samples: ``{"image", "caption", "gains"}`` in order.
        tables: makes the rows of a ``.parquet``, all of one schema and at least one table; without
            it the samples themselves are written.
        legacy_strings: JSON gains as strings, as in the paper's published files.
        repeats: makes, per sample, how often its uid is repeated in a ``.npy``; None: once each.
        extension: added to ids without one, for ``file_name`` in a ``.jsonl``.

    Raises:
        UserError: an unknown extension, an id that is no DataComp uid (``.npy``), or a full disk.
    """
    check_outputs([str(path)])
    kind = Path(path).suffix
    if kind == ".json":
        save_annotations(path, samples, legacy_strings)
    elif kind == ".jsonl":
        with atomic_write(path, "w") as file:
            for sample in samples:
                name = sample["image"]
                name += "" if _HAS_EXTENSION.search(name) else extension
                entry: dict[str, Any] = {"file_name": name, "text": sample["caption"]}
                if "gains" in sample:
                    entry["gain"] = sum(sample["gains"]) / 2
                file.write(json.dumps(entry, ensure_ascii=False) + "\n")
    elif kind == ".npy":
        names = [sample["image"] for sample in samples]
        for name in names:
            if not _UID.fullmatch(name):
                raise UserError(
                    f"sample {name!r} has no DataComp uid (32 hex digits) as its id, so {path} "
                    "cannot be written; choose another --output"
                )
        uids = np.array([(int(n[:16], 16), int(n[16:], 16)) for n in names], dtype="u8,u8")
        if repeats is not None:
            uids = np.repeat(uids, repeats())
        uids.sort()
        atomic_write_array(path, uids)
    else:
        parts = tables() if tables else iter([_sample_table(samples)])
        first = next(parts)
        with atomic_write(path) as file, pq.ParquetWriter(file, first.schema) as writer:
            for table in itertools.chain([first], parts):
                writer.write_table(table)


def as_column(values: list[Any]) -> pa.Array:
    """Values as a column; as JSON text where no column could hold them together."""
    try:
        return pa.array(values)
    except (pa.ArrowException, OverflowError):
        return pa.array([None if v is None else json.dumps(v, ensure_ascii=False) for v in values])


def uid_repeats(normalized_gains: np.ndarray, max_repeats: int) -> np.ndarray:
    """Repeats ``(N,) int64`` for gains in [0, 1]: 1 + round(gain · (max_repeats − 1))."""
    return 1 + np.rint(normalized_gains * (max_repeats - 1)).astype(np.int64)


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


# --- webdataset shards ----------------------------------------------------------------------------


@dataclass
class Written:
    """What was written: samples and shards in the folder, those that were there already, why
    samples were left out, and how many have an image that common loaders pass over."""

    samples: int = 0
    shards: int = 0
    resumed: int = 0
    skipped: Counter[str] = field(default_factory=Counter)
    unusual: int = 0


def write_shards(
    directory: Path,
    rows: Iterable[Mapping[str, Any]],
    count: int,
    read: Callable[[str], bytes],
    shard_size: int,
    quiet: bool = False,
) -> Written:
    """Write ``count`` samples as shards of ``shard_size``.

    Args:
        rows: the samples in order: ``image`` (id), ``caption``, ``gain_image``, ``gain_text`` and
            whatever else belongs into their json.
        read: the encoded image of an id; raises BadSample or UserError where there is none.

    Raises:
        UserError: the folder holds shards of another selection, or the disk is full.
    """
    shards = range(-(-count // shard_size))
    if directory.exists():
        remove_leftovers(directory)
        ours = {f"{number:05d}.{kind}" for number in shards for kind in ("tar", "parquet")}
        if other := sorted({path.name for path in directory.iterdir()} - ours - {_SIZES}):
            raise UserError(
                f"--output {directory} holds {other[0]!r}, which is not of this selection; "
                "give an empty folder"
            )
    written = Written(shards=len(shards))
    sizes: dict[str, int] = {}
    remaining = iter(rows)
    with tqdm(desc="shards", total=count, unit="sample", disable=quiet or None) as bar:
        for number in shards:
            part = list(itertools.islice(remaining, shard_size))
            tar = directory / f"{number:05d}.tar"
            table = _finished(tar, part)
            if table is None:
                table = _write_shard(tar, part, read)
            else:
                written.resumed += 1
            status = table["status"].to_pylist()
            sizes[tar.name] = status.count("success")
            written.samples += sizes[tar.name]
            written.skipped.update(filter(None, table["error_message"].to_pylist()))
            extensions = filter(None, table["extension"].to_pylist())
            written.unusual += sum(extension not in _USUAL for extension in extensions)
            bar.update(len(part))
    atomic_write_json(directory / _SIZES, sizes, indent=1)
    return written


def _finished(tar: Path, part: list[Mapping[str, Any]]) -> pa.Table | None:
    """The table of a shard that an earlier run wrote; None when it is still to be written."""
    if not tar.is_file():
        return None
    try:
        table = pq.read_table(tar.with_suffix(".parquet"))
    except (OSError, pa.ArrowException):
        return None
    if (table.schema.metadata or {}).get(_DIGEST) != _digest(part):
        raise UserError(f"{tar} is of another selection; give --output an empty folder")
    return table


def _write_shard(
    tar: Path, part: list[Mapping[str, Any]], read: Callable[[str], bytes]
) -> pa.Table:
    import webdataset

    rows: list[dict[str, Any]] = []
    with atomic_write(tar) as file:
        # The table is in place before the tar is: a tar that is there is whole.
        with webdataset.TarWriter(file, encoder=False, mtime=0, format="PAX_FORMAT") as writer:
            for sample in part:
                facts, members = _members(sample, read)
                rows.append(facts)
                if members:
                    writer.write(members)
        names = dict.fromkeys(name for facts in rows for name in facts)
        table = pa.table({name: as_column([facts.get(name) for facts in rows]) for name in names})
        table = table.replace_schema_metadata({_DIGEST: _digest(part)})
        with atomic_write(tar.with_suffix(".parquet")) as beside:
            pq.write_table(table, beside)
    return table


def _members(
    sample: Mapping[str, Any], read: Callable[[str], bytes]
) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """A sample's row in the table, and its members in the tar; None if it has no image."""
    captions = sample["caption"] if isinstance(sample["caption"], list) else [sample["caption"]]
    key = shard_key(sample["image"])
    gain = (sample["gain_image"] + sample["gain_text"]) / 2
    facts = {"key": key, "id": sample["image"], "caption": captions[0], "gain": gain}
    facts |= {name: value for name, value in sample.items() if name not in ("image", "caption")}
    if len(captions) > 1:
        facts["captions"] = captions
    try:
        data = read(sample["image"])
        extension = _extension(data)
    except (BadSample, UserError) as error:
        return {**facts, "status": "failed", "error_message": str(error), "extension": None}, None
    return {**facts, "status": "success", "error_message": None, "extension": extension}, {
        "__key__": key,
        extension: data,
        "txt": captions[0].encode(),
        "json": json.dumps(facts, ensure_ascii=False, allow_nan=False).encode(),
    }


def shard_key(sample_id: str) -> str:
    """An id as a key of webdataset: no dots (an extension would begin there) and no slashes."""
    return quote(sample_id, safe="").replace(".", "%2E").replace("~", "%7E")


def _extension(data: bytes) -> str:
    try:
        kind = str(Image.open(io.BytesIO(data), formats=FORMATS).format)
    except Exception as error:  # a decoder may say anything to hostile bytes
        raise BadSample("not an image that can be read") from error
    return _EXTENSIONS.get(kind, kind.lower())


def _digest(part: list[Mapping[str, Any]]) -> bytes:
    digest = hashlib.blake2b(digest_size=16)
    for row in part:
        digest.update(json.dumps(row, ensure_ascii=False).encode() + b"\n")
    return digest.hexdigest().encode()
