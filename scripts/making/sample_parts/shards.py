"""Pictures and captions in img2dataset's webdataset layout, byte for byte repeatable."""

import hashlib
import io
import json
import tarfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from infogrowth.files import atomic_write, atomic_write_json

# A date that never changes keeps the tar files the same in every run.
FIXED_TIME = 1_700_000_000


@dataclass(frozen=True)
class Picture:
    """One encoded picture with its caption, under its final key."""

    key: str
    caption: str
    url: str
    ending: str  # "jpg", "png" or "webp"
    data: bytes

    def metadata(self) -> dict[str, object]:
        """The row that img2dataset keeps for a downloaded picture."""
        with Image.open(io.BytesIO(self.data)) as image:
            width, height = image.size
        return {
            "caption": self.caption,
            "url": self.url,
            "key": self.key,
            "status": "success",
            "error_message": None,
            "width": width,
            "height": height,
            "original_width": width,
            "original_height": height,
            "exif": "{}",
            "sha256": hashlib.sha256(self.data).hexdigest(),
        }


_SCHEMA = pa.schema(
    [(name, pa.string()) for name in ("caption", "url", "key", "status", "error_message")]
    + [
        (f"{prefix}{side}", pa.int32())
        for prefix in ("", "original_")
        for side in ("width", "height")
    ]
    + [("exif", pa.string()), ("sha256", pa.string())]
)


def key_of(position: int, shard_size: int) -> str:
    """The 9-digit key of a position in the stream: 5 digits of shard, 4 within it."""
    shard, row = divmod(position, shard_size)
    return f"{shard:05d}{row:04d}"


def write_shards(folder: Path, pictures: Sequence[Picture], shard_size: int) -> None:
    """Write ``pictures``, whose keys count up from 0, as tar + parquet + stats per shard."""
    for start in range(0, len(pictures), shard_size):
        write_shard(folder, start // shard_size, pictures[start : start + shard_size])


def write_shard(folder: Path, index: int, pictures: Sequence[Picture]) -> None:
    """Write one shard; its stats file comes last, as the marker that it is complete."""
    rows = [picture.metadata() for picture in pictures]
    with (
        atomic_write(folder / f"{index:05d}.tar") as file,
        tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as tar,
    ):
        for picture, row in zip(pictures, rows, strict=True):
            _add(tar, f"{picture.key}.{picture.ending}", picture.data)
            _add(tar, f"{picture.key}.txt", picture.caption.encode())
            _add(tar, f"{picture.key}.json", json.dumps(row, ensure_ascii=False).encode())
    with atomic_write(folder / f"{index:05d}.parquet") as file:
        pq.write_table(pa.Table.from_pylist(rows, _SCHEMA), file, compression="zstd")
    count = len(rows)
    statistics = {
        "count": count,
        "successes": count,
        "failed_to_download": 0,
        "failed_to_resize": 0,
        "duration": 0.0,
        "start_time": float(FIXED_TIME),
        "end_time": float(FIXED_TIME),
        "status_dict": {"success": count},
    }
    atomic_write_json(folder / f"{index:05d}_stats.json", statistics, indent=1)


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size, member.mtime, member.mode = len(data), FIXED_TIME, 0o644
    tar.addfile(member, io.BytesIO(data))
