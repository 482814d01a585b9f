"""Rows that no answer can need: the copies of a row beyond the k-th.

Sources of images hold one placeholder ("image not available") thousands of times. Of identical
rows only the first k can be among the k nearest of anything, for equal distances go in order of
insertion. The others are marked, and scores leave them out: without that, each of F copies would
be compared with all others in float64.
"""

from __future__ import annotations

from array import array

import numpy as np

from infogrowth.randomness import generator


class Copies:
    """Counts identical rows of width `dimension`; those with `k` earlier copies are surplus."""

    def __init__(self, dimension: int, k: int) -> None:
        self._k = k
        # k rows that differ would have to share 64 bits for one to be marked wrongly.
        odd = generator(0, "row digests").integers(0, 2**63, dimension, dtype=np.uint64)
        self._multipliers = 2 * odd + 1
        self._digests = array("q")
        self._seen: dict[int, int] = {}
        self.surplus = 0  # how many rows are marked

    def add(self, rows: np.ndarray) -> np.ndarray:
        """Which of these rows (M, D) float32 are surplus, (M,) bool; they count from now on."""
        words = np.ascontiguousarray(rows, np.float32).view(np.uint32)
        digests = np.empty(len(rows), np.uint64)
        for start in range(0, len(rows), 1024):  # in the cache
            part = slice(start, start + 1024)
            digests[part] = (words[part] * self._multipliers).sum(axis=1, dtype=np.uint64)
        keys, seen = digests.view(np.int64).tolist(), self._seen
        marked = np.zeros(len(rows), bool)
        for number, key in enumerate(keys):
            earlier = seen.get(key, 0)
            seen[key] = earlier + 1
            if earlier >= self._k:
                marked[number] = True
        self._digests.extend(keys)
        self.surplus += int(marked.sum())
        return marked

    def truncate(self, count: int) -> None:
        """Forget all rows from `count` on."""
        for key in self._digests[count:]:
            left = self._seen[key] - 1
            self.surplus -= left >= self._k
            if left:
                self._seen[key] = left
            else:
                del self._seen[key]
        del self._digests[count:]
