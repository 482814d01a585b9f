"""Information gain of a sample: how far it lies from what the dataset already holds.

Paper: "Dataset Growth" (InfoGrowth), gain calculation; spec §2 "Gain".
"""

from __future__ import annotations

import numpy as np


def mean_distance(distances: np.ndarray) -> np.ndarray:
    """Gain of each sample from its nearest neighbors' cosine distances.

    `distances` (N, k) float64, nearest first, NaN where a small dataset has no more neighbors.
    Returns (N,) float64: the mean over the neighbors that exist, in [0, 2], and exactly 1 for a
    sample that meets an empty dataset. Adds nearest first, so the bits never depend on N.
    """
    total = np.zeros(len(distances), np.float64)
    found = np.zeros(len(distances), np.int64)
    for column in distances.T:
        present = ~np.isnan(column)
        total[present] += column[present]
        found += present
    return np.where(found > 0, total / np.maximum(found, 1), 1.0)
