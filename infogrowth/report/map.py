"""The map of the kept set: the two directions along which its features differ most."""

from dataclasses import dataclass

import numpy as np

from infogrowth.randomness import generator
from infogrowth.report.dataset import GrowthTable
from infogrowth.report.galleries import Card, CardMaker

MAP_POINTS = 8000
MAP_LEVELS = 7
IMAGE_ON_MAP = (0.052, 0.092)  # with a margin, as shares of the frame on a wide screen
IMAGE_ON_SMALL_MAP = (0.125, 0.1)  # the same on a phone


@dataclass(frozen=True)
class Landmark:
    """An image on the map; its position in percent of the frame."""

    left: float
    top: float
    card: Card
    level: int  # of its gain, as the dots' colors
    on_small_screens: bool


@dataclass(frozen=True)
class Map:
    """The kept set in two dimensions: dots by level of gain as SVG paths, and some images."""

    points: int
    explained: float
    paths: list[str]
    low: float
    high: float
    landmarks: list[Landmark]


def kept_map(table: GrowthTable, maker: CardMaker) -> Map | None:
    """The map of the kept set, or None when there are no features or too few to draw."""
    rows = np.flatnonzero(table.kept)
    if table.kept_features is None or len(rows) < 3:
        return None
    flat = project(table.kept_features("image"), MAP_POINTS, generator(0, "report", "map"))
    rows = rows[flat.rows]
    gain = np.nan_to_num(table.mean_gain[rows])
    low, high = (float(value) for value in np.quantile(gain, [0.02, 0.98]))
    level = np.clip((gain - low) / max(high - low, 1e-9) * MAP_LEVELS, 0, MAP_LEVELS - 1).astype(
        int
    )
    positions = np.round(15 + 970 * flat.points).astype(int)
    positions[:, 1] = 1000 - positions[:, 1]
    return Map(
        points=len(rows),
        explained=100 * flat.explained,
        paths=[_dots(positions[level == value]) for value in range(MAP_LEVELS)],
        low=low,
        high=high,
        landmarks=_landmarks(positions / 1000, rows, level, maker),
    )


def _landmarks(
    positions: np.ndarray, rows: np.ndarray, level: np.ndarray, maker: CardMaker
) -> list[Landmark]:
    chosen = spread_out(positions, IMAGE_ON_MAP)
    small = {chosen[i] for i in spread_out(positions[chosen], IMAGE_ON_SMALL_MAP)}
    marks = [
        Landmark(
            left=100 * float(positions[at, 0]),
            top=100 * float(positions[at, 1]),
            card=maker.card(rows[at]),
            level=int(level[at]),
            on_small_screens=at in small,
        )
        for at in chosen
    ]
    # Tab walks from the top left to the bottom right.
    shown = [mark for mark in marks if mark.card.thumbnail]
    return sorted(shown, key=lambda mark: (mark.top // 10, mark.left))


def _dots(positions: np.ndarray) -> str:
    """A path whose round line ends are the dots: ten bytes each, so thousands are cheap."""
    return "".join(f"M{x} {y}h0" for x, y in np.unique(positions, axis=0).tolist())


@dataclass(frozen=True)
class Projection:
    """``P`` points of the kept set, each axis scaled into [0, 1]."""

    rows: np.ndarray  # (P,) which kept samples
    points: np.ndarray  # (P, 2)
    explained: float  # share of the variance that the two axes show


def project(features: np.ndarray, limit: int, random: np.random.Generator) -> Projection:
    """Principal components of at most ``limit`` rows, drawn without replacement.

    Args:
        features: (K, D) float32.

    The sign of each axis is fixed (largest loading positive), so the map does not flip
    between runs.
    """
    count = len(features)
    rows = np.arange(count)
    if count > limit:
        rows = np.sort(random.choice(count, size=limit, replace=False))
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


def spread_out(points: np.ndarray, size: tuple[float, float], grid: int = 24) -> list[int]:
    """Points of the unit square of which no two overlap, so that each can carry an image.

    Args:
        points: (P, 2).
        size: width and height of an image as shares of the square.
        grid: the points are taken cell by cell, the middlemost of each cell first, so that the
            whole square gets its share.
    """
    cells = np.minimum((points * grid).astype(int), grid - 1)
    offsets = np.abs(points * grid - cells - 0.5).max(axis=1)
    rank = np.lexsort((offsets, cells[:, 1], cells[:, 0]))
    first_of_cell = np.r_[True, np.any(np.diff(cells[rank], axis=0) != 0, axis=1)]
    chosen: list[int] = []
    for index in rank[first_of_cell].tolist():
        apart = np.abs(points[chosen] - points[index]) >= size
        if np.all(apart.any(axis=1)):
            chosen.append(index)
    return chosen


def _into_unit_square(points: np.ndarray) -> np.ndarray:
    """Each axis stretched from its 0.5 % to its 99.5 % quantile, so outliers do not rule it."""
    low, high = np.quantile(points, [0.005, 0.995], axis=0)
    span = np.where(high - low > 0, high - low, 1.0)
    return np.clip((points - low) / span, 0.0, 1.0)
