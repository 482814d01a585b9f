"""An index that holds no row more often than an answer could need it.

Piles of pictures hold one placeholder ("image not available") thousands of times. Of identical rows
only the first k can be among the k nearest of anything, for equal distances go in order of
insertion. So further copies are counted, not held: a flood of copies costs no search time, and no
answer changes.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np

from infogrowth.neighbors.base import NeighborIndex, Neighbors


class LocalIndex(NeighborIndex, Protocol):
    """An index whose rows all lie in this process."""

    def take(self, positions: np.ndarray) -> np.ndarray:
        """The rows at `positions` (M,), as (M, D) float32."""


class DistinctIndex:
    """A `NeighborIndex` in front of another one, which is spared the copies beyond the k-th."""

    def __init__(self, held: LocalIndex) -> None:
        self.dimension = held.dimension
        self.k = held.k
        self._held = held
        self._held_at = np.empty(0, np.int64)  # of each row held, its position among all
        self._like = np.empty(0, np.int64)  # of each of all rows, which row held is identical
        self._first: dict[int, int] = {}  # by the hash of a row, the first row held that has it
        self._copies: dict[int, int] = {}  # how many are held, where they are more than one

    @property
    def count(self) -> int:
        return len(self._like)

    def describe(self) -> str:
        return self._held.describe()

    def extend(self, rows: np.ndarray) -> None:
        """As `NeighborIndex.extend`."""
        rows = np.ascontiguousarray(rows, np.float32)
        held_before = len(self._held_at)
        to_hold: list[int] = []
        like = np.empty(len(rows), np.int64)
        new_first: dict[int, int] = {}  # nothing is remembered of rows that could not be added
        new_copies: dict[int, int] = {}
        for number, row in enumerate(rows):
            # k + 1 different rows would have to share 64 bits for one to be missed.
            next_held, digest = held_before + len(to_hold), hash(row.tobytes())
            first = self._first.get(digest, new_first.get(digest))
            copies = new_copies.get(digest, self._copies.get(digest, 1))
            if first is not None and copies == self.k:
                like[number] = first
                continue
            if first is None:
                new_first[digest] = next_held
            else:
                new_copies[digest] = copies + 1
            like[number] = next_held
            to_hold.append(number)
        self._held.extend(rows if len(to_hold) == len(rows) else rows[to_hold])
        at = len(self._like) + np.array(to_hold, np.int64)
        self._held_at = np.concatenate([self._held_at, at])
        self._like = np.concatenate([self._like, like])
        self._first.update(new_first)
        self._copies.update(new_copies)

    def truncate(self, count: int) -> None:
        """As `NeighborIndex.truncate`; also clears away what a failed `extend` left."""
        held_count = int(np.searchsorted(self._held_at, count))
        self._held.truncate(held_count)
        if count >= self.count and held_count == len(self._held_at):
            return
        held = self._held.rows(0, held_count)
        held_at, like = self._held_at[:held_count], self._like[:count]
        self._held.truncate(0)
        self._held_at = self._like = np.empty(0, np.int64)
        self._first, self._copies = {}, {}
        self.extend(held)
        self._held_at, self._like = held_at, like

    def search(self, queries: np.ndarray, visible: np.ndarray) -> Neighbors:
        """As `NeighborIndex.search`."""
        found = self._held.search(queries, np.searchsorted(self._held_at, visible))
        if len(self._held_at) == 0:
            return found
        positions = np.where(found.positions >= 0, self._held_at[found.positions], -1)
        return Neighbors(positions, found.products)

    def rows(self, start: int, stop: int) -> np.ndarray:
        """As `NeighborIndex.rows`."""
        return self._held.take(self._like[start:stop])
