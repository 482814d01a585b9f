"""The answer of a search, and how answers over disjoint rows merge.

Shapes here and in the package: N queries, M rows, D dimension, K neighbors, J cells, T cells read.
"""

from __future__ import annotations

from dataclasses import dataclass

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


def merge_neighbors(parts: list[Neighbors], k: int) -> Neighbors:
    """The k nearest out of several searches over disjoint rows, whose positions are global."""
    positions = np.concatenate([part.positions for part in parts], axis=1)
    products = np.concatenate([part.products for part in parts], axis=1)
    absent = positions < 0
    order = np.lexsort((positions, np.where(absent, np.inf, -products)), axis=1)[:, :k]
    return Neighbors(
        np.take_along_axis(positions, order, axis=1), np.take_along_axis(products, order, axis=1)
    )
