"""What a report looks at: a growth folder or a result JSON as one table, a row per sample.

Everything else in this package works on :class:`GrowthTable` and knows no file layout.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa

from infogrowth.annotations import gains_array, load_annotations
from infogrowth.errors import UserError
from infogrowth.growth.ledger import read_growth
from infogrowth.growth.sources import SourceProgress
from infogrowth.growth.thresholds import StreamEstimate

TEXTS = ("id", "caption", "original_caption", "verdict", "reason", "captioner", "recaption_rule")
NUMBERS = (
    *("alignment", "original_alignment", "recaption_alignment"),
    *("gain_image", "gain_text"),
)
_NEIGHBORS = [
    f"{space}_{what}" for space in ("image", "text") for what in ("neighbors", "distances")
]


@dataclass(frozen=True, eq=False)
class GrowthTable:
    """The last decision about each sample that was seen, in the order of the stream (N rows).

    A result JSON has kept samples only: its alignments are NaN, and it has neither neighbors nor
    features, so what needs them is left out of the report.

    Attributes:
        rows: N rows, index 0 … N − 1; the columns of a growth folder's decisions that
            :data:`TEXTS` ("" where there is none) and :data:`NUMBERS` (float64, NaN) name, and
            ``source``, the name of where the sample came from.
        neighbors: the columns of the neighbors, N rows; None for a result JSON.
        skipped: samples that came without usable features, by reason.
        kept_features: "image" or "text" -> (kept, D) float32 unit rows.
        estimate: of wrong captions; None without enough seeds.
    """

    name: str
    rows: pd.DataFrame
    settings: dict[str, Any] = field(default_factory=dict)
    neighbors: pa.Table | None = None
    skipped: dict[str, int] = field(default_factory=dict)
    kept_features: Callable[[str], np.ndarray] | None = None
    estimate: StreamEstimate | None = None

    def __post_init__(self) -> None:
        rows = self.rows
        rows["gain"] = self.gains.mean(axis=1)
        rows["improvement"] = rows.alignment - rows.original_alignment  # by the new caption

    @cached_property
    def kept(self) -> np.ndarray:
        """(N,) bool: rows that are in the grown set, the recaptioned ones too."""
        return (self.rows.verdict != "dropped").to_numpy(bool)

    @property
    def gains(self) -> np.ndarray:
        """(N, 2) float64: image, text; labeled images have their one gain in both columns."""
        image, text = (self.rows[f"gain_{space}"] for space in ("image", "text"))
        return np.column_stack([image, text if self.has_text else image])

    @property
    def has_text(self) -> bool:
        """False for class-labeled images (modality "image"), which have one gain only."""
        return self.settings.get("modality", "pair") != "image"

    @property
    def min_align(self) -> float | None:
        """The alignment threshold in force, if it is known."""
        value = self.settings.get("min_align")
        return None if value is None else float(value)

    def near(self, row: int, space: str) -> list[dict[str, Any]]:
        """``id``, cosine ``distance`` and ``caption`` (by which it is known) of the nearest kept
        samples in ``space`` when ``row`` arrived, nearest first."""
        if self.neighbors is None:
            return []
        ids, distances = (
            self.neighbors[f"{space}_{what}"][row].as_py() or []
            for what in ("neighbors", "distances")
        )
        return [
            {"id": name, "distance": distance, "caption": self.known_captions.get(name, "")}
            for name, distance in zip(ids, distances, strict=True)
        ]

    @cached_property
    def known_captions(self) -> dict[str, str]:
        """The caption under which each id is known; a kept row speaks for an id that came twice."""
        in_order = pd.concat([self.rows[~self.kept], self.rows[self.kept]])
        return dict(zip(in_order.id, in_order.caption, strict=True))


def open_dataset(path: str | os.PathLike[str]) -> GrowthTable:
    """Read a growth folder, or a file of kept samples with their gains (a result).

    Raises:
        UserError: it is neither, it is damaged or empty, or a sample has no gains.
    """
    return open_growth(path) if Path(path).is_dir() else open_annotations(path)


def open_growth(directory: str | os.PathLike[str]) -> GrowthTable:
    """Read a growth folder; UserError if it is none, or damaged."""
    folder = read_growth(directory)
    table = _last_decisions(
        folder.decisions([*TEXTS, *NUMBERS, "source", "source_row", *_NEIGHBORS]), folder.sources
    )
    names = np.array([_source_name(source) for source in folder.sources] or [""], dtype=object)
    rows = table.select([*TEXTS, *NUMBERS]).to_pandas()
    rows = rows.fillna(dict.fromkeys(TEXTS, "")).astype(dict.fromkeys(NUMBERS, np.float64))
    rows["source"] = names[table["source"].to_numpy()]
    return GrowthTable(
        Path(directory).resolve().name,
        rows,
        dict(folder.settings),
        table.select(_NEIGHBORS),
        _skipped(folder.sources),
        folder.kept_features,
        folder.estimate(),
    )


def open_annotations(path: str | os.PathLike[str]) -> GrowthTable:
    """Read a result: kept samples, captions and gains, nothing else; UserError if it is none."""
    annotations = load_annotations(path)
    if not annotations:
        raise UserError(f"{path} holds no samples; there is nothing to report on")
    captions = [entry["caption"] for entry in annotations]
    rows = pd.DataFrame(
        dict.fromkeys([*TEXTS, "source"], "") | dict.fromkeys(NUMBERS, np.nan),
        index=range(len(annotations)),
    )
    rows["id"] = [entry["image"] for entry in annotations]
    rows["caption"] = [text if isinstance(text, str) else " / ".join(text) for text in captions]
    rows["original_caption"], rows["verdict"] = rows.caption, "kept"
    rows[["gain_image", "gain_text"]] = gains_array(annotations)
    return GrowthTable(Path(path).name, rows)


def _last_decisions(table: pa.Table, sources: list[SourceProgress]) -> pa.Table:
    """One row per sample: one that was processed again counts by its last decision.

    Only dropped samples are processed again, so the order of the kept rows does not change.
    """
    origin = np.arange(len(sources) + 1)
    for number, source in enumerate(sources):  # a source retries an earlier one only
        if source.retries is not None:
            origin[number] = origin[source.retries]
    samples = pd.DataFrame(
        {"origin": origin[table["source"].to_numpy()], "row": table["source_row"].to_numpy()}
    )
    again = samples.duplicated(keep="last").to_numpy()
    return table.filter(pa.array(~again)) if again.any() else table


def _source_name(source: SourceProgress) -> str:
    kind = {"seed": "seeds from ", "retry": "processed again from "}.get(source.kind, "")
    return kind + (Path(source.features).name or source.features)


def _skipped(sources: list[SourceProgress]) -> dict[str, int]:
    """Samples without features by reason; features that were read twice are counted once."""
    counts = pd.DataFrame(
        [
            (source.features, reason, count)
            for source in sources
            for reason, count in source.skipped.items()
        ],
        columns=["features", "reason", "count"],
    )
    of_features = counts.groupby(["features", "reason"], sort=False)["count"].max()
    return {str(r): int(n) for r, n in of_features.groupby("reason", sort=False).sum().items()}
