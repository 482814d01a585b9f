"""Selected samples as webdataset shards that open_clip and others train on, written by webdataset.

    00000.tar      KEY.jpg|png|…, KEY.txt and KEY.json (caption, gains, provenance) per sample
    00000.parquet  a row per sample: key, id, caption, status, error_message, gain, …; what could
                   not be written is here only, with its reason (as img2dataset does it)
    sizes.json     samples per shard, as open_clip looks for it; written last

A tar that is there is whole, so a run that was stopped goes on behind it, and ends with the same
bytes. KEY is the sample's id, percent-encoded where a tar or webdataset would misread it.
"""

import hashlib
import io
import itertools
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import quote

import pyarrow as pa
import pyarrow.parquet as pq
import webdataset
from PIL import Image
from tqdm import tqdm

from infogrowth.data.exports import as_column
from infogrowth.data.images import FORMATS, BadImage
from infogrowth.errors import UserError
from infogrowth.files import atomic_write, atomic_write_json, remove_leftovers

SIZES = "sizes.json"
_EXTENSIONS = {"JPEG": "jpg", "JPEG2000": "jp2", "TIFF": "tif"}  # else the format in small letters
_USUAL = ("jpg", "png", "webp")  # what open_clip's loader takes
_DIGEST = b"infogrowth.digest"


class EncodedImages(Protocol):
    """Encoded pictures by row."""

    def read(self, row: int) -> tuple[str, bytes]:
        """Caption and bytes; raises BadImage or UserError when there is no picture."""
        ...


@dataclass
class Written:
    """What was written: samples and shards in the folder, those that were there already, why
    samples were left out, and how many have a picture that common loaders pass over."""

    samples: int = 0
    shards: int = 0
    resumed: int = 0
    skipped: Counter[str] = field(default_factory=Counter)
    unusual: int = 0


def write_shards(
    directory: Path,
    rows: Iterable[Mapping[str, Any]],
    count: int,
    images: EncodedImages,
    shard_size: int,
    quiet: bool = False,
) -> Written:
    """Write ``count`` samples as shards of ``shard_size``.

    Args:
        rows: the samples in order: ``image`` (id), ``caption``, ``gain_image``, ``gain_text`` and
            whatever else belongs into their json.
        images: the picture of each row.

    Raises:
        UserError: the folder holds shards of another selection, or the disk is full.
    """
    shards = range(-(-count // shard_size))
    _refuse_others(directory, len(shards))
    written = Written(shards=len(shards))
    sizes: dict[str, int] = {}
    remaining = iter(rows)
    with tqdm(desc="shards", total=count, unit="sample", disable=quiet or None) as bar:
        for number in shards:
            part = list(itertools.islice(remaining, shard_size))
            tar = directory / f"{number:05d}.tar"
            table = _finished(tar, part)
            if table is None:
                table = _write_shard(tar, part, number * shard_size, images)
            else:
                written.resumed += 1
            status = table["status"].to_pylist()
            sizes[tar.name] = status.count("success")
            written.samples += sizes[tar.name]
            written.skipped.update(filter(None, table["error_message"].to_pylist()))
            extensions = filter(None, table["extension"].to_pylist())
            written.unusual += sum(extension not in _USUAL for extension in extensions)
            bar.update(len(part))
    atomic_write_json(directory / SIZES, sizes, indent=1)
    return written


def _refuse_others(directory: Path, shards: int) -> None:
    if directory.exists() and not directory.is_dir():
        raise UserError(f"--output {directory} is a file; give a folder for the shards")
    for folder in (directory,) if directory.is_dir() else ():
        remove_leftovers(folder)
        ours = {f"{number:05d}.{kind}" for number in range(shards) for kind in ("tar", "parquet")}
        other = sorted({path.name for path in folder.iterdir()} - ours - {SIZES})
        if other:
            raise UserError(
                f"--output {directory} holds {other[0]!r}, which is not of this selection; "
                "give an empty folder"
            )


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
    tar: Path, part: list[Mapping[str, Any]], first: int, images: EncodedImages
) -> pa.Table:
    told: list[dict[str, Any]] = []
    samples = _samples(part, first, images, told)
    with atomic_write(tar) as file:
        # The table is in place before the tar is: a tar that is there is whole.
        with webdataset.TarWriter(file, encoder=False, mtime=0, format="PAX_FORMAT") as writer:
            for sample in samples:
                writer.write(sample)
        names = dict.fromkeys(name for facts in told for name in facts)
        table = pa.table({name: as_column([facts.get(name) for facts in told]) for name in names})
        table = table.replace_schema_metadata({_DIGEST: _digest(part)})
        with atomic_write(tar.with_suffix(".parquet")) as beside:
            pq.write_table(table, beside)
    return table


def _samples(
    part: list[Mapping[str, Any]], first: int, images: EncodedImages, told: list[dict[str, Any]]
) -> Iterator[dict[str, Any]]:
    """The members of each sample that has a picture; every row is entered in ``told``."""
    for number, row in enumerate(part, start=first):
        captions = row["caption"] if isinstance(row["caption"], list) else [row["caption"]]
        key = shard_key(row["image"])
        gain = (row["gain_image"] + row["gain_text"]) / 2
        facts = {"key": key, "id": row["image"], "caption": captions[0], "gain": gain}
        facts |= {name: value for name, value in row.items() if name not in ("image", "caption")}
        if len(captions) > 1:
            facts["captions"] = captions
        extension, problem = None, None
        try:
            _, data = images.read(number)
            extension = _extension(data)
        except BadImage as error:
            problem = error.reason
        except UserError as error:
            problem = str(error)
        status = "success" if problem is None else "failed"
        outcome = {"status": status, "error_message": problem, "extension": extension}
        told.append({**facts, **outcome})
        if extension is not None:
            yield {
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
        raise BadImage("not an image that can be read") from error
    return _EXTENSIONS.get(kind, kind.lower())


def _digest(part: list[Mapping[str, Any]]) -> bytes:
    digest = hashlib.blake2b(digest_size=16)
    for row in part:
        digest.update(json.dumps(row, ensure_ascii=False).encode() + b"\n")
    return digest.hexdigest().encode()
