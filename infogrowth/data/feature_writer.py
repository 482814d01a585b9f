"""Writing feature shards in the clip-retrieval layout, shard by shard, resumable.

    img_emb/img_emb_00.npy  text_emb/text_emb_00.npy  metadata/metadata_00.parquet
    finished/00.json        skipped/00.jsonl          skipped.jsonl

A shard counts as finished once ``finished/{i}.json`` is there, which is written last.
"""

import json
import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from infogrowth.files import (
    TEMPORARY_MARK,
    atomic_write,
    atomic_write_array,
    atomic_write_json,
    read_json,
    remove_leftovers,
)

_FILES = {
    "img_emb": "img_emb/img_emb_{}.npy",
    "text_emb": "text_emb/text_emb_{}.npy",
    "metadata": "metadata/metadata_{}.parquet",
    "skipped": "skipped/{}.jsonl",
    "finished": "finished/{}.json",
}


class FeatureWriter:
    """Writes the shards of one features folder; many ranks may write different shards of it.

    Args:
        directory: FEATURES_DIR; made when missing.
        shards: how many shards are planned: it fixes the zero-padding of a new folder's file
            names; one that grows keeps the padding it has.
    """

    def __init__(self, directory: str | os.PathLike[str], shards: int = 100_000):
        self.directory = Path(directory)
        stems = [path.stem for path in self.directory.glob("finished/*.json")]
        widths = [len(stem) for stem in stems if stem.isdigit()]
        self.width = min(widths, default=len(str(max(shards - 1, 0))))

    def remove_leftovers(self, shards: Iterable[int] | None = None) -> None:
        """Delete temporary files of a killed run; call on one rank, before any rank writes.

        Args:
            shards: only those of these shards, where other jobs write the rest; None: all.
        """
        if shards is None:
            for folder in ("", *_FILES):
                remove_leftovers(self.directory / folder)
            return
        own = {self._path(kind, shard) for shard in shards for kind in _FILES}
        for path in self.directory.glob(f"*/*{TEMPORARY_MARK}*"):
            if path.with_name(path.name.partition(TEMPORARY_MARK)[0]) in own:
                path.unlink(missing_ok=True)

    def finished_shards(self) -> set[int]:
        """Numbers of the shards that are wholly written, all their files in place."""
        names = [path.stem for path in self.directory.glob("finished/*.json")]
        return {int(name) for name in names if name.isdigit() and self._is_whole(int(name))}

    def write_shard(
        self,
        index: int,
        ids: Sequence[str],
        captions: Sequence[str],
        image: np.ndarray | None,
        text: np.ndarray | None,
        extra: Mapping[str, Sequence[Any]] | None = None,
        skipped: Sequence[Mapping[str, str]] = (),
    ) -> None:
        """Write one shard; rows are brought to unit length and stored as float16.

        Args:
            index: the shard's number.
            ids, captions: ``image_path`` and ``caption`` of the n samples.
            image, text: ``(n, D)`` features, None for a space that the folder does not have.
            extra: more metadata columns, n values each.
            skipped: ``{"id", "reason"}`` of samples that got no features.

        Raises:
            UserError: the disk is full or not writable.
        """
        columns = {"image_path": list(ids), "caption": list(captions)}
        columns.update({name: list(values) for name, values in (extra or {}).items()})
        features = {"img_emb": image, "text_emb": text}
        arrays = {kind: rows for kind, rows in features.items() if rows is not None}
        lengths = {name: len(values) for name, values in columns.items()}
        lengths |= {kind: len(rows) for kind, rows in arrays.items()}
        if len(set(lengths.values())) != 1:
            raise ValueError(f"shard {index}: lengths differ: {lengths}")
        for kind, rows in arrays.items():
            atomic_write_array(self._path(kind, index), _half_unit_rows(rows))
        with atomic_write(self._path("metadata", index)) as file:
            pq.write_table(_metadata_table(columns), file)
        with atomic_write(self._path("skipped", index), "w") as file:
            file.writelines(_json_line(entry) for entry in skipped)
        files = [self._path(kind, index).relative_to(self.directory) for kind in arrays]
        files.append(self._path("metadata", index).relative_to(self.directory))
        marker = {"rows": len(ids), "files": sorted(map(str, files))}
        atomic_write_json(self._path("finished", index), marker)

    def merge_skipped(self) -> dict[str, int]:
        """Join the shards' skipped samples into skipped.jsonl; returns how many per reason."""
        counts: Counter[str] = Counter()
        with atomic_write(self.directory / "skipped.jsonl", "w") as merged:
            for index in sorted(self.finished_shards()):
                for entry in self._skipped(index):
                    counts[entry["reason"]] += 1
                    merged.write(_json_line(entry))
        return dict(counts)

    def samples(self, shards: Iterable[int]) -> tuple[list[tuple[str, str]], list[str]]:
        """(id, caption) of the samples that some shards hold, and the ids of those they skipped."""
        embedded: list[tuple[str, str]] = []
        skipped: list[str] = []
        for index in shards:
            table = pq.read_table(self._path("metadata", index))
            columns = (table[name].to_pylist() for name in ("image_path", "caption"))
            embedded += zip(*columns, strict=True)
            skipped += [entry["id"] for entry in self._skipped(index)]
        return embedded, skipped

    def rows(self) -> int:
        """Samples in the finished shards."""
        return sum(self._marker(index)["rows"] for index in self.finished_shards())

    def _is_whole(self, index: int) -> bool:
        return all((self.directory / name).is_file() for name in self._marker(index)["files"])

    def _marker(self, index: int) -> dict[str, Any]:
        return read_json(self._path("finished", index), "the finished marker")

    def _skipped(self, index: int) -> list[dict[str, str]]:
        return list(map(json.loads, self._path("skipped", index).read_bytes().splitlines()))

    def _path(self, kind: str, index: int) -> Path:
        return self.directory / _FILES[kind].format(f"{index:0{self.width}d}")


def _json_line(entry: Mapping[str, str]) -> str:
    return json.dumps(dict(entry), ensure_ascii=False) + "\n"


def _metadata_table(columns: dict[str, list[Any]]) -> pa.Table:
    arrays = {
        name: pa.array(values, pa.string()) if name in ("image_path", "caption") else values
        for name, values in columns.items()
    }
    return pa.table(arrays)


def _half_unit_rows(features: np.ndarray) -> np.ndarray:
    """Rows at unit length as float16; zero rows stay zero, bad rows stay bad for `grow` to see."""
    rows = np.asarray(features, np.float32)
    norms = np.sqrt(np.square(rows, dtype=np.float64).sum(axis=1, keepdims=True))
    with np.errstate(invalid="ignore", over="ignore"):
        return (rows / np.where(norms > 0, norms, 1)).astype(np.float16)
