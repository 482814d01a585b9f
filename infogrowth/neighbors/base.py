"""The answer of a search, and how the answers of ranks that hold disjoint rows are merged.

Shapes here and in the package: N queries, M rows, D dimension, K neighbors, J cells, T cells read.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np


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

    def without(self, itself: np.ndarray) -> Neighbors:
        """One column fewer: the row at `itself` (N,) is left out, else the farthest."""
        out = self.positions == itself[:, None]
        out[~out.any(axis=1), -1] = True
        shape = len(self.positions), self.positions.shape[1] - 1
        return Neighbors(self.positions[~out].reshape(shape), self.products[~out].reshape(shape))


def no_neighbors(count: int, k: int) -> Neighbors:
    """Room for `k` neighbors of `count` queries."""
    return Neighbors(np.full((count, k), -1, np.int64), np.full((count, k), -np.inf))


def merge_neighbors(parts: list[Neighbors], k: int) -> Neighbors:
    """The k nearest out of several searches over disjoint rows, whose positions are global."""
    positions = np.concatenate([part.positions for part in parts], axis=1)
    products = np.concatenate([part.products for part in parts], axis=1)
    absent = positions < 0
    order = np.lexsort((positions, np.where(absent, np.inf, -products)), axis=1)[:, :k]
    return Neighbors(
        np.take_along_axis(positions, order, axis=1), np.take_along_axis(products, order, axis=1)
    )


@dataclass(frozen=True)
class Shard:
    """The rows of one rank: row p of the dataset lives on rank p mod W at position p div W, so
    shards never differ by more than one row, however many ranks a later run has.

    `gather` brings each rank's array (first dimensions may differ) to all ranks, in rank order.
    """

    rank: int = 0
    world_size: int = 1
    gather: Callable[[np.ndarray], list[np.ndarray]] = lambda array: [array]

    def count(self, total: Any) -> Any:
        """How many of the dataset's first `total` rows (a number or an array) live here."""
        return (total - self.rank + self.world_size - 1) // self.world_size

    def own(self, rows: np.ndarray, first: int) -> np.ndarray:
        """Those of `rows` that live here, the first of them having position `first`."""
        return rows[(self.rank - first) % self.world_size :: self.world_size]

    def merge(self, found: Neighbors, k: int) -> Neighbors:
        """The nearest rows among all ranks, given those of this one."""
        if self.world_size == 1:
            return found
        here = found.positions * self.world_size + self.rank
        positions = self.gather(np.where(found.positions >= 0, here, -1))
        products = self.gather(found.products)
        return merge_neighbors(list(map(Neighbors, positions, products)), k)

    def collect(
        self, positions: np.ndarray, rows: Callable[[np.ndarray], np.ndarray]
    ) -> np.ndarray:
        """The rows at `positions` (M,) of the dataset, (M, D), on all ranks; `rows` reads those
        that live here."""
        owner = positions % self.world_size
        own = rows(positions[owner == self.rank] // self.world_size)
        whole = np.empty((len(positions), own.shape[1]), own.dtype)
        for rank, part in enumerate(self.gather(own)):
            whole[owner == rank] = part
        return whole
