"""Decisions as rows of the growth folder's parquet (the columns of ledger.SCHEMA)."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from infogrowth.growth.decisions import DecisionBatch
from infogrowth.growth.ledger import SCHEMA, SPACES


def decision_table(batch: DecisionBatch, source_rows: np.ndarray) -> pa.Table:
    """The engine's decisions as columns of :data:`SCHEMA` (without ``row`` and ``source``)."""
    columns: dict[str, Any] = {
        "source_row": pa.array(source_rows, pa.int64()),
        "id": pa.array(batch.ids, pa.string()),
        "verdict": pa.array(batch.verdicts, pa.string()),
        "reason": pa.array(batch.reasons, pa.string()),
        "alignment": _numbers(batch.alignment),
        "original_alignment": _numbers(batch.original_alignment),
        "gain_image": _numbers(batch.gains[:, 0]),
        "gain_text": _numbers(batch.gains[:, 1]),
        "caption": pa.array(batch.captions, pa.string()),
        "original_caption": pa.array(batch.original_captions, pa.string()),
    }
    for space in SPACES:
        ids, offsets = batch.neighbor_ids(space)
        distances, _ = batch.neighbor_distances(space)
        places = pa.array(offsets, pa.int32())
        columns[f"{space}_neighbors"] = pa.ListArray.from_arrays(places, pa.array(ids, pa.string()))
        columns[f"{space}_distances"] = pa.ListArray.from_arrays(
            places, pa.array(distances, pa.float64())
        )
    return _in_order(columns)


def refusal_table(
    source_rows: np.ndarray, ids: Sequence[str], captions: Sequence[str], reasons: Sequence[str]
) -> pa.Table:
    """Records of samples that could not be offered to the engine at all (no id, no caption)."""
    count = len(ids)
    empty: list[list[Any]] = [[] for _ in range(count)]
    columns: dict[str, Any] = {field.name: pa.nulls(count, field.type) for field in SCHEMA}
    columns.update(
        source_row=pa.array(source_rows, pa.int64()),
        id=pa.array(ids, pa.string()),
        verdict=pa.array(["dropped"] * count, pa.string()),
        reason=pa.array(reasons, pa.string()),
        caption=pa.array(captions, pa.string()),
        original_caption=pa.array(captions, pa.string()),
        **{
            name: pa.array(empty, SCHEMA.field(name).type)
            for space in SPACES
            for name in (f"{space}_neighbors", f"{space}_distances")
        },
    )
    return _in_order(columns)


def _in_order(columns: dict[str, Any]) -> pa.Table:
    """The columns of :data:`SCHEMA` after ``row`` and ``source``, which the ledger adds."""
    return pa.table({name: columns[name] for name in SCHEMA.names[2:]})


def _numbers(values: np.ndarray) -> pa.Array:
    """float64 with NaN (absent) as null."""
    return pa.array(values, pa.float64(), mask=np.isnan(values))
