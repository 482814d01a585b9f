"""A parquet for Embedding Atlas (PyPI ``embedding-atlas``): images, captions, verdicts, gains.

    embedding-atlas FILE.parquet --x projection_x --y projection_y --neighbors neighbors
        --text caption --image image

A row per decision. Kept samples lie where the two principal components of their image features put
them; dropped ones, whose features are not kept, in the middle of their nearest kept neighbors.
"""

import io
import os
from collections.abc import Iterator

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from infogrowth.files import atomic_write
from infogrowth.report.dataset import GrowthTable
from infogrowth.report.galleries import Thumbnails

COMMAND = (
    "embedding-atlas {path} --x projection_x --y projection_y --neighbors neighbors "
    "--text caption --image image"
)
_CHUNK_ROWS = 4096  # rows whose images are held at once
_SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("image", pa.struct([("bytes", pa.binary()), ("path", pa.string())])),
        *((name, pa.string()) for name in ("caption", "original_caption", "verdict", "reason")),
        *((name, pa.float64()) for name in ("alignment", "original_alignment")),
        *((name, pa.float64()) for name in ("gain", "gain_image", "gain_text")),
        ("source", pa.string()),
        *((name, pa.float64()) for name in ("projection_x", "projection_y")),
        (
            "neighbors",
            pa.struct([("ids", pa.list_(pa.int64())), ("distances", pa.list_(pa.float64()))]),
        ),
    ]
)


def write_atlas(path: str | os.PathLike[str], table: GrowthTable, thumbnails: Thumbnails) -> None:
    """Write the decisions for Embedding Atlas, whole or not at all.

    Raises:
        UserError: the file cannot be written.
    """
    kept = np.flatnonzero(table.kept)
    row_of = {table.ids[row]: row for row in kept.tolist()}
    places = np.full((len(table.ids), 2), np.nan)
    if table.kept_features is not None and len(kept):
        places[kept] = _components(table.kept_features("image"))
    with atomic_write(path) as file, pq.ParquetWriter(file, _SCHEMA) as writer:
        for start in range(0, len(table.ids), _CHUNK_ROWS):
            rows = range(start, min(start + _CHUNK_ROWS, len(table.ids)))
            writer.write_table(
                pa.Table.from_pylist(list(_rows(table, rows, row_of, places, thumbnails)), _SCHEMA)
            )


def _rows(
    table: GrowthTable,
    rows: range,
    row_of: dict[str, int],
    places: np.ndarray,
    thumbnails: Thumbnails,
) -> Iterator[dict[str, object]]:
    for row in rows:
        near = [
            (row_of[neighbor.id], neighbor.distance)
            for neighbor in table.neighbors(row, "image")
            if neighbor.id in row_of
        ]
        place = places[row]
        if np.isnan(place).any() and near:
            place = places[[other for other, _ in near]].mean(axis=0)
        # Atlas wants lists of one length. The first samples met fewer neighbors: they fill up with
        # themselves.
        listed = near + [(row, 0.0)] * (int(table.settings.get("k", len(near))) - len(near))
        image = thumbnails.image(table.ids[row])
        content = io.BytesIO()
        if image is not None:
            image.save(content, "WEBP", quality=68, method=4)
        numbers = {
            "alignment": table.alignment[row],
            "original_alignment": table.original_alignment[row],
            "gain": table.mean_gain[row],
            "gain_image": table.gains[row, 0],
            "gain_text": table.gains[row, 1],
            "projection_x": place[0],
            "projection_y": place[1],
        }
        yield {
            "id": table.ids[row],
            "image": image and {"bytes": content.getvalue(), "path": None},
            "caption": table.captions[row],
            "original_caption": table.original_captions[row],
            "verdict": str(table.verdicts[row]),
            "reason": str(table.reasons[row]),
            "source": str(table.sources[row]),
            "neighbors": {"ids": [n for n, _ in listed], "distances": [d for _, d in listed]},
            **{name: None if np.isnan(value) else float(value) for name, value in numbers.items()},
        }


def _components(features: np.ndarray) -> np.ndarray:
    """The two principal components (K, 2) of features (K, D); signs are fixed."""
    mean = features.mean(axis=0, dtype=np.float64)
    spread = np.zeros((features.shape[1], features.shape[1]))
    for start in range(0, len(features), 65_536):
        part = features[start : start + 65_536] - mean
        spread += part.T @ part
    axes = np.linalg.eigh(spread)[1][:, ::-1][:, :2]
    if axes.shape[1] < 2:
        axes = np.column_stack([axes, np.zeros(len(axes))])
    largest = np.abs(axes).argmax(axis=0)
    axes = axes * np.where(axes[largest, [0, 1]] < 0, -1.0, 1.0)
    return features @ axes - mean @ axes
