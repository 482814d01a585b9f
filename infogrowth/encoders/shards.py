"""How a dataset is split into shards, who makes which, and what a features folder says of itself.

The split depends on the dataset alone, never on the number of ranks or jobs, so the files are the
same bytes however many made them and however often they were interrupted. Ranks claim the next
shard when they are free; a shard that is finished is never made again.
"""

import hashlib
import logging
import os
import re
import secrets
import socket
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from infogrowth import distributed
from infogrowth.data.feature_writer import FeatureWriter
from infogrowth.errors import UserError, shorten
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


def split(rows: int, size: int) -> list[range]:
    """Row numbers of each shard; nothing at all is one empty shard."""
    starts = range(0, max(rows, 1), size)
    return [range(start, min(start + size, rows)) for start in starts]


def parse_part(part: str | None) -> tuple[int, int]:
    """``"3/16"`` as (2, 16): the third of 16 jobs takes shards 2, 18, 34, …; None is all of them.

    Raises:
        UserError: no such part.
    """
    if part is None:
        return 0, 1
    match = re.fullmatch(r"(\d+)/(\d+)", part)
    number, count = (int(match[1]), int(match[2])) if match else (0, 0)
    if not 1 <= number <= count:
        raise UserError(f"--part must be one of 1/N … N/N, for example 3/16, not {part!r}")
    return number - 1, count


class ShardedOutput:
    """A features folder that is filled shard by shard, by the ranks of one job or of several.

    Args:
        directory: the folder, new or from an earlier run of the same job; all ranks see it.
        identity: what the features depend on, in JSON types; goes to features.json. A value that
            is a mapping with a ``fingerprint`` is compared by that alone.
        compared: the keys of ``identity`` that may not differ between runs, with what each is
            called when it does.
        rows, shard_size: how many samples, and how many to a shard.
        part: ``"3/16"`` where independent jobs share the folder, see :func:`parse_part`.
        samples: (id, caption) of every row, or (id, None), where the folder may have been made
            from fewer of them: shards for the new ones are added to it, the others stay.

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
        shard_size: int,
        part: str | None = None,
        samples: Sequence[tuple[str, str | None]] | None = None,
    ) -> None:
        self.directory = Path(directory)
        self.identity = {**identity, "rows": rows, "shard_size": shard_size}
        self._compared, self._samples = compared, samples
        self._part = parse_part(part)
        self.finished, self.shards, self.pending, self._claims = distributed.on_main(self._open)
        self.identity["shards"] = len(self.shards)
        self.writer = FeatureWriter(self.directory, len(self.shards))
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

    def _open(self) -> tuple[bool, list[Sequence[int]], list[int], str]:
        """Whether all is done, every shard's rows, this job's pending shards, and the name of
        their counter."""
        existing = self._existing()
        earlier: list[int] = []
        grown = False
        if existing is not None:
            earlier = existing.get("earlier_shards", [])
            if grown := self._has_grown(existing):
                earlier = sorted(FeatureWriter(self.directory).finished_shards())
                logger.info("%s: embedding what is new", self.directory)
        self.shards = self._split(earlier)
        self.identity["shards"] = len(self.shards)
        if earlier:
            self.identity["earlier_shards"] = earlier
        if existing is not None and not grown:
            self._refuse_difference(existing)
        writer = FeatureWriter(self.directory, len(self.shards))
        done = writer.finished_shards()
        finished = existing is not None and existing.get("finished") is True
        finished = finished and len(done) == len(self.shards)
        first, step = self._part
        own = range(first, len(self.shards), step)
        if not finished:
            self.directory.mkdir(parents=True, exist_ok=True)
            # Other jobs that share the folder are perhaps writing: only this one's are left over.
            writer.remove_leftovers(None if step == 1 else own)
            if existing != {**self.identity, "finished": False}:
                self._describe({"finished": False})
        pending = [number for number in own if number not in done]
        return finished, self.shards, pending, f"shards {secrets.token_hex(8)}"

    def _has_grown(self, existing: Mapping[str, Any]) -> bool:
        """Whether the folder was made from other samples, and more may be added to it."""
        if self._samples is None or existing.get("samples") == self.identity["samples"]:
            return False
        self._refuse_difference(existing, but=("samples", "rows", "shard_size", "shards"))
        here = self.identity.get("containers", {})
        for name, version in existing.get("containers", {}).items():
            if here.get(name) != version:
                raise UserError(
                    f"{name} is not what it was when {self.directory} was made: its images may "
                    "have changed; give --output another folder"
                )
        return True

    def _split(self, earlier: Sequence[int]) -> list[Sequence[int]]:
        """Rows by shard; those of earlier shards are theirs already, so they get none."""
        rows, size = self.identity["rows"], self.identity["shard_size"]
        if not earlier:
            return list(split(rows, size))
        new = self._new_rows(earlier)
        parts = iter([new[start : start + size] for start in range(0, len(new), size)])
        shards: list[Sequence[int]] = []
        taken = set(earlier)
        while True:
            if len(shards) in taken:
                shards.append(())
            elif (part := next(parts, None)) is not None:
                shards.append(part)
            else:
                return shards

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
        if gone := next((name for (name, _), count in embedded.items() if count > 0), None):
            raise UserError(
                f"{self.directory} was made with another {self._compared['samples']}: its sample "
                f"{gone!r} is gone or has another caption now; give --output another folder"
            )
        return new

    def _complete(self) -> dict[str, Any]:
        if not self.finished:
            missing = self._missing()
            own = [number for number in missing if number % self._part[1] == self._part[0]]
            if own:
                shown = ", ".join(map(str, own[:5])) + (", …" if len(own) > 5 else "")
                raise UserError(
                    f"{self.directory} lacks {len(own)} of its {len(self.shards)} shards ({shown}) "
                    f"as seen from {socket.gethostname()}, though all ranks are done: all nodes "
                    "must write into one shared folder; run the command again once they do"
                )
            if missing:  # the shards of other jobs; the last job finishes the folder
                logger.info(
                    "%d shards of other parts are missing; whichever part ends last finishes the "
                    "folder, else run the command once without --part", len(missing)
                )  # fmt: skip
            else:
                skipped = self.writer.merge_skipped()
                self._describe({"finished": True, "pairs": self.writer.rows(), "skipped": skipped})
        return read_json(self.directory / DESCRIPTION, "the description of the features")

    def _missing(self) -> list[int]:
        """Shards that are not there, once the file system has had time to show them."""
        deadline = time.monotonic() + (_LISTING_DELAY if distributed.world_size() > 1 else 0)
        while True:
            done = self.writer.finished_shards()
            missing = [number for number in range(len(self.shards)) if number not in done]
            if not set(missing) & set(self.pending) or time.monotonic() >= deadline:
                return missing
            time.sleep(1)

    def _refuse_separate_disks(self) -> None:
        """Every rank must find what rank 0 writes, or shards would be missing in the end."""
        if distributed.world_size() == 1:
            return
        name = f"seen-by-all{TEMPORARY_MARK}{distributed.broadcast_object(secrets.token_hex(8))}"
        probe = self.directory / name
        distributed.on_main(lambda: _touch(probe))
        sees = distributed.all_gather_objects((socket.gethostname(), probe.exists()))
        distributed.on_main(lambda: probe.unlink(missing_ok=True))
        blind = [(number, node) for number, (node, seen) in enumerate(sees) if not seen]
        if blind:
            number, node = blind[0]
            if distributed.is_main():
                raise UserError(
                    f"rank {number} on {node} does not see the folder {self.directory} that rank 0 "
                    f"on {sees[0][0]} writes: give --output a path that all nodes share"
                )
            raise SystemExit(2)

    def _existing(self) -> dict[str, Any] | None:
        path = self.directory / DESCRIPTION
        if path.is_file():
            description = read_json(path, "the description of the features")
            if not isinstance(description, dict):
                raise UserError(f"{path} must hold an object; give --output another folder")
            return description
        if self.directory.is_file() or any(self.directory.glob("*_emb")):
            raise UserError(f"{self.directory} holds something else; give --output another folder")
        return None

    def _refuse_difference(self, existing: Mapping[str, Any], but: Sequence[str] = ()) -> None:
        for key, name in {**self._compared, "shards": "a split into shards"}.items():
            there, here = existing.get(key), self.identity.get(key)
            if key not in but and _identity(there) != _identity(here):
                raise UserError(
                    f"{self.directory} was made with another {name.removeprefix('a ')}: "
                    f"{_readable(there)} there, {_readable(here)} now; give --output another folder"
                )

    def _describe(self, state: dict[str, Any]) -> None:
        description = {**self.identity, **state}
        atomic_write_json(self.directory / DESCRIPTION, description, indent=2)


def file_digest(path: str | os.PathLike[str]) -> str:
    """sha256 of a file's content, 32 hex digits.

    Raises:
        UserError: it cannot be read.
    """
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()[:32]
    except OSError as error:
        raise UserError(f"cannot read {path}: {shorten(error)}") from error


def list_digest(lines: list[str]) -> str:
    """sha256 of some names or ids in their order, 32 hex digits."""
    digest = hashlib.sha256()
    for line in lines:
        digest.update(line.encode("utf-8", "surrogatepass") + b"\n")
    return digest.hexdigest()[:32]


def _touch(path: Path) -> None:
    try:
        path.touch()
    except OSError as error:
        raise UserError(f"cannot write {path}: {shorten(error)}") from error


def _identity(value: Any) -> Any:
    return value.get("fingerprint", value) if isinstance(value, dict) else value


def _readable(value: Any) -> str:
    if isinstance(value, dict) and "name" in value:
        return f"{value['name']} ({str(value.get('fingerprint'))[:8]})"
    return "none" if value is None else str(value)
