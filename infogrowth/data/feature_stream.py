"""Features of samples as one stream, shard after shard, whatever files they lie in.

Rows come as they are stored; the growth engine brings them to unit length.
"""

import bisect
import hashlib
import itertools
import json
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from infogrowth.data.text import text_of, texts_of, values_of
from infogrowth.errors import UserError, refusing
from infogrowth.remote import AnyPath


@dataclass(frozen=True)
class FeatureBatch:
    """Some consecutive samples: ids and captions (``""`` where missing), features as stored.

    ``image`` and ``text`` are ``(n, D) float32``, not cleaned and not unit length, or None for a
    space that was not asked for; ``extra`` holds further metadata columns, n values each; ``rows``
    are the samples' row numbers in the stream.
    """

    ids: list[str]
    captions: list[str]
    image: np.ndarray | None
    text: np.ndarray | None
    extra: dict[str, list[Any]]
    rows: np.ndarray

    def __len__(self) -> int:
        return len(self.ids)

    def take(self, rows: np.ndarray | slice) -> "FeatureBatch":
        """The samples at the given positions of this batch; of a slice the features are views."""

        def taken(values: Any) -> Any:
            if isinstance(values, dict):
                return {name: taken(column) for name, column in values.items()}
            if isinstance(values, list) and not isinstance(rows, slice):
                return [values[n] for n in rows.tolist()]
            return None if values is None else values[rows]

        return FeatureBatch(**taken(vars(self)))

    @staticmethod
    def join(batches: Sequence["FeatureBatch"]) -> "FeatureBatch":
        """Consecutive batches as one."""

        def joined(parts: Sequence[Any]) -> Any:
            if isinstance(parts[0], dict):
                return {name: joined([part[name] for part in parts]) for name in parts[0]}
            if isinstance(parts[0], list):
                return list(itertools.chain.from_iterable(parts))
            return None if parts[0] is None else np.concatenate(parts)

        return batches[0] if len(batches) == 1 else FeatureBatch(**joined(list(map(vars, batches))))


class Part(NamedTuple):
    """An array or a table in a file: what errors call it, its shape, and how it is loaded."""

    name: str
    shape: tuple[int, ...]
    load: Callable[[], Any]


class FeatureShard:
    """One file, or a few files side by side, that hold the same ``rows`` samples.

    Args:
        arrays: the features of each space, ``(rows, dimension)``.
        table: ids, captions and further columns, in this order.
        sign: bytes that change when the shard's content does, found without reading all of it.

    Raises:
        UserError: row counts do not agree; the files are named.
    """

    def __init__(self, arrays: Mapping[str, Part], table: Part, sign: Callable[[], bytes]) -> None:
        self.arrays, self._table, self.sign = arrays, table, sign
        self._loaded: tuple[pa.Table, dict[str, Any]] | None = None
        self.name = next(iter(arrays.values())).name
        self.dimensions = {space: array.shape[1] for space, array in arrays.items()}
        counts = {part.name: part.shape[0] for part in (*arrays.values(), table)}
        self.rows = table.shape[0]
        if len(set(counts.values())) > 1:
            listed = ", ".join(f"{name} has {rows}" for name, rows in counts.items())
            raise UserError(
                f"row counts do not agree: {listed}; the shard is damaged, write it again"
            )

    def read(self, first: int, start: int, stop: int) -> FeatureBatch:
        """Rows ``start … stop − 1`` of a stream in which this shard's rows begin at ``first``."""
        if self._loaded is None:
            arrays = {space: array.load() for space, array in self.arrays.items()}
            self._loaded = self._table.load(), arrays
        table, arrays = self._loaded
        ids, captions, *extra = table.slice(start - first, stop - start).columns
        features = {
            space: array[start - first : stop - first].astype(np.float32)
            for space, array in arrays.items()
        }
        return FeatureBatch(
            texts_of(ids),
            texts_of(captions),
            features.get("image"),
            features.get("text"),
            dict(zip(table.column_names[2:], map(values_of, extra), strict=True)),
            np.arange(start, stop),
        )

    def release(self) -> None:
        """Forget what was loaded; called when the stream has moved on."""
        self._loaded = None


def reading(path: AnyPath | str, fault: str = "cannot be read") -> AbstractContextManager[None]:
    """What numpy, zipfile or pyarrow say of a damaged file becomes one sentence that names it."""
    return refusing(
        str(path), "the file", ValueError, TypeError, EOFError, RuntimeError,
        KeyError, zipfile.BadZipFile, zlib.error, pa.ArrowException, fault=fault,
    )  # fmt: skip


class FeatureStream:
    """The samples of a features folder in shard order, then row order.

    Attributes:
        path: the folder or file, as given.
        rows: number of samples.
        dimension: the one width of all features, 0 where there are none.
        dimensions: it by the spaces that are read.
        description: features.json of a folder written by ``embed``, else what is known.

    Raises:
        UserError: shards, or image and text, differ in width: no cosine exists between them.
    """

    def __init__(
        self,
        folder: AnyPath,
        shards: Sequence[FeatureShard],
        description: dict[str, Any],
    ):
        self.path, self._folder = str(folder), folder
        self.description = description
        self.shards = list(shards)
        counts = (shard.rows for shard in self.shards)
        *self._starts, self.rows = itertools.accumulate(counts, initial=0)
        self.dimensions = dict(self.shards[0].dimensions) if self.shards else {}
        self.dimension = next(iter(self.dimensions.values()), 0)
        for shard in self.shards:
            for space, array in shard.arrays.items():
                if array.shape[1] != self.dimension:
                    raise UserError(
                        f"{array.name} has {space} features of dimension {array.shape[1]}, but "
                        f"{self.shards[0].name} has {next(iter(self.dimensions))} features of "
                        f"{self.dimension}; one folder holds one dual encoder's"
                    )
        self._signatures: list[bytes] = []

    @property
    def encoder(self) -> dict[str, Any] | None:
        """``{"name", "fingerprint", …}`` of the encoder, when the folder records it."""
        encoder = self.description.get("encoder")
        return encoder if isinstance(encoder, dict) else None

    @property
    def skipped(self) -> dict[str, int]:
        """How many samples got no features, by reason, as ``embed`` recorded it.

        Raises:
            UserError: the record is damaged.
        """
        counts, path = self.description.get("skipped"), self._folder / "skipped.jsonl"
        if counts is None and path.is_file():
            with reading(path):  # not as text, which would be split at U+2028 too
                lines = path.read_bytes().splitlines()
            reasons: Counter[str] = Counter()
            for number, line in enumerate(lines, start=1):
                with reading(f"{path}, line {number},", "is no skipped sample"):
                    reasons[text_of(json.loads(line)["reason"])] += 1
            return dict(reasons)
        counts = {} if counts is None else counts
        numbers = counts.values() if isinstance(counts, dict) else [None]
        if not all(type(number) is int and number >= 0 for number in numbers):
            raise UserError(
                f'"skipped" must be counts by reason in {self.path}/features.json, '
                f"not {counts!r:.60}"
            )
        return dict(counts)

    def batches(
        self,
        batch_size: int,
        start_row: int = 0,
        stop_row: int | None = None,
        chosen: np.ndarray | None = None,
    ) -> Iterator[FeatureBatch]:
        """Batches of ``batch_size`` samples (the last may be smaller) of the given rows, in order.

        Args:
            chosen: the rows to take, as ``(rows of the stream,) bool``; the batches are filled up
                with what follows, and ``rows`` gives the samples' row numbers. None takes all.
        """
        stop = self.rows if stop_row is None else stop_row
        pieces: list[FeatureBatch] = []
        missing = batch_size
        for shard, first in zip(self.shards, self._starts, strict=True):
            end = first + shard.rows
            for start in range(max(start_row, first), min(stop, end), batch_size):
                piece = shard.read(first, start, min(start + batch_size, stop, end))
                if chosen is not None and not chosen[piece.rows].all():
                    piece = piece.take(np.flatnonzero(chosen[piece.rows]))
                while len(piece) >= missing:
                    yield FeatureBatch.join([*pieces, piece.take(slice(missing))])
                    piece = piece.take(slice(missing, None))
                    pieces, missing = [], batch_size
                if len(piece):
                    pieces.append(piece)
                    missing -= len(piece)
            shard.release()
        if pieces:
            yield FeatureBatch.join(pieces)

    def row(self, number: int) -> FeatureBatch:
        """One sample, as a batch of one."""
        shard = bisect.bisect_right(self._starts, number) - 1
        return self.shards[shard].read(self._starts[shard], number, number + 1)

    def fingerprint(self, rows: int) -> str:
        """A digest of the shards that hold the first ``rows`` samples: the same features again
        (copied elsewhere, or with more shards added) have the same one."""
        digest = hashlib.blake2b(digest_size=16)
        first = 0
        for number, shard in enumerate(self.shards):
            if first >= rows:
                break
            if number == len(self._signatures):
                self._signatures.append(hashlib.blake2b(shard.sign(), digest_size=16).digest())
            digest.update(self._signatures[number])
            first += shard.rows
        return digest.hexdigest()
