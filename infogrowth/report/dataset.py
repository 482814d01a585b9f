"""What a report looks at: a growth folder or a result JSON, read into columns in stream order.

Everything else in this package works on :class:`GrowthTable` and knows no file layout.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import numpy as np
import pyarrow as pa

from infogrowth.annotations import gains_array, load_annotations
from infogrowth.errors import UserError
from infogrowth.growth.decisions import Decision, Reason, Verdict
from infogrowth.growth.ledger import read_growth
from infogrowth.growth.thresholds import StreamEstimate

_NEIGHBORS = [
    f"{space}_{what}" for space in ("image", "text") for what in ("neighbors", "distances")
]
_RECAPTION = ["captioner", "recaption_alignment", "recaption_rule"]
_COLUMNS = [
    *("id", "verdict", "reason", "alignment", "original_alignment", "gain_image", "gain_text"),
    *("caption", "original_caption", "source", "source_row"),
    *_NEIGHBORS,
    *_RECAPTION,
]


@dataclass(frozen=True)
class Neighbor:
    """One of the nearest kept samples when a sample arrived, with the caption it is known by."""

    id: str
    distance: float  # cosine
    caption: str


@dataclass(frozen=True)
class GrowthTable:
    """Decisions as columns: a row per sample that was seen, in the order of the stream (N rows).

    A result JSON has kept samples only: its alignments are NaN, and it has neither neighbors nor
    features, so what needs them is left out of the report.
    """

    name: str
    settings: dict[str, Any]
    ids: list[str]
    captions: list[str]
    original_captions: list[str]
    verdicts: np.ndarray  # (N,) str: "kept", "recaptioned" or "dropped"
    reasons: np.ndarray  # (N,) str
    alignment: np.ndarray  # (N,) float64, NaN where unknown
    original_alignment: np.ndarray  # (N,) float64
    gains: np.ndarray  # (N, 2) float64: image, text
    sources: np.ndarray  # (N,) str: where the sample came from, "" when unknown
    skipped: dict[str, int] = field(default_factory=dict)  # reason -> samples
    neighbor_table: pa.Table | None = None  # and what is recorded of new captions
    kept_features: Callable[[str], np.ndarray] | None = None  # "image" | "text" -> (kept, D)
    estimate: StreamEstimate | None = None  # of wrong captions; None without enough seeds

    @property
    def kept(self) -> np.ndarray:
        """(N,) bool: rows that are in the grown set, the recaptioned ones too."""
        return self.verdicts != "dropped"

    @property
    def recaptioned(self) -> np.ndarray:
        """(N,) bool: rows kept with a new caption."""
        return self.verdicts == "recaptioned"

    @property
    def seeds(self) -> np.ndarray:
        """(N,) bool: rows of the trusted start set."""
        return self.reasons == "seed"

    @property
    def mean_gain(self) -> np.ndarray:
        """(N,) float64: mean of the image and the text gain, NaN where it was not computed."""
        return self.gains.mean(axis=1)

    @property
    def has_text(self) -> bool:
        """False for class-labeled images (modality "image"), which have one gain only."""
        return self.settings.get("modality", "pair") != "image"

    @property
    def has_decisions(self) -> bool:
        """False for a result JSON, which holds nothing but what was kept."""
        return self.neighbor_table is not None

    @property
    def min_align(self) -> float | None:
        """The alignment threshold in force, if it is known."""
        value = self.settings.get("min_align")
        return None if value is None else float(value)

    @property
    def images(self) -> str | None:
        """The path of the images, if the growth folder knows it."""
        return self.settings.get("images")

    def decision(self, row: int) -> Decision:
        """The record of ``row``; unknown numbers are None."""
        reason = str(self.reasons[row])
        return Decision(
            id=self.ids[row],
            verdict=Verdict(str(self.verdicts[row])),
            reason=cast(Reason, reason),  # a folder may hold reasons of the reader, too
            alignment=_known(self.alignment[row]),
            original_alignment=_known(self.original_alignment[row]),
            gain_image=_known(self.gains[row, 0]),
            gain_text=_known(self.gains[row, 1]) if self.has_text else None,
            image_neighbors=self._nearest(row, "image"),
            text_neighbors=self._nearest(row, "text"),
            caption=self.captions[row],
            original_caption=self.original_captions[row],
            **self._recaption(row),
        )

    def _recaption(self, row: int) -> dict[str, Any]:
        table = self.neighbor_table
        if table is None:
            return {}
        return {name: table[name][row].as_py() for name in _RECAPTION if name in table.column_names}

    def neighbors(self, row: int, space: str) -> list[Neighbor]:
        """The nearest kept samples in ``space`` when ``row`` arrived, nearest first."""
        near = self._nearest(row, space)
        return [
            Neighbor(name, distance, self.known_captions.get(name, "")) for name, distance in near
        ]

    @cached_property
    def known_captions(self) -> dict[str, str]:
        """The caption under which each id is known; a kept row speaks for an id that came twice."""
        known = dict(zip(self.ids, self.captions, strict=True))
        known.update((self.ids[row], self.captions[row]) for row in np.flatnonzero(self.kept))
        return known

    def _nearest(self, row: int, space: str) -> list[tuple[str, float]]:
        if self.neighbor_table is None:
            return []
        names = self.neighbor_table[f"{space}_neighbors"][row].as_py() or []
        distances = self.neighbor_table[f"{space}_distances"][row].as_py() or []
        return list(zip(names, distances, strict=True))


def open_growth(directory: str | os.PathLike[str]) -> GrowthTable:
    """Read a growth folder.

    Raises:
        UserError: it is no growth folder, or it is damaged.
    """
    folder = read_growth(directory)
    table = _last_word(folder.decisions(columns=_COLUMNS), folder.sources)
    gains = np.stack([_numbers(table["gain_image"]), _numbers(table["gain_text"])], axis=1)
    if folder.settings.get("modality") == "image":
        gains[:, 1] = gains[:, 0]  # as in the result JSON: one gain in both columns
    names = np.array([_source_name(source) for source in folder.sources] or [""], dtype=np.str_)
    return GrowthTable(
        name=Path(directory).resolve().name,
        settings=dict(folder.settings),
        ids=_texts(table["id"]),
        captions=_texts(table["caption"]),
        original_captions=_texts(table["original_caption"]),
        verdicts=_strings(table["verdict"]),
        reasons=_strings(table["reason"]),
        alignment=_numbers(table["alignment"]),
        original_alignment=_numbers(table["original_alignment"]),
        gains=gains,
        sources=names[table["source"].to_numpy()],
        skipped=_skipped(folder.sources),
        neighbor_table=table.select([*_NEIGHBORS, *_RECAPTION]),
        kept_features=folder.kept_features,
        estimate=folder.estimate(),
    )


def open_annotations(path: str | os.PathLike[str]) -> GrowthTable:
    """Read a result JSON: kept samples, captions and gains, nothing else.

    Raises:
        UserError: not a result JSON, or a sample without gains.
    """
    annotations = load_annotations(path)
    if not annotations:
        raise UserError(f"{path} holds no samples; there is nothing to report on")
    count = len(annotations)
    captions = [_one_caption(entry["caption"]) for entry in annotations]
    unknown = np.full(count, np.nan)
    return GrowthTable(
        name=Path(path).name,
        settings={},
        ids=[entry["image"] for entry in annotations],
        captions=captions,
        original_captions=captions,
        verdicts=np.full(count, "kept"),
        reasons=np.full(count, ""),
        alignment=unknown,
        original_alignment=unknown,
        gains=gains_array(annotations),
        sources=np.full(count, ""),
    )


def _last_word(table: pa.Table, sources: list[dict[str, Any]]) -> pa.Table:
    """One row per sample: one that was processed again counts by its last decision.

    Only dropped samples are processed again, so the order of the kept rows does not change.
    """
    origin = np.arange(len(sources) + 1)
    for number, source in enumerate(sources):  # a source retries an earlier one only
        if source.get("retries") is not None:
            origin[number] = origin[source["retries"]]
    if len(np.unique(origin)) == len(origin):
        return table
    of_sample = np.stack([origin[table["source"].to_numpy()], table["source_row"].to_numpy()])
    _, last_from_end = np.unique(of_sample[:, ::-1], axis=1, return_index=True)
    return table.take(pa.array(np.sort(table.num_rows - 1 - last_from_end)))


def _source_name(source: dict[str, Any]) -> str:
    kind = {"seed": "seeds from ", "retry": "processed again from "}.get(source["kind"], "")
    return kind + (Path(source["features"]).name or source["features"])


def _skipped(sources: list[dict[str, Any]]) -> dict[str, int]:
    """Samples without features by reason; features that were read twice are counted once."""
    by_features: dict[str, dict[str, int]] = {}
    for source in sources:
        counts = by_features.setdefault(source["features"], {})
        for reason, count in source["skipped"].items():
            counts[reason] = max(count, counts.get(reason, 0))
    total: dict[str, int] = {}
    for counts in by_features.values():
        for reason, count in counts.items():
            total[reason] = total.get(reason, 0) + count
    return total


def _known(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None


def _one_caption(caption: str | list[str]) -> str:
    return caption if isinstance(caption, str) else " / ".join(caption)


def _texts(column: pa.ChunkedArray) -> list[str]:
    return [text or "" for text in column.to_pylist()]


def _strings(column: pa.ChunkedArray) -> np.ndarray:
    return np.array(_texts(column), dtype=np.str_)


def _numbers(column: pa.ChunkedArray) -> np.ndarray:
    return column.cast(pa.float64()).fill_null(np.nan).to_numpy(zero_copy_only=False)
