"""Rows that no answer can need: the copies of a row beyond the k-th.

Sources of images hold one placeholder ("image not available") thousands of times. Of identical
rows only the first k can be among the k nearest of anything, for equal distances go in order of
insertion. The others are marked, and no cell holds them: without that, each of F copies would be
compared with all others in float64.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable

import numpy as np


class Copies:
    """Counts identical rows; those with `k` earlier copies are surplus."""

    def __init__(self, k: int) -> None:
        self._k = k
        self._digests = array("q")  # k rows that differ would have to share 64 bits to be mistaken
        self._seen: dict[int, int] = {}

    def add(self, rows: Iterable[np.ndarray]) -> np.ndarray:
        """Which of these rows (M, D) float32 are surplus, (M,) bool; they count from now on."""
        keys = [hash(row.tobytes()) for row in rows]
        earlier = np.empty(len(keys), np.int64)
        for number, key in enumerate(keys):
            earlier[number] = self._seen.get(key, 0)
            self._seen[key] = self._seen.get(key, 0) + 1
        self._digests.extend(keys)
        return earlier >= self._k

    def truncate(self, count: int) -> None:
        """Forget all rows from `count` on."""
        for key in self._digests[count:]:
            self._seen[key] -= 1
            if not self._seen[key]:
                del self._seen[key]
        del self._digests[count:]
