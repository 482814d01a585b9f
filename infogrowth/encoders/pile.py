"""A pile of pictures with captions, seen as numbered rows, and the loader that decodes it.

The rows of one batch always lie in one shard and never move: features are computed in the same
batches whoever computes them, so they are the same to the bit.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from infogrowth.data.images import BadImage, decode_image
from infogrowth.encoders.protocols import Preprocess


class PairReader(Protocol):
    """Caption and encoded picture of a row; picklable, opened anew in each worker process."""

    def read(self, row: int) -> tuple[str, bytes]:
        """Raises BadImage with a reason when the pair is not to be had."""
        ...


@dataclass(frozen=True)
class Pile:
    """What is to be embedded, row by row.

    Attributes:
        ids: the samples' names.
        problems: reason by row number for samples that are skipped without looking at them; what
            follows a colon in a reason is a detail that is recorded, not counted apart.
        pairs: gives the caption and the encoded picture of a row.
        origin: where it all comes from, for features.json.
    """

    ids: Sequence[str]
    problems: Mapping[int, str]
    pairs: PairReader
    origin: Mapping[str, Any] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.ids)


@dataclass(frozen=True)
class CaptionTable:
    """Captions without pictures, row by row; ``problems`` as in a :class:`Pile`."""

    ids: Sequence[str]
    captions: Sequence[str]
    problems: Mapping[int, str]

    def __len__(self) -> int:
        return len(self.ids)


@dataclass(frozen=True)
class Batch:
    """Some rows of one shard, decoded: ``rows``, ``captions`` and ``pictures`` go together, bad
    samples are apart.

    ``pictures`` is one ``(B, C, H, W)`` tensor where all have one size, else a list of CHW arrays
    (which travel between processes by value: a tensor would cost an open file each).
    """

    shard: int
    rows: list[int]
    captions: list[str]
    pictures: torch.Tensor | list[np.ndarray]
    skipped: dict[int, str]

    def pin_memory(self) -> "Batch":
        """Called by the DataLoader: page-locked memory, for quicker copies to a GPU."""
        if isinstance(self.pictures, torch.Tensor):
            return replace(self, pictures=self.pictures.pin_memory())
        return self


class DecodedBatches(Dataset):
    """Batches by number, for a DataLoader whose workers decode and preprocess them."""

    def __init__(
        self, pile: Pile, preprocess: Preprocess, batches: Sequence[tuple[int, range]]
    ) -> None:
        self._pile, self._preprocess, self._batches = pile, preprocess, batches

    def __len__(self) -> int:
        return len(self._batches)

    def __getitem__(self, number: int) -> Batch:
        shard, rows = self._batches[number]
        good, captions, pictures, skipped = [], [], [], {}
        for row in rows:
            if row in self._pile.problems:
                skipped[row] = self._pile.problems[row]
                continue
            try:
                caption, data = self._pile.pairs.read(row)
                image = decode_image(data)
            except BadImage as error:
                skipped[row] = error.reason
                continue
            good.append(row)
            captions.append(caption)
            pictures.append(self._preprocess(image))
        if len({picture.shape for picture in pictures}) == 1:
            return Batch(shard, good, captions, torch.stack(pictures), skipped)
        arrays = [picture.numpy() for picture in pictures]
        return Batch(shard, good, captions, arrays, skipped)


def decoded_batches(
    pile: Pile,
    preprocess: Preprocess,
    shards: Mapping[int, range],
    batch_size: int,
    workers: int,
    pinned: bool = False,
) -> Iterator[Batch]:
    """All rows of some shards, shard by shard, in batches that do not cross shards.

    Args:
        preprocess: as the model asks for.
        shards: row numbers by shard number.
        batch_size: rows per batch, bad ones included.
        workers: processes that decode ahead; 0 decodes when asked.
        pinned: page-locked memory, for quicker copies to a GPU.
    """
    batches = [
        (number, rows[start : start + batch_size])
        for number, rows in shards.items()
        for start in range(0, len(rows), batch_size)
    ]
    return iter(
        DataLoader(
            DecodedBatches(pile, preprocess, batches),
            batch_size=None,  # one item is one batch already
            num_workers=workers,
            pin_memory=pinned,
            prefetch_factor=4 if workers else None,
        )
    )


def first_caption(caption: object) -> str | None:
    """The caption that is embedded: of a list the first one that is not blank; None if none."""
    candidates = caption if isinstance(caption, list) else [caption]
    return next((c for c in candidates if isinstance(c, str) and c.strip()), None)
