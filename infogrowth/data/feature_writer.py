"""Writing features in the clip-retrieval layout, shard by shard, resumable, by one job or by many:

    img_emb/img_emb_00.npy  text_emb/text_emb_00.npy  metadata/metadata_00.parquet
    finished/00.json        skipped/00.jsonl          skipped.jsonl     features.json

A shard counts as finished once ``finished/{i}.json`` is there, which is written last; it is never
made again. How a dataset is split depends on the dataset alone, never on the number of ranks or
jobs, so the files are the same bytes however many made them and however often they were
interrupted. Ranks claim the next shard when they are free.
"""

import json
import logging
import os
import re
import secrets
import socket
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from infogrowth import distributed
from infogrowth.errors import UserError
from infogrowth.files import (
    TEMPORARY_MARK,
    atomic_write,
    atomic_write_array,
    atomic_write_json,
    read_json,
)

logger = logging.getLogger(__name__)

_FILES = {
    "img_emb": "img_emb/img_emb_{}.npy",
    "text_emb": "text_emb/text_emb_{}.npy",
    "metadata": "metadata/metadata_{}.parquet",
    "skipped": "skipped/{}.jsonl",
    "finished": "finished/{}.json",
}
# What a run and its continuation must agree on, and how the error calls it.
_COMPARED = {
    "kind": "command",
    "encoder": "encoder",
    "samples": "annotation file, source or choice of samples",
    "rows": "number of samples",
    "shard_size": "shard size",
    "captioner": "captioner",
}
_MAX_ROWS, _MIN_ROWS, _WANTED_SHARDS = 10_000, 256, 64
# Seconds for which a network file system may show a node an old list of another node's files.
_LISTING_DELAY = 60.0


def write_shard(
    directory: Path,
    name: str,
    ids: Sequence[str],
    captions: Sequence[str],
    image: np.ndarray | None,
    text: np.ndarray | None,
    extra: Mapping[str, Sequence[Any]] | None = None,
    skipped: Sequence[Mapping[str, str]] = (),
) -> None:
    """Write one shard of a features folder; rows are brought to unit length and stored as float16.

    Args:
        name: the shard's number, with the zeros that make all of one width.
        ids, captions: ``image_path`` and ``caption`` of the n samples.
        image, text: ``(n, D)`` features, None for a space that the folder does not have.
        extra: more metadata columns, n values each.
        skipped: ``{"id", "reason"}`` of samples that got no features.

    Raises:
        UserError: the disk is full or not writable.
    """
    files = {kind: directory / file.format(name) for kind, file in _FILES.items()}
    features = {"img_emb": image, "text_emb": text}
    arrays = {kind: rows for kind, rows in features.items() if rows is not None}
    texts = {"image_path": ids, "caption": captions}
    columns: dict[str, Any] = {k: pa.array(v, pa.string()) for k, v in texts.items()}
    columns |= {name: list(values) for name, values in (extra or {}).items()}
    for kind, features_ND in arrays.items():
        rows = np.asarray(features_ND, np.float32)
        norms = np.sqrt(np.square(rows, dtype=np.float64).sum(axis=1, keepdims=True))
        # Zero rows stay zero, bad rows stay bad for `grow` to see.
        with np.errstate(invalid="ignore", over="ignore"):
            halves = (rows / np.where(norms > 0, norms, 1)).astype(np.float16)
        atomic_write_array(files[kind], halves)
    with atomic_write(files["metadata"]) as file:
        pq.write_table(pa.table(columns), file)
    with atomic_write(files["skipped"], "w") as file:
        file.writelines(map(_json_line, skipped))
    written = sorted(_FILES[kind].format(name) for kind in (*arrays, "metadata"))
    atomic_write_json(files["finished"], {"rows": len(ids), "files": written})


def finished_shards(directory: Path) -> dict[int, int]:
    """Rows by number of the shards that are wholly written, all their files in place."""
    found = {}
    for path in _markers(directory):
        marker = read_json(path, "the finished marker")
        if all((directory / file).is_file() for file in marker["files"]):
            found[int(path.stem)] = marker["rows"]
    return found


def _markers(directory: Path) -> list[Path]:
    return [path for path in directory.glob("finished/*.json") if path.stem.isdigit()]


def _json_line(entry: Mapping[str, str]) -> str:
    return json.dumps(dict(entry), ensure_ascii=False) + "\n"


def automatic_shard_size(rows: int) -> int:
    """Samples per shard: about 64 shards, of 256 to 10,000 samples.

    A shard is what a killed run loses, and what ranks divide among themselves.
    """
    return max(_MIN_ROWS, min(_MAX_ROWS, -(-rows // _WANTED_SHARDS)))


class FeatureWriter:
    """A features folder that is filled with a dataset, by the ranks of one job or of several.

    Args:
        directory: the folder, new or from an earlier run of the same job; all ranks see it.
        identity: what the features depend on, in JSON types; goes to features.json. "kind",
            "encoder", "samples" and "captioner" may not differ between runs; a value that is a
            mapping with a ``fingerprint`` is compared by that alone.
        rows: how many samples.
        shard_size: how many to a shard; None chooses.
        part: (2, 16) for the third of 16 independent jobs that share the folder.
        samples: (id, caption) of every row, or (id, None), where the folder may have been made
            from fewer of them: shards for the new ones are added to it, the others stay.

    Attributes:
        finished: whether there was nothing left to do.
        shards: the rows of every shard; none for shards of an earlier run on fewer samples.
        pending: the shards that this job has to make.

    Raises:
        UserError: the folder was made from something else, with the difference named; a node of
            the launch that does not see it.
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        identity: Mapping[str, Any],
        rows: int,
        shard_size: int | None = None,
        part: tuple[int, int] = (0, 1),
        samples: Sequence[tuple[str, str | None]] | None = None,
    ) -> None:
        self.directory = Path(directory)
        size = shard_size or automatic_shard_size(rows)
        self.identity = {**identity, "rows": rows, "shard_size": size}
        self._samples, self._part = samples, part
        self._claims = f"shards {distributed.on_main(lambda: secrets.token_hex(8))}"
        self.finished, self.shards, self.pending, self._width = distributed.on_main(self._open)
        if self.finished:
            logger.info("%s is finished already: nothing to do", self.directory)
        if distributed.world_size() > 1:
            self._refuse_separate_disks()

    def claim(self) -> Iterator[tuple[int, Sequence[int]]]:
        """Pending shards, number and rows, one by one; no other rank of the launch gets the same.

        The next is claimed when the one before is done, so that a slow rank takes fewer.
        """
        while (turn := distributed.next_number(self._claims)) < len(self.pending):
            number = self.pending[turn]
            yield number, self.shards[number]

    def name(self, number: int) -> str:
        """A shard's number as its files have it; a folder that grows keeps the zeros it has."""
        return f"{number:0{self._width}d}"

    def finish(self) -> dict[str, Any]:
        """Wait for all ranks; once every shard is there, join what was skipped and mark the folder.

        Returns:
            the description: what features.json holds.

        Raises:
            UserError: shards of this job are missing.
        """
        distributed.barrier()
        return distributed.on_main(self._complete)

    def _open(self) -> tuple[bool, list[Sequence[int]], list[int], int]:
        """What is finished, all shards, which are left, and the width of their numbers; brings
        features.json up to that (rank 0)."""
        path, what = self.directory / "features.json", "the description of the features"
        existing = read_json(path, what, dict) if path.is_file() else {}
        if not existing and (self.directory.is_file() or any(self.directory.glob("*_emb"))):
            raise UserError(f"{self.directory} holds something else; give --output another folder")
        self._width = min((len(marker.stem) for marker in _markers(self.directory)), default=0)
        earlier = self._earlier(existing) if existing else []
        shards = self._split(earlier)
        self._width = self._width or len(str(max(len(shards) - 1, 0)))
        self.identity["shards"] = len(shards)
        if earlier:
            self.identity["earlier_shards"] = earlier
        self._description = existing
        done = finished_shards(self.directory)
        first, step = self._part
        own = range(first, len(shards), step)
        finished = existing.get("finished") is True and len(done) == len(shards)
        if not finished:
            self.directory.mkdir(parents=True, exist_ok=True)
            for path in self.directory.rglob(f"*{TEMPORARY_MARK}*"):
                # Other jobs that share the folder are perhaps writing: only this one's go.
                shard = re.search(r"(\d+)\.\w+$", path.name.partition(TEMPORARY_MARK)[0])
                if step == 1 or (shard and int(shard[1]) in own):
                    path.unlink(missing_ok=True)
            self._describe(finished=False)
        return finished, shards, [number for number in own if number not in done], self._width

    def _earlier(self, existing: Mapping[str, Any]) -> list[int]:
        """The shards that were made before the dataset grew; refuses a folder of something else."""
        grown = self._samples is not None and existing.get("samples") != self.identity.get(
            "samples"
        )
        for key, called in _COMPARED.items():
            there, here = existing.get(key), self.identity.get(key)
            may_differ = grown and key in ("samples", "rows", "shard_size")
            if not may_differ and _fingerprint(there) != _fingerprint(here):
                raise UserError(
                    f"{self.directory} was made with another {called}: {_readable(there)} there, "
                    f"{_readable(here)} now; give --output another folder"
                )
        if not grown:
            return existing.get("earlier_shards", [])
        containers = self.identity.get("containers", {})
        for name, version in existing.get("containers", {}).items():
            if containers.get(name) != version:
                raise UserError(
                    f"{name} is not what it was when {self.directory} was made: its images "
                    "may have changed; give --output another folder"
                )
        logger.info("%s: embedding what is new", self.directory)
        return sorted(finished_shards(self.directory))

    def _describe(self, **state: Any) -> None:
        """Bring features.json up to date."""
        before, self._description = self._description, {**self.identity, **state}
        if self._description != before:
            atomic_write_json(self.directory / "features.json", self._description, indent=2)

    def _split(self, earlier: Sequence[int]) -> list[Sequence[int]]:
        """Rows by shard; those of earlier shards are theirs already, so they get none."""
        size = self.identity["shard_size"]
        new = self._new_rows(earlier) if earlier else range(self.identity["rows"])
        parts = [new[start : start + size] for start in range(0, len(new), size)]
        shards: list[Sequence[int]] = [()] * (max(earlier, default=0) + 1)
        free = [number for number in range(len(shards)) if number not in earlier]
        for number, part in zip(free, parts, strict=False):
            shards[number] = part
        return shards + parts[len(free) :]

    def _new_rows(self, earlier: Sequence[int]) -> list[int]:
        """Rows that no earlier shard holds.

        Raises:
            UserError: an earlier shard holds a sample that is gone or has another caption.
        """
        assert self._samples is not None
        with_captions = any(caption is not None for _, caption in self._samples)
        embedded: Counter[tuple[str, str | None]] = Counter()
        unused: Counter[str] = Counter()
        for index in earlier:
            metadata = self.directory / _FILES["metadata"].format(self.name(index))
            table = pq.read_table(metadata, columns=["image_path", "caption"])
            ids, captions = (column.to_pylist() for column in table.columns)
            known = captions if with_captions else [None] * len(ids)
            embedded.update(zip(ids, known, strict=True))
            unused.update(entry["id"] for entry in self._skipped(index))
        new: list[int] = []
        for row, sample in enumerate(self._samples):
            if embedded[sample] > 0:
                embedded[sample] -= 1
            elif unused[sample[0]] > 0:
                unused[sample[0]] -= 1
            else:
                new.append(row)
        for name, _ in embedded.elements():
            raise UserError(
                f"{self.directory} was made with another {_COMPARED['samples']}: its sample "
                f"{name!r} is gone or has another caption now; give --output another folder"
            )
        return new

    def _skipped(self, index: int) -> list[dict[str, str]]:
        path = self.directory / _FILES["skipped"].format(self.name(index))
        return list(map(json.loads, path.read_bytes().splitlines()))

    def _refuse_separate_disks(self) -> None:
        """Every rank must find what rank 0 writes, or shards would be missing in the end."""
        probe = self.directory / f"seen-by-all{TEMPORARY_MARK}{self._claims[-16:]}"
        distributed.on_main(probe.touch)
        ranks = distributed.all_gather_objects((socket.gethostname(), probe.exists()))

        def check() -> None:
            probe.unlink()
            for number, (node, sees) in enumerate(ranks):
                if not sees:
                    raise UserError(
                        f"rank {number} on {node} does not see the folder {self.directory} that "
                        f"rank 0 on {ranks[0][0]} writes: give --output a path that all nodes share"
                    )

        distributed.on_main(check)

    def _complete(self) -> dict[str, Any]:
        """Mark the folder as finished if it is (rank 0)."""
        if self.finished:
            return self._description
        deadline = time.monotonic() + (_LISTING_DELAY if distributed.world_size() > 1 else 0)
        while True:
            rows = finished_shards(self.directory)
            missing = set(range(len(self.shards))) - rows.keys()
            own = sorted(n for n in missing if n % self._part[1] == self._part[0])
            if not own or time.monotonic() >= deadline:
                break
            time.sleep(1)
        if own:
            shown = ", ".join(map(str, own[:5])) + (", …" if len(own) > 5 else "")
            raise UserError(
                f"{len(own)} of the {len(self.shards)} shards of {self.directory} are missing "
                f"({shown}), as {socket.gethostname()} sees it, though all ranks are done: all "
                "nodes must write into one shared folder; run the command again once they do"
            )
        if missing:  # the shards of other jobs; the last job finishes the folder
            logger.info(
                "%d shards of other parts are missing; whichever part ends last finishes the "
                "folder, else run the command once without --part", len(missing)
            )  # fmt: skip
        else:
            reasons: Counter[str] = Counter()
            with atomic_write(self.directory / "skipped.jsonl", "w") as merged:
                for entry in chain.from_iterable(map(self._skipped, sorted(rows))):
                    reasons[entry["reason"]] += 1
                    merged.write(_json_line(entry))
            self._describe(finished=True, pairs=sum(rows.values()), skipped=dict(reasons))
        return self._description


def _fingerprint(value: Any) -> Any:
    return value.get("fingerprint", value) if isinstance(value, dict) else value


def _readable(value: Any) -> str:
    if isinstance(value, dict) and "name" in value:
        return f"{value['name']} ({str(value.get('fingerprint'))[:8]})"
    return "none" if value is None else str(value)
