"""A flat picture of the kept set: the two directions along which its features differ most."""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Projection:
    """``P`` points of the kept set, each axis scaled into [0, 1]."""

    rows: np.ndarray  # (P,) which kept samples
    points: np.ndarray  # (P, 2)
    explained: float  # share of the variance that the two axes show


def project(features: np.ndarray, most: int, random: np.random.Generator) -> Projection:
    """Principal components of at most ``most`` rows, drawn without replacement.

    Args:
        features: (K, D) float32.

    The sign of each axis is fixed (largest loading positive), so the picture does not flip
    between runs.
    """
    count = len(features)
    rows = np.arange(count)
    if count > most:
        rows = np.sort(random.choice(count, size=most, replace=False))
    chosen = np.asarray(features[rows], dtype=np.float64)
    centered = chosen - chosen.mean(axis=0)
    variances, directions = np.linalg.eigh(centered.T @ centered)
    axes = directions[:, ::-1][:, :2]
    largest = np.abs(axes).argmax(axis=0)
    axes = axes * np.where(axes[largest, np.arange(axes.shape[1])] < 0, -1.0, 1.0)
    points = centered @ axes
    if points.shape[1] < 2:
        points = np.column_stack([points, np.zeros(len(points))])
    total = variances.sum()
    explained = float(variances[::-1][:2].sum() / total) if total > 0 else 0.0
    return Projection(rows, _into_unit_square(points), explained)


def spread_out(points: np.ndarray, least: tuple[float, float], grid: int = 24) -> list[int]:
    """Points of the unit square of which no two overlap, so that each can carry a picture.

    Args:
        points: (P, 2).
        least: width and height of a picture as shares of the square.
        grid: the points are taken cell by cell, the middlemost of each cell first, so that the
            whole square gets its share.
    """
    cells = np.minimum((points * grid).astype(int), grid - 1)
    offsets = np.abs(points * grid - cells - 0.5).max(axis=1)
    rank = np.lexsort((offsets, cells[:, 1], cells[:, 0]))
    first_of_cell = np.r_[True, np.any(np.diff(cells[rank], axis=0) != 0, axis=1)]
    chosen: list[int] = []
    for index in rank[first_of_cell].tolist():
        apart = np.abs(points[chosen] - points[index]) >= least
        if np.all(apart.any(axis=1)):
            chosen.append(index)
    return chosen


def _into_unit_square(points: np.ndarray) -> np.ndarray:
    """Each axis stretched from its 0.5 % to its 99.5 % quantile, so outliers do not rule it."""
    low, high = np.quantile(points, [0.005, 0.995], axis=0)
    span = np.where(high - low > 0, high - low, 1.0)
    return np.clip((points - low) / span, 0.0, 1.0)
