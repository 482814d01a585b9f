"""One index over all ranks: each holds every W-th row, all look up the whole batch, answers merge.

Row p of the dataset lives on rank p mod W at position p div W, so shards never differ by more than
one row, however many ranks a later run has. All ranks must make the same calls.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from infogrowth.neighbors.base import Neighbors, merge_neighbors


@dataclass(frozen=True)
class Shard:
    """The rows of one rank. `gather` brings each rank's array (first dimensions may differ) to all
    ranks, in rank order."""

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
        if self.world_size == 1:
            return own
        whole = np.empty((len(positions), own.shape[1]), np.float32)
        for rank, part in enumerate(self.gather(own)):
            whole[owner == rank] = part
        return whole
