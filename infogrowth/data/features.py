"""Features of samples as one stream, whatever folder or file they lie in.

Rows come as they are stored; the growth engine brings them to unit length.
"""

import bisect
import hashlib
import itertools
import json
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from infogrowth.annotations import SPACES
from infogrowth.data.feature_files import (
    FeatureShard,
    arrays_shard,
    find_datacomp,
    find_shards,
    reading,
)
from infogrowth.errors import UserError
from infogrowth.files import read_json
from infogrowth.remote import AnyPath, as_path


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
    extra: dict[str, list[Any]] = field(default_factory=dict)
    rows: np.ndarray = field(default_factory=lambda: np.empty(0, np.int64))

    def __len__(self) -> int:
        return len(self.ids)

    def take(self, rows: np.ndarray | slice) -> "FeatureBatch":
        """The samples at the given positions of this batch; of a slice the features are views."""

        def taken(values: list[Any]) -> list[Any]:
            return values[rows] if isinstance(rows, slice) else [values[n] for n in rows.tolist()]

        return FeatureBatch(
            taken(self.ids),
            taken(self.captions),
            None if self.image is None else self.image[rows],
            None if self.text is None else self.text[rows],
            {name: taken(column) for name, column in self.extra.items()},
            self.rows[rows],
        )

    @staticmethod
    def join(batches: Sequence["FeatureBatch"]) -> "FeatureBatch":
        """Consecutive batches as one."""
        first, *others = batches
        if not others:
            return first

        def joined(name: str) -> Any:
            parts = [getattr(batch, name) for batch in batches]
            return None if parts[0] is None else np.concatenate(parts)

        return FeatureBatch(
            [sample for batch in batches for sample in batch.ids],
            [caption for batch in batches for caption in batch.captions],
            joined("image"),
            joined("text"),
            {n: [v for batch in batches for v in batch.extra[n]] for n in first.extra},
            joined("rows"),
        )


def open_features(
    path: str | os.PathLike[str],
    spaces: Sequence[str] = SPACES,
    key: str | None = None,
    extra: Sequence[str] = (),
) -> "FeatureStream":
    """Open a features folder or file of any supported layout.

    Args:
        path: a clip-retrieval / LAION folder, a DataComp metadata folder, or a .npz / .pth file;
            or the address of one (``s3://…``), which is read in a stream.
        spaces: the spaces that must be there: ``("image", "text")``, ``("text",)`` for a
            recaption table, ``("image",)`` for growth in the image space alone.
        key: which of DataComp's features, ``"b32"`` or ``"l14"``; needed where both are there.
        extra: metadata columns wanted besides id and caption; absent ones are left out.

    Raises:
        UserError: nothing readable there, an unfinished ``embed``, files whose row counts do not
            agree (named), a missing space or column.
    """
    folder = as_path(path)
    if folder.is_file():
        return FeatureStream(folder, "arrays", [arrays_shard(folder, spaces, extra)], {})
    if not folder.is_dir():
        raise UserError(f"the features {path} do not exist; check the path")
    description = _describe(folder)
    if shards := find_shards(folder, spaces, extra):
        planned = description.get("shards")
        if isinstance(planned, int) and planned != len(shards):
            raise UserError(
                f"{path} has {len(shards)} feature shards, but its features.json counts {planned}; "
                "files are missing, write them again with `python -m infogrowth embed`"
            )
        return FeatureStream(folder, "clip-retrieval", shards, description)
    if description.get("shards") == 0:  # nothing needed a caption, or nothing could be embedded
        return FeatureStream(folder, "clip-retrieval", [], description)
    if found := find_datacomp(folder, spaces, key, extra):
        shards, chosen = found
        description = {"encoder": {"name": f"DataComp {chosen}"}}
        return FeatureStream(folder, "DataComp", shards, description)
    raise UserError(
        f"{path} holds no features: expected img_emb/*.npy, text_emb/*.npy and metadata/*.parquet "
        "(python -m infogrowth embed writes them), or DataComp's parquet and npz pairs"
    )


def _describe(path: AnyPath) -> dict[str, Any]:
    file = path / "features.json"
    if not file.is_file():
        return {}
    description = read_json(file, "the features' description")
    if not isinstance(description, dict):
        raise UserError(f"{file} must hold an object; run `python -m infogrowth embed` again")
    if description.get("finished") is False:
        raise UserError(
            f"the features in {path} are not finished (the run that writes them was interrupted "
            "or is still going); run the same command again, then this one"
        )
    return description


class FeatureStream:
    """The samples of a features folder in shard order, then row order.

    Attributes:
        path: the folder or file, as given.
        layout: ``"clip-retrieval"``, ``"DataComp"`` or ``"arrays"``.
        rows: number of samples.
        dimensions: feature width per space that is read.
        description: features.json of a folder written by ``embed``, else what is known.
    """

    def __init__(
        self,
        folder: AnyPath,
        layout: str,
        shards: Sequence[FeatureShard],
        description: dict[str, Any],
    ):
        self.path, self._folder = str(folder), folder
        self.layout, self.shards, self.description = layout, list(shards), description
        self._ends = list(itertools.accumulate(shard.rows for shard in self.shards))
        self.rows = self._ends[-1] if self._ends else 0
        self.dimensions = dict(self.shards[0].dimensions) if self.shards else {}
        for shard in self.shards:
            for space, width in shard.dimensions.items():
                if width != self.dimensions[space]:
                    raise UserError(
                        f"{shard.name} has {space} features of dimension {width}, but "
                        f"{self.shards[0].name} has {self.dimensions[space]}; one folder holds "
                        "one encoder's"
                    )
        self._signatures: list[bytes] = []

    @property
    def dimension(self) -> int:
        """The one width of all features.

        Raises:
            UserError: image and text features differ in width, so no cosine exists between them.
        """
        widths = set(self.dimensions.values())
        if not widths:
            raise UserError(f"the features {self.path} hold no samples")
        if len(widths) > 1:
            listed = ", ".join(f"{space} {width}" for space, width in self.dimensions.items())
            raise UserError(
                f"the features of {self.path} differ in dimension ({listed}); image and text "
                "features must come from one dual encoder"
            )
        return widths.pop()

    @property
    def encoder(self) -> dict[str, Any] | None:
        """``{"name", "fingerprint", …}`` of the encoder, when the folder records it."""
        encoder = self.description.get("encoder")
        return encoder if isinstance(encoder, dict) else None

    @property
    def skipped(self) -> dict[str, int]:
        """How many samples got no features, by reason, as ``embed`` recorded it.

        Raises:
            UserError: the record is damaged; the sentence names the file.
        """
        counts = self.description.get("skipped")
        if counts is None:
            return self._count_skipped()
        numbers = counts.values() if isinstance(counts, dict) else [None]
        if not all(type(number) is int and number >= 0 for number in numbers):
            file = self._folder / "features.json"
            raise UserError(f'"skipped" must be counts by reason in {file}, not {counts!r:.60}')
        return dict(counts)

    def _count_skipped(self) -> dict[str, int]:
        path = self._folder / "skipped.jsonl"
        if not path.is_file():
            return {}
        counts: Counter[str] = Counter()
        with reading(path):
            lines = path.read_bytes().splitlines()  # text would be split at U+2028 too
        for number, line in enumerate(lines, start=1):
            try:
                reason = json.loads(line)["reason"]
                reason.encode("utf-8")  # half a surrogate pair could not be written again
            except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
                raise UserError(
                    f"line {number} of {path} is not a skipped sample: {error}"
                ) from error
            counts[reason] += 1
        return dict(counts)

    def batches(
        self,
        batch_size: int,
        start_row: int = 0,
        stop_row: int | None = None,
        choose: Callable[[FeatureBatch], np.ndarray] | None = None,
    ) -> Iterator[FeatureBatch]:
        """Batches of ``batch_size`` samples (the last may be smaller) of the given rows, in order.

        Args:
            choose: the samples to take of a batch, as ``(n,) bool``; the batches are filled up
                with what follows, and ``rows`` gives the samples' row numbers. None takes all.
        """
        stop = self.rows if stop_row is None else stop_row
        pieces: list[FeatureBatch] = []
        missing = batch_size
        for piece in self._pieces(batch_size, start_row, stop):
            if choose is not None:
                taken = np.flatnonzero(choose(piece))
                piece = piece if len(taken) == len(piece) else piece.take(taken)
            while len(piece) >= missing:
                yield FeatureBatch.join([*pieces, piece.take(slice(missing))])
                piece = piece.take(slice(missing, None))
                pieces, missing = [], batch_size
            if len(piece):
                pieces.append(piece)
                missing -= len(piece)
        if pieces:
            yield FeatureBatch.join(pieces)

    def row(self, number: int) -> FeatureBatch:
        """One sample, as a batch of one."""
        shard = bisect.bisect_right(self._ends, number)
        return self._read(shard, number, number + 1)

    def fingerprint(self, rows: int) -> str:
        """A digest of the shards that hold the first ``rows`` samples: the same features again
        (copied elsewhere, or with more shards added) have the same one."""
        digest = hashlib.blake2b(digest_size=16)
        first = 0
        for number, shard in enumerate(self.shards):
            if first >= rows:
                break
            if number == len(self._signatures):
                self._signatures.append(shard.signature())
            digest.update(self._signatures[number])
            first += shard.rows
        return digest.hexdigest()

    def _pieces(self, size: int, start_row: int, stop_row: int) -> Iterator[FeatureBatch]:
        """Slices of single shards, at most ``size`` samples each."""
        first = 0
        for number, end in enumerate(self._ends):
            for start in range(max(start_row, first), min(stop_row, end), size):
                yield self._read(number, start, min(start + size, stop_row, end))
            first = end
            self.shards[number].release()

    def _read(self, shard: int, start: int, stop: int) -> FeatureBatch:
        """Rows ``start … stop − 1`` of the stream, which lie in one shard."""
        first = self._ends[shard] - self.shards[shard].rows
        ids, captions, extra, features = self.shards[shard].read(start - first, stop - first)
        rows = np.arange(start, stop)
        return FeatureBatch(ids, captions, features.get("image"), features.get("text"), extra, rows)
