"""Writes the same pairs in every layout that people have: key → (image, caption)."""

import io
import json
import tarfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

Pairs = dict[str, tuple[bytes, str]]
SHARD_SIZE = 6


def metadata_row(key: str, caption: str, status: str = "success") -> dict:
    return {
        "caption": caption,
        "url": f"https://example.org/{key}.jpg",
        "key": key,
        "status": status,
        "error_message": None if status == "success" else "HTTP Error 404",
        "width": 64,
        "height": 48,
    }


def failed_row(key: str, status: str) -> dict:
    return metadata_row(key, f"caption of {key}", status)


def write_stats(root: Path, shard: str) -> None:
    (root / f"{shard}_stats.json").write_text(json.dumps({"count": SHARD_SIZE}))


def add_member(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(content)
    tar.addfile(info, io.BytesIO(content))


def shards_of(pairs: Pairs) -> dict[str, list[str]]:
    """Keys by shard, within a shard in the reverse order: as if downloads had finished so."""
    keys = list(pairs)
    return {
        f"{number // SHARD_SIZE:05d}": keys[number : number + SHARD_SIZE][::-1]
        for number in range(0, len(keys), SHARD_SIZE)
    }


def write_table(root: Path, shard: str, keys: list[str], pairs: Pairs, failed: dict[str, str]):
    rows = [
        failed_row(key, failed[key]) if key in failed else metadata_row(key, pairs[key][1])
        for key in keys
    ]
    pq.write_table(pa.Table.from_pylist(rows), root / f"{shard}.parquet")
    write_stats(root, shard)


def write_files(root: Path, pairs: Pairs, failed: dict[str, str] | None = None) -> None:
    for shard, keys in shards_of(pairs).items():
        (root / shard).mkdir(parents=True)
        for key in keys:
            data, caption = pairs[key]
            row = metadata_row(key, caption, (failed or {}).get(key, "success"))
            (root / shard / f"{key}.json").write_text(json.dumps(row))
            if key not in (failed or {}):
                (root / shard / f"{key}.jpg").write_bytes(data)
                (root / shard / f"{key}.txt").write_text(caption)
        write_table(root, shard, keys, pairs, failed or {})


def write_webdataset(root: Path, pairs: Pairs, failed: dict[str, str] | None = None) -> None:
    root.mkdir(exist_ok=True)
    for shard, keys in shards_of(pairs).items():
        with tarfile.open(root / f"{shard}.tar", "w") as tar:
            for key in keys:
                if key in (failed or {}):
                    continue
                data, caption = pairs[key]
                add_member(tar, f"{key}.jpg", data)
                add_member(tar, f"{key}.txt", caption.encode())
                add_member(tar, f"{key}.json", json.dumps(metadata_row(key, caption)).encode())
        write_table(root, shard, keys, pairs, failed or {})


def write_parquet(root: Path, pairs: Pairs, failed: dict[str, str] | None = None) -> None:
    root.mkdir(exist_ok=True)
    for shard, keys in shards_of(pairs).items():
        rows = [
            {**failed_row(key, failed[key]), "jpg": None}
            if failed and key in failed
            else {**metadata_row(key, pairs[key][1]), "jpg": pairs[key][0]}
            for key in keys
        ]
        table = pa.Table.from_pylist(rows)
        pq.write_table(table, root / f"{shard}.parquet", row_group_size=2)
        write_stats(root, shard)


def write_flat(root: Path, pairs: Pairs) -> None:
    root.mkdir(exist_ok=True)
    for key, (data, caption) in pairs.items():
        (root / f"{key}.jpg").write_bytes(data)
        (root / f"{key}.json").write_text(json.dumps({"caption": caption, "url": "x"}))


def write_flat_txt(root: Path, pairs: Pairs) -> None:
    root.mkdir(exist_ok=True)
    for key, (data, caption) in pairs.items():
        (root / f"{key}.jpg").write_bytes(data)
        (root / f"{key}.txt").write_text(caption + "\n")


def write_imagefolder(root: Path, pairs: Pairs) -> None:
    root.mkdir(exist_ok=True)
    lines = []
    for key, (data, caption) in pairs.items():
        (root / f"{key}.jpg").write_bytes(data)
        lines.append(json.dumps({"file_name": f"{key}.jpg", "text": caption, "gain": 0.5}))
    (root / "metadata.jsonl").write_text("\n".join(reversed(lines)) + "\n")


def write_imagefolder_below_train(root: Path, pairs: Pairs) -> None:
    root.mkdir(exist_ok=True)
    write_imagefolder(root / "train", pairs)


LAYOUTS = {
    "files": write_files,
    "webdataset": write_webdataset,
    "parquet": write_parquet,
    "flat": write_flat,
    "flat with txt": write_flat_txt,
    "imagefolder": write_imagefolder,
    "imagefolder below train": write_imagefolder_below_train,
}
