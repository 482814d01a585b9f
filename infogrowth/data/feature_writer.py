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
import secrets
import socket
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
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
_MAX_ROWS, _MIN_ROWS, _WANTED_SHARDS = 10_000, 256, 64
# Seconds for which a network file system may show a node an old list of another node's files.
_LISTING_DELAY = 60.0


class FeatureWriter:
    """The files of a features folder; many ranks may write different shards of it.

    Args:
        directory: FEATURES_DIR; made when missing.
        shards: how many shards are planned: it fixes the zero-padding of a new folder's file
            names; one that grows keeps the padding it has.
    """

    def __init__(self, directory: str | os.PathLike[str], shards: int = 100_000):
        self.directory = Path(directory)
        widths = [len(stem) for stem in self._markers()]
        self.width = min(widths, default=len(str(max(shards - 1, 0))))

    def remove_leftovers(self, shards: Iterable[int] | None = None) -> None:
        """Delete temporary files of a killed run; call on one rank, before any rank writes.

        Args:
            shards: only those of these shards, where other jobs write the rest; None: all.
        """
        own = {self._path(kind, shard) for shard in shards or () for kind in _FILES}
        for path in self.directory.rglob(f"*{TEMPORARY_MARK}*"):
            if shards is None or path.with_name(path.name.partition(TEMPORARY_MARK)[0]) in own:
                path.unlink(missing_ok=True)

    def finished_shards(self) -> set[int]:
        """Numbers of the shards that are wholly written, all their files in place."""
        files = {number: self._marker(number)["files"] for number in map(int, self._markers())}
        return {n for n in files if all((self.directory / f).is_file() for f in files[n])}

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
        features = {"img_emb": image, "text_emb": text}
        arrays = {kind: rows for kind, rows in features.items() if rows is not None}
        texts = {"image_path": ids, "caption": captions}
        columns: dict[str, Any] = {k: pa.array(v, pa.string()) for k, v in texts.items()}
        columns |= {name: list(values) for name, values in (extra or {}).items()}
        lengths = {name: len(values) for name, values in (columns | arrays).items()}
        if len(set(lengths.values())) != 1:
            raise ValueError(f"shard {index}: lengths differ: {lengths}")
        for kind, rows in arrays.items():
            atomic_write_array(self._path(kind, index), _half_unit_rows(rows))
        with atomic_write(self._path("metadata", index)) as file:
            pq.write_table(pa.table(columns), file)
        with atomic_write(self._path("skipped", index), "w") as file:
            file.writelines(map(_json_line, skipped))
        paths = [self._path(kind, index) for kind in (*arrays, "metadata")]
        files = sorted(str(path.relative_to(self.directory)) for path in paths)
        atomic_write_json(self._path("finished", index), {"rows": len(ids), "files": files})

    def merge_skipped(self) -> dict[str, int]:
        """Join the shards' skipped samples into skipped.jsonl; returns how many per reason."""
        counts: Counter[str] = Counter()
        with atomic_write(self.directory / "skipped.jsonl", "w") as merged:
            for index in sorted(self.finished_shards()):
                for entry in self._skipped(index):
                    counts[entry["reason"]] += 1
                    merged.write(_json_line(entry))
        return dict(counts)

    def _markers(self) -> list[str]:
        stems = [path.stem for path in self.directory.glob("finished/*.json")]
        return [stem for stem in stems if stem.isdigit()]

    def _marker(self, index: int) -> dict[str, Any]:
        return read_json(self._path("finished", index), "the finished marker")

    def _skipped(self, index: int) -> list[dict[str, str]]:
        return list(map(json.loads, self._path("skipped", index).read_bytes().splitlines()))

    def _path(self, kind: str, index: int) -> Path:
        return self.directory / _FILES[kind].format(f"{index:0{self.width}d}")


def _json_line(entry: Mapping[str, str]) -> str:
    return json.dumps(dict(entry), ensure_ascii=False) + "\n"


def _half_unit_rows(features: np.ndarray) -> np.ndarray:
    """Rows at unit length as float16; zero rows stay zero, bad rows stay bad for `grow` to see."""
    rows = np.asarray(features, np.float32)
    norms = np.sqrt(np.square(rows, dtype=np.float64).sum(axis=1, keepdims=True))
    with np.errstate(invalid="ignore", over="ignore"):
        return (rows / np.where(norms > 0, norms, 1)).astype(np.float16)


def automatic_shard_size(rows: int) -> int:
    """Samples per shard: about 64 shards, of 256 to 10,000 samples.

    A shard is what a killed run loses, and what ranks divide among themselves.
    """
    return max(_MIN_ROWS, min(_MAX_ROWS, -(-rows // _WANTED_SHARDS)))


class ShardedOutput(FeatureWriter):
    """A features folder that is filled with a dataset, by the ranks of one job or of several.

    Args:
        directory: the folder, new or from an earlier run of the same job; all ranks see it.
        identity: what the features depend on, in JSON types; goes to features.json. A value that
            is a mapping with a ``fingerprint`` is compared by that alone.
        compared: the keys of ``identity`` that may not differ between runs, with what each is
            called when it does.
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
        compared: Mapping[str, str],
        rows: int,
        shard_size: int | None = None,
        part: tuple[int, int] = (0, 1),
        samples: Sequence[tuple[str, str | None]] | None = None,
    ) -> None:
        super().__init__(directory)
        size = shard_size or automatic_shard_size(rows)
        self.identity = {**identity, "rows": rows, "shard_size": size}
        self._compared, self._samples, self._part = compared, samples, part
        self._claims = f"shards {distributed.on_main(lambda: secrets.token_hex(8))}"
        self.finished, self.shards, self.pending = distributed.on_main(self._open)
        super().__init__(directory, len(self.shards))
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

    def finish(self) -> dict[str, Any]:
        """Wait for all ranks; once every shard is there, join what was skipped and mark the folder.

        Returns:
            the description: what features.json holds.

        Raises:
            UserError: shards of this job are missing.
        """
        distributed.barrier()
        return distributed.on_main(self._complete)

    def _open(self) -> tuple[bool, list[Sequence[int]], list[int]]:
        """What is finished and what is left, and features.json brought up to that (rank 0)."""
        existing = self._description()
        earlier: list[int] = existing.get("earlier_shards", [])
        grown = existing and self._samples is not None
        if grown and existing.get("samples") != self.identity.get("samples"):
            but = ("samples", "rows", "shard_size")  # what more samples may change
            self._refuse_difference(existing, [k for k in self._compared if k not in but])
            containers = self.identity.get("containers", {})
            for name, version in existing.get("containers", {}).items():
                if containers.get(name) != version:
                    raise UserError(
                        f"{name} is not what it was when {self.directory} was made: its images "
                        "may have changed; give --output another folder"
                    )
            earlier = sorted(self.finished_shards())
            logger.info("%s: embedding what is new", self.directory)
        elif existing:
            self._refuse_difference(existing, self._compared)
        shards = self._split(earlier)
        self.identity["shards"] = len(shards)
        if earlier:
            self.identity["earlier_shards"] = earlier
        super().__init__(self.directory, len(shards))
        done = self.finished_shards()
        first, step = self._part
        own = range(first, len(shards), step)
        finished = existing.get("finished") is True and len(done) == len(shards)
        if not finished:
            self.directory.mkdir(parents=True, exist_ok=True)
            # Other jobs that share the folder are perhaps writing: only this one's are left over.
            self.remove_leftovers(None if step == 1 else own)
            if existing != {**self.identity, "finished": False}:
                self._describe(finished=False)
        return finished, shards, [number for number in own if number not in done]

    def _description(self) -> dict[str, Any]:
        """What features.json says; empty for a new folder."""
        path = self.directory / "features.json"
        description = read_json(path, "the description of the features") if path.is_file() else {}
        other = self.directory.is_file() or any(self.directory.glob("*_emb"))
        if not isinstance(description, dict) or (other and not description):
            raise UserError(f"{self.directory} holds something else; give --output another folder")
        return description

    def _describe(self, **state: Any) -> None:
        atomic_write_json(self.directory / "features.json", {**self.identity, **state}, indent=2)

    def _refuse_difference(self, existing: Mapping[str, Any], keys: Iterable[str]) -> None:
        for key in keys:
            there, here = existing.get(key), self.identity.get(key)
            if _fingerprint(there) != _fingerprint(here):
                raise UserError(
                    f"{self.directory} was made with another {self._compared[key]}: "
                    f"{_readable(there)} there, {_readable(here)} now; give --output another folder"
                )

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
            table = pq.read_table(self._path("metadata", index), columns=["image_path", "caption"])
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
                f"{self.directory} was made with another {self._compared['samples']}: its sample "
                f"{name!r} is gone or has another caption now; give --output another folder"
            )
        return new

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
            return self._description()
        deadline = time.monotonic() + (_LISTING_DELAY if distributed.world_size() > 1 else 0)
        while True:
            missing = set(range(len(self.shards))) - self.finished_shards()
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
            skipped = self.merge_skipped()
            pairs = sum(self._marker(index)["rows"] for index in range(len(self.shards)))
            self._describe(finished=True, pairs=pairs, skipped=skipped)
        return self._description()


def _fingerprint(value: Any) -> Any:
    return value.get("fingerprint", value) if isinstance(value, dict) else value


def _readable(value: Any) -> str:
    if isinstance(value, dict) and "name" in value:
        return f"{value['name']} ({str(value.get('fingerprint'))[:8]})"
    return "none" if value is None else str(value)
