"""How a pile is cut into shards, who makes which, and what a features folder says of itself.

The cut depends on the pile alone, never on the number of ranks, so the files are the same bytes
however many made them and however often they were interrupted.
"""

import hashlib
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from infogrowth import distributed
from infogrowth.data.feature_writer import FeatureWriter
from infogrowth.errors import UserError
from infogrowth.files import atomic_write_json, read_json

logger = logging.getLogger(__name__)

DESCRIPTION = "features.json"
_LARGEST, _SMALLEST, _WANTED = 10_000, 256, 64


def automatic_shard_size(rows: int) -> int:
    """Samples per shard: about 64 shards, of 256 to 10,000 samples.

    A shard is what a killed run loses, and what ranks divide among themselves.
    """
    return max(_SMALLEST, min(_LARGEST, -(-rows // _WANTED)))


def cut(rows: int, size: int) -> list[range]:
    """Row numbers of each shard; nothing at all is one empty shard."""
    starts = range(0, max(rows, 1), size)
    return [range(start, min(start + size, rows)) for start in starts]


class ShardedOutput:
    """A features folder that is filled shard by shard, by one rank or many.

    Args:
        directory: the folder, new or from an earlier run of the same job.
        identity: what the features depend on, in JSON types; goes to features.json. A value that
            is a mapping with a ``fingerprint`` is compared by that alone.
        compared: the keys of ``identity`` that may not differ between runs, with what each is
            called when it does.
        shards: how many there will be.

    Raises:
        UserError: the folder was made from something else, with the difference named.
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        identity: Mapping[str, Any],
        compared: Mapping[str, str],
        shards: int,
    ) -> None:
        self.directory = Path(directory)
        self.identity = {**identity, "shards": shards}
        self._shards = shards
        existing = self._existing()
        if existing is not None:
            self._refuse_difference(existing, compared)
        self.writer = FeatureWriter(self.directory, shards)
        self.finished = (
            existing is not None
            and existing.get("finished") is True
            and len(self.writer.finished_shards()) == shards
        )
        distributed.barrier()  # every rank has read the folder before rank 0 changes it
        if distributed.is_main() and not self.finished:
            self.directory.mkdir(parents=True, exist_ok=True)
            self.writer.remove_leftovers()
            self._describe({"finished": False})
        distributed.barrier()

    def waiting(self) -> list[int]:
        """This rank's shards that are not there yet, dealt round robin by number."""
        done = self.writer.finished_shards()
        rank, ranks = distributed.rank(), distributed.world_size()
        return [i for i in range(rank, self._shards, ranks) if i not in done]

    def finish(self) -> dict[str, Any]:
        """Wait for all ranks, join what was skipped, and mark the folder as finished.

        Returns:
            the description: what features.json holds.
        """
        distributed.barrier()
        if distributed.is_main() and not self.finished:
            skipped = self.writer.merge_skipped()
            self._describe({"finished": True, "pairs": self.writer.rows(), "skipped": skipped})
        distributed.barrier()
        return read_json(self.directory / DESCRIPTION, "the description of the features")

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

    def _refuse_difference(self, existing: dict[str, Any], compared: Mapping[str, str]) -> None:
        for key, called in {**compared, "shards": "a cut into shards"}.items():
            there, here = existing.get(key), self.identity.get(key)
            if _essence(there) != _essence(here):
                raise UserError(
                    f"{self.directory} was made with another {called.removeprefix('a ')}: "
                    f"{_told(there)} there, {_told(here)} now; give --output another folder"
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
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error


def list_digest(lines: list[str]) -> str:
    """sha256 of some names or ids in their order, 32 hex digits."""
    digest = hashlib.sha256()
    for line in lines:
        digest.update(line.encode("utf-8", "surrogatepass") + b"\n")
    return digest.hexdigest()[:32]


def _essence(value: Any) -> Any:
    return value.get("fingerprint", value) if isinstance(value, dict) else value


def _told(value: Any) -> str:
    if isinstance(value, dict) and "name" in value:
        return f"{value['name']} ({str(value.get('fingerprint'))[:8]})"
    return "none" if value is None else str(value)
