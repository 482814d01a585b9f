"""How a dataset is split into shards, who makes which, and what a features folder says of itself.

The split depends on the dataset alone, never on the number of ranks or jobs, so the files are the
same bytes however many made them and however often they were interrupted. Ranks claim the next
shard when they are free; a shard that is marked as finished is never made again.
"""

import logging
import os
import secrets
import socket
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from infogrowth import distributed
from infogrowth.data.feature_files import FeatureWriter
from infogrowth.errors import UserError
from infogrowth.files import TEMPORARY_MARK, atomic_write_json, read_json

logger = logging.getLogger(__name__)

DESCRIPTION = "features.json"
_MAX_ROWS, _MIN_ROWS, _WANTED_SHARDS = 10_000, 256, 64
# Seconds for which a network file system may show a node an old list of another node's files.
_LISTING_DELAY = 60.0


def automatic_shard_size(rows: int) -> int:
    """Samples per shard: about 64 shards, of 256 to 10,000 samples.

    A shard is what a killed run loses, and what ranks divide among themselves.
    """
    return max(_MIN_ROWS, min(_MAX_ROWS, -(-rows // _WANTED_SHARDS)))


class ShardedOutput:
    """A features folder that is filled shard by shard, by the ranks of one job or of several.

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
        self.directory = Path(directory)
        size = shard_size or automatic_shard_size(rows)
        self.identity = {**identity, "rows": rows, "shard_size": size}
        self._compared, self._samples, self._part = compared, samples, part
        token = distributed.on_main(lambda: secrets.token_hex(8))
        self._claims = f"shards {token}"
        self.finished, self.shards, self.pending = distributed.on_main(self._open)
        if self.finished:
            logger.info("%s is finished already: nothing to do", self.directory)
        self.writer = FeatureWriter(self.directory, len(self.shards))
        if distributed.world_size() > 1:
            self._refuse_separate_disks(self.directory / f"seen-by-all{TEMPORARY_MARK}{token}")

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
        same_samples = existing.get("samples") == self.identity.get("samples")
        if existing and (self._samples is None or same_samples):
            self._refuse_difference(existing, self._compared)
        elif existing:  # from other samples, to which more may be added
            but = ("samples", "rows", "shard_size")
            self._refuse_difference(existing, [k for k in self._compared if k not in but])
            self._refuse_changed_containers(existing.get("containers", {}))
            earlier = sorted(FeatureWriter(self.directory).finished_shards())
            logger.info("%s: embedding what is new", self.directory)
        shards = self._split(earlier)
        self.identity["shards"] = len(shards)
        if earlier:
            self.identity["earlier_shards"] = earlier
        writer = FeatureWriter(self.directory, len(shards))
        done = writer.finished_shards()
        first, step = self._part
        own = range(first, len(shards), step)
        finished = existing.get("finished") is True and len(done) == len(shards)
        if not finished:
            self.directory.mkdir(parents=True, exist_ok=True)
            # Other jobs that share the folder are perhaps writing: only this one's are left over.
            writer.remove_leftovers(None if step == 1 else own)
            if existing != {**self.identity, "finished": False}:
                self._describe(finished=False)
        return finished, shards, [number for number in own if number not in done]

    def _description(self) -> dict[str, Any]:
        """What features.json says; empty for a new folder."""
        path = self.directory / DESCRIPTION
        description = read_json(path, "the description of the features") if path.is_file() else {}
        strange = self.directory.is_file() or any(self.directory.glob("*_emb"))
        if not isinstance(description, dict) or (strange and not description):
            raise UserError(f"{self.directory} holds something else; give --output another folder")
        return description

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
        done, skipped = FeatureWriter(self.directory, max(earlier) + 1).samples(earlier)
        embedded = Counter(done if with_captions else [(name, None) for name, _ in done])
        unused = Counter(skipped)
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

    def _refuse_difference(self, existing: Mapping[str, Any], keys: Iterable[str]) -> None:
        for key in keys:
            there, here = existing.get(key), self.identity.get(key)
            if _identity(there) != _identity(here):
                raise UserError(
                    f"{self.directory} was made with another {self._compared[key]}: "
                    f"{_readable(there)} there, {_readable(here)} now; give --output another folder"
                )

    def _refuse_changed_containers(self, before: Mapping[str, str]) -> None:
        now = self.identity.get("containers", {})
        for name, version in before.items():
            if now.get(name) != version:
                raise UserError(
                    f"{name} is not what it was when {self.directory} was made: its images may "
                    "have changed; give --output another folder"
                )

    def _refuse_separate_disks(self, probe: Path) -> None:
        """Every rank must find what rank 0 writes, or shards would be missing in the end."""
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
            missing = set(range(len(self.shards))) - self.writer.finished_shards()
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
            skipped = self.writer.merge_skipped()
            self._describe(finished=True, pairs=self.writer.rows(), skipped=skipped)
        return self._description()

    def _describe(self, **state: Any) -> None:
        atomic_write_json(self.directory / DESCRIPTION, {**self.identity, **state}, indent=2)


def _identity(value: Any) -> Any:
    return value.get("fingerprint", value) if isinstance(value, dict) else value


def _readable(value: Any) -> str:
    if isinstance(value, dict) and "name" in value:
        return f"{value['name']} ({str(value.get('fingerprint'))[:8]})"
    return "none" if value is None else str(value)
