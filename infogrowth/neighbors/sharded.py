"""One index over all ranks: each holds every W-th row, all look up the whole batch, answers merge.

Row p of the dataset lives on rank p mod W at place p div W, so shards never differ by more than
one row, however many ranks a later run has. All ranks must make the same calls.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from infogrowth.neighbors.base import NeighborIndex, Neighbors, merge_neighbors

Gather = Callable[[np.ndarray], list[np.ndarray]]
"""Brings each rank's array (first dimensions may differ) to all ranks, in rank order."""


class ShardedIndex:
    """A `NeighborIndex` whose rows are spread over `world_size` ranks; this one holds `local`."""

    def __init__(self, local: NeighborIndex, rank: int, world_size: int, gather: Gather) -> None:
        self.local = local
        self.dimension = local.dimension
        self.k = local.k
        self._rank = rank
        self._world_size = world_size
        self._gather = gather
        self._count = 0

    @property
    def count(self) -> int:
        return self._count

    def extend(self, rows: np.ndarray) -> None:
        first_own = (self._rank - self._count) % self._world_size
        self.local.extend(rows[first_own :: self._world_size])
        self._count += len(rows)

    def truncate(self, count: int) -> None:
        self._count = min(self._count, count)
        self.local.truncate(int(self._own(np.int64(self._count))))

    def search(self, queries: np.ndarray, visible: np.ndarray) -> Neighbors:
        own = self.local_search(queries, visible)
        positions = self._gather(own.positions)
        products = self._gather(own.products)
        return merge_neighbors(list(map(Neighbors, positions, products)), self.k)

    def local_search(self, queries: np.ndarray, visible: np.ndarray) -> Neighbors:
        """This rank's nearest rows, with the positions they have in the whole dataset."""
        found = self.local.search(queries, self._own(visible))
        positions = np.where(
            found.positions >= 0, found.positions * self._world_size + self._rank, -1
        )
        return Neighbors(positions, found.products)

    def rows(self, start: int, stop: int) -> np.ndarray:
        part = self.local.rows(int(self._own(np.int64(start))), int(self._own(np.int64(stop))))
        whole = np.empty((stop - start, self.dimension), np.float32)
        for rank, rows in enumerate(self._gather(part)):
            whole[(rank - start) % self._world_size :: self._world_size] = rows
        return whole

    def describe(self) -> str:
        return f"{self.local.describe()}, spread over {self._world_size} ranks"

    def _own(self, count: np.ndarray | np.int64) -> np.ndarray:
        """How many of the dataset's first `count` rows live on this rank."""
        return np.asarray((count - self._rank + self._world_size - 1) // self._world_size)
