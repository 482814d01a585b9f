"""The grown set in two dimensions: the map on the page, and a parquet for Embedding Atlas.

    embedding-atlas FILE.parquet --x projection_x --y projection_y --neighbors neighbors
        --text caption --image image

The two axes are the directions along which the kept images' features differ most.
"""

import os
from collections.abc import Iterator
from itertools import islice
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from infogrowth.files import atomic_write
from infogrowth.randomness import generator
from infogrowth.report.dataset import GrowthTable
from infogrowth.report.galleries import Thumbnails, samples

MAP_POINTS = 8000
MAP_LEVELS = 7
IMAGE_ON_MAP = (0.052, 0.092)  # with a margin, as shares of the frame on a wide screen
IMAGE_ON_SMALL_MAP = (0.125, 0.1)  # the same on a phone
ATLAS_COMMAND = (
    "embedding-atlas {path} --x projection_x --y projection_y --neighbors neighbors "
    "--text caption --image image"
)
_CHUNK_ROWS = 4096  # rows whose images are held at once


def principal_components(features: np.ndarray) -> tuple[np.ndarray, float]:
    """Points (K, 2) float64 of the features (K, D), and the share of the variance they show.

    The sign of each axis is fixed (largest loading positive), so that nothing flips between runs.
    """
    mean = features.mean(axis=0, dtype=np.float64)
    spread = np.zeros((features.shape[1], features.shape[1]))
    for start in range(0, len(features), 65_536):
        part = features[start : start + 65_536] - mean
        spread += part.T @ part
    variances, directions = np.linalg.eigh(spread)
    axes = directions[:, ::-1][:, :2]
    largest = axes[np.abs(axes).argmax(axis=0), range(axes.shape[1])]
    axes = axes * np.where(largest < 0, -1.0, 1.0)
    axes = np.pad(axes, ((0, 0), (0, 2 - axes.shape[1])))  # features of a single number
    total = variances.sum()
    explained = float(variances[::-1][:2].sum() / total) if total > 0 else 0.0
    return features @ axes - mean @ axes, explained


def kept_map(table: GrowthTable, thumbnails: Thumbnails) -> dict[str, Any] | None:
    """The map of the kept set, or None when there are no features or too few to draw.

    Returns:
        the number of ``points`` and the percentage of variance ``explained``; ``paths``, SVG paths
        of dots by level of gain between ``low`` and ``high``; and ``landmarks``, images: positions
        ``left`` and ``top`` in percent of the frame, ``sample`` (a row of the table), ``level``,
        and whether it is shown ``on_small_screens``.
    """
    kept = table.rows[table.kept]
    if table.kept_features is None or len(kept) < 3:
        return None
    features = table.kept_features("image")
    if len(kept) > MAP_POINTS:
        random = generator(0, "report", "map")
        chosen = np.sort(random.choice(len(kept), size=MAP_POINTS, replace=False))
        kept, features = kept.iloc[chosen], features[chosen]
    points, explained = principal_components(features)
    gain = np.nan_to_num(kept.gain)
    low, high = (float(value) for value in np.quantile(gain, [0.02, 0.98]))
    scaled = (gain - low) / max(high - low, 1e-9) * MAP_LEVELS
    level = np.clip(scaled, 0, MAP_LEVELS - 1).astype(int)
    positions = np.round(15 + 970 * into_unit_square(points)).astype(int)
    positions[:, 1] = 1000 - positions[:, 1]
    on_map = spread_out(positions / 1000, IMAGE_ON_MAP)
    small = {on_map[at] for at in spread_out(positions[on_map] / 1000, IMAGE_ON_SMALL_MAP)}
    landmarks = [
        {
            "left": positions[at, 0] / 10,
            "top": positions[at, 1] / 10,
            "sample": sample,
            "level": int(level[at]),
            "on_small_screens": at in small,
        }
        for at, sample in zip(on_map, samples(kept.iloc[on_map]), strict=True)
        if thumbnails.address(sample.id)
    ]
    # Tab walks from the top left to the bottom right.
    landmarks.sort(key=lambda mark: (mark["top"] // 10, mark["left"]))
    # A path whose round line ends are the dots: ten bytes each, so thousands are cheap.
    dots = [np.unique(positions[level == value], axis=0).tolist() for value in range(MAP_LEVELS)]
    return {
        "points": len(kept),
        "explained": 100 * explained,
        "paths": ["".join(f"M{x} {y}h0" for x, y in of_level) for of_level in dots],
        "low": low,
        "high": high,
        "landmarks": landmarks,
    }


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


def into_unit_square(points: np.ndarray) -> np.ndarray:
    """Each axis stretched from its 0.5 % to its 99.5 % quantile, so outliers do not rule it."""
    low, high = np.quantile(points, [0.005, 0.995], axis=0)
    span = np.where(high - low > 0, high - low, 1.0)
    return np.clip((points - low) / span, 0.0, 1.0)


_TEXTS = ("caption", "original_caption", "verdict", "reason", "source")
_NUMBERS = ("alignment", "original_alignment", "gain", "gain_image", "gain_text")
_POINT = ("projection_x", "projection_y")
_ATLAS_SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("image", pa.struct([("bytes", pa.binary()), ("path", pa.string())])),
        *((name, pa.string()) for name in _TEXTS),
        *((name, pa.float64()) for name in (*_NUMBERS, *_POINT)),
        (
            "neighbors",
            pa.struct([("ids", pa.list_(pa.int64())), ("distances", pa.list_(pa.float64()))]),
        ),
    ]
)


def write_atlas(path: str | os.PathLike[str], table: GrowthTable, thumbnails: Thumbnails) -> None:
    """Write a row per decision for Embedding Atlas (PyPI ``embedding-atlas``), all or nothing.

    Kept samples lie where the principal components of their image features put them; dropped ones,
    whose features are not kept, in the middle of their nearest kept neighbors. Raises UserError:
    the file cannot be written.
    """
    points = np.full((len(table.rows), 2), np.nan)
    if table.kept_features is not None and table.kept.any():
        points[table.kept] = principal_components(table.kept_features("image"))[0]
    row_of = {name: row for row, name in table.rows.id[table.kept].items()}
    rows = _atlas_rows(table, points, row_of, thumbnails)
    with atomic_write(path) as file, pq.ParquetWriter(file, _ATLAS_SCHEMA) as writer:
        while chunk := list(islice(rows, _CHUNK_ROWS)):
            writer.write_table(pa.Table.from_pylist(chunk, _ATLAS_SCHEMA))


def _atlas_rows(
    table: GrowthTable, points: np.ndarray, row_of: dict[str, int], thumbnails: Thumbnails
) -> Iterator[dict[str, object]]:
    for sample in table.rows.itertuples():
        row = sample.Index
        near = [
            (row_of[n["id"]], n["distance"]) for n in table.near(row, "image") if n["id"] in row_of
        ]
        if np.isnan(points[row]).any() and near:
            points[row] = points[[other for other, _ in near]].mean(axis=0)
        # Atlas wants lists of one length. The first samples met fewer neighbors: they fill up with
        # themselves.
        near += [(row, 0.0)] * (int(table.settings.get("k", len(near))) - len(near))
        content = thumbnails.webp(sample.id)
        numbers = {name: getattr(sample, name) for name in _NUMBERS}
        numbers |= dict(zip(_POINT, points[row].tolist(), strict=True))
        yield {
            "id": sample.id,
            "image": content and {"bytes": content, "path": None},
            **{name: getattr(sample, name) for name in _TEXTS},
            "neighbors": {"ids": [n for n, _ in near], "distances": [d for _, d in near]},
            **{name: None if np.isnan(value) else value for name, value in numbers.items()},
        }
