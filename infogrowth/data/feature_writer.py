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

_FOLDERS = ("img_emb", "text_emb", "metadata", "finished", "skipped")


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
            for folder in ("", *_FOLDERS):
                remove_leftovers(self.directory / folder)
            return
        numbers = {self._number(index) for index in shards}
        for path in self.directory.glob(f"*/*{TEMPORARY_MARK}*"):
            name = Path(path.name.partition(TEMPORARY_MARK)[0]).stem
            if name.rpartition("_")[2] in numbers:
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
        lengths = {name: len(values) for name, values in columns.items()}
        files: dict[str, str] = {}
        for name, features in (("img_emb", image), ("text_emb", text)):
            if features is not None:
                lengths[name] = len(features)
                files[name] = self._name(name, index)
        if len(set(lengths.values())) != 1:
            raise ValueError(f"shard {index}: lengths differ: {lengths}")
        for name, features in (("img_emb", image), ("text_emb", text)):
            if features is not None:
                atomic_write_array(self.directory / files[name], _half_unit_rows(features))
        files["metadata"] = self._name("metadata", index)
        with atomic_write(self.directory / files["metadata"]) as file:
            pq.write_table(_metadata_table(columns), file)
        with atomic_write(self._skipped_file(index), "w") as file:
            file.writelines(_json_line(entry) for entry in skipped)
        marker = {"rows": len(ids), "files": sorted(files.values())}
        atomic_write_json(self._marker(index), marker)

    def merge_skipped(self) -> dict[str, int]:
        """Join the shards' skipped samples into skipped.jsonl; returns how many per reason."""
        counts: Counter[str] = Counter()
        with atomic_write(self.directory / "skipped.jsonl", "w") as merged:
            for index in sorted(self.finished_shards()):
                for line in self._skipped_file(index).read_bytes().splitlines():
                    entry = json.loads(line)
                    counts[entry["reason"]] += 1
                    merged.write(_json_line(entry))
        return dict(counts)

    def samples(self, shards: Iterable[int]) -> tuple[list[tuple[str, str]], list[str]]:
        """(id, caption) of the samples that some shards hold, and the ids of those they skipped."""
        embedded: list[tuple[str, str]] = []
        skipped: list[str] = []
        for index in shards:
            table = pq.read_table(self.directory / self._name("metadata", index))
            columns = (table[name].to_pylist() for name in ("image_path", "caption"))
            embedded += zip(*columns, strict=True)
            lines = self._skipped_file(index).read_bytes().splitlines()
            skipped += [json.loads(line)["id"] for line in lines]
        return embedded, skipped

    def rows(self) -> int:
        """Samples in the finished shards."""
        markers = (read_json(self._marker(index)) for index in self.finished_shards())
        return sum(marker["rows"] for marker in markers)

    def _is_whole(self, index: int) -> bool:
        marker = read_json(self._marker(index), "the finished marker")
        return all((self.directory / name).is_file() for name in marker["files"])

    def _number(self, index: int) -> str:
        return f"{index:0{self.width}d}"

    def _name(self, kind: str, index: int) -> str:
        extension = "parquet" if kind == "metadata" else "npy"
        return f"{kind}/{kind}_{self._number(index)}.{extension}"

    def _marker(self, index: int) -> Path:
        return self.directory / "finished" / f"{self._number(index)}.json"

    def _skipped_file(self, index: int) -> Path:
        return self.directory / "skipped" / f"{self._number(index)}.jsonl"


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
