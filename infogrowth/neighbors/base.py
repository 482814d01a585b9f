"""What a neighbor index is: unit rows in insertion order, and the nearest of them to a query.

Knows nothing of captions or ranks. Shapes: N queries, D dimension, K neighbors, C candidates.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

MINIMUM_CAPACITY = 1024


@dataclass(frozen=True)
class Neighbors:
    """The nearest rows of each query, nearest first; equal distances in order of insertion.

    `positions` (N, K) int64, -1 where there are fewer than K; `distances` (N, K) float64 cosine
    distances in [0, 2], NaN there. `products` (N, K) float64 are the cosines themselves, by which
    the rows are ordered, -inf there.
    """

    positions: np.ndarray
    products: np.ndarray

    @property
    def distances(self) -> np.ndarray:
        """1 − cosine, at least 0: rounding may not bring a copy nearer than itself."""
        return np.where(self.positions >= 0, np.maximum(1 - self.products, 0), np.nan)

    def part(self, rows: slice) -> Neighbors:
        """Those of some queries: views, which can be filled."""
        return Neighbors(self.positions[rows], self.products[rows])


class NeighborIndex(Protocol):
    """Rows that can be added at the end, taken off the end, and searched."""

    dimension: int
    k: int

    @property
    def count(self) -> int:
        """How many rows are held (over all ranks)."""

    def extend(self, rows: np.ndarray) -> None:
        """Add (M, D) float32 unit rows."""

    def truncate(self, count: int) -> None:
        """Forget all rows from position `count` on."""

    def search(self, queries: np.ndarray, visible: np.ndarray) -> Neighbors:
        """The k nearest rows of each of (N, D) float32 unit `queries`.

        Query i sees the first `visible[i]` rows only; `visible` (N,) int64 must not decrease. So a
        whole batch is looked up at once, each sample among the samples that came before it.
        """

    def rows(self, start: int, stop: int) -> np.ndarray:
        """The rows from `start` up to `stop`, (stop − start, D) float32."""

    def describe(self) -> str:
        """One line on how this index searches."""


def merge_neighbors(parts: list[Neighbors], k: int) -> Neighbors:
    """The k nearest out of several searches over disjoint rows, whose positions are global."""
    positions = np.concatenate([part.positions for part in parts], axis=1)
    products = np.concatenate([part.products for part in parts], axis=1)
    absent = positions < 0
    order = np.lexsort((positions, np.where(absent, np.inf, -products)), axis=1)[:, :k]
    return Neighbors(
        np.take_along_axis(positions, order, axis=1), np.take_along_axis(products, order, axis=1)
    )


class GrowingRows:
    """Rows of one type on one device in one preallocated buffer, which doubles when it is full."""

    def __init__(self, dimension: int, dtype: Any, device: Any) -> None:
        import torch

        self._empty = lambda rows: torch.empty((rows, dimension), dtype=dtype, device=device)
        self._buffer = self._empty(0)
        self.count = 0

    @property
    def filled(self) -> Any:
        """The rows held, (count, D), a view of the buffer."""
        return self._buffer[: self.count]

    def extend(self, rows: Any) -> None:
        """Add (M, D) rows of any device and precision."""
        needed = self.count + len(rows)
        if needed > len(self._buffer):
            larger = self._empty(max(needed, 2 * len(self._buffer), MINIMUM_CAPACITY))
            larger[: self.count] = self.filled
            self._buffer = larger
        self._buffer[self.count : needed] = rows
        self.count = needed

    def truncate(self, count: int) -> None:
        """Forget all rows from `count` on; the memory stays."""
        self.count = min(self.count, count)
