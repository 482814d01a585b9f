"""Two grown datasets side by side: what both kept, what only one kept, and how new that was."""

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from infogrowth.data.names import image_key
from infogrowth.report.charts import Palette, chart_style, compact_counts, legend_above, new_figure
from infogrowth.report.dataset import GrowthTable
from infogrowth.report.galleries import GALLERY_SIZE, SORT_KEYS, CardMaker, Gallery, Thumbnails


@dataclass(frozen=True)
class Part:
    """Samples of one kind: only in A, only in B, or in both (then with A's gains)."""

    count: int
    gain_image: float | None  # means, None without samples
    gain_text: float | None
    most_novel: list[str]  # ids, largest mean gain first


@dataclass(frozen=True)
class Comparison:
    """What ``compare`` reports."""

    name_a: str
    name_b: str
    count_a: int
    count_b: int
    both: Part
    only_a: Part
    only_b: Part
    overlap: float  # intersection over union
    other_caption: int  # in both, with different captions
    gain_difference: float | None  # mean of |A's mean gain - B's| over what is in both
    gain_correlation: float | None  # Pearson's, over what is in both

    def as_json(self) -> dict[str, Any]:
        """Plain values for ``--json``."""
        return asdict(self)


@dataclass(frozen=True)
class Matched:
    """Rows of A and B by key; equal positions in the two ``both`` are one sample."""

    both_a: np.ndarray
    both_b: np.ndarray
    only_a: np.ndarray
    only_b: np.ndarray


def match(a: GrowthTable, b: GrowthTable) -> Matched:
    """Match kept samples by id, with or without a extension; the first of equal ids counts."""
    rows_a, rows_b = _rows_by_key(a), _rows_by_key(b)
    both = [key for key in rows_a if key in rows_b]

    def rows(mapping: dict[str, int], keys: list[str]) -> np.ndarray:
        return np.array([mapping[key] for key in keys], dtype=np.int64)

    return Matched(
        both_a=rows(rows_a, both),
        both_b=rows(rows_b, both),
        only_a=rows(rows_a, [key for key in rows_a if key not in rows_b]),
        only_b=rows(rows_b, [key for key in rows_b if key not in rows_a]),
    )


def compare(a: GrowthTable, b: GrowthTable, limit: int = 10) -> Comparison:
    """Compare what A and B kept; ``limit`` ids are listed per part."""
    found = match(a, b)
    gain_a, gain_b = a.mean_gain[found.both_a], b.mean_gain[found.both_b]
    union = len(found.both_a) + len(found.only_a) + len(found.only_b)
    other = sum(
        a.captions[row_a] != b.captions[row_b]
        for row_a, row_b in zip(found.both_a.tolist(), found.both_b.tolist(), strict=True)
    )
    return Comparison(
        name_a=a.name,
        name_b=b.name,
        count_a=len(found.both_a) + len(found.only_a),
        count_b=len(found.both_b) + len(found.only_b),
        both=_part(a, found.both_a, limit),
        only_a=_part(a, found.only_a, limit),
        only_b=_part(b, found.only_b, limit),
        overlap=len(found.both_a) / union if union else 1.0,
        other_caption=other,
        gain_difference=_known(np.abs(gain_a - gain_b).mean()) if len(gain_a) else None,
        gain_correlation=_correlation(gain_a, gain_b),
    )


def by_gain(table: GrowthTable, rows: np.ndarray) -> np.ndarray:
    """``rows`` with the largest mean gain first, ties in stream order."""
    return rows[np.argsort(-np.nan_to_num(table.mean_gain[rows]), kind="stable")]


def _rows_by_key(table: GrowthTable) -> dict[str, int]:
    rows: dict[str, int] = {}
    for row in np.flatnonzero(table.kept).tolist():
        rows.setdefault(image_key(table.ids[row]), row)
    return rows


def _part(table: GrowthTable, rows: np.ndarray, limit: int) -> Part:
    means = table.gains[rows].mean(axis=0) if len(rows) else (np.nan, np.nan)
    return Part(
        count=len(rows),
        gain_image=_known(means[0]),
        gain_text=_known(means[1]),
        most_novel=[table.ids[row] for row in by_gain(table, rows)[:limit]],
    )


def _correlation(first: np.ndarray, second: np.ndarray) -> float | None:
    if len(first) < 2 or np.ptp(first) == 0 or np.ptp(second) == 0:
        return None
    return _known(np.corrcoef(first, second)[0, 1])


def _known(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None


def compare_figure(
    a: GrowthTable, b: GrowthTable, found: Matched, palette: Palette, width: float = 1000
) -> Figure:
    """Histograms of the mean gain of what only A, both, and only B kept."""
    with chart_style(palette):
        figure = new_figure(width, 280)
        axes = figure.subplots()
        parts = [
            ("only in A", a.mean_gain[found.only_a], palette.image),
            ("in both", a.mean_gain[found.both_a], palette.kept),
            ("only in B", b.mean_gain[found.only_b], palette.text),
        ]
        parts = [(name, gain[np.isfinite(gain)], color) for name, gain, color in parts]
        everything = np.concatenate([gain for _, gain, _ in parts])
        top = float(np.quantile(everything, 0.999)) if len(everything) else 1.0
        edges = np.linspace(0, max(top, 1e-6), 41)
        for name, gain, color in parts:
            if len(gain):
                heights, _ = np.histogram(np.clip(gain, 0, edges[-1]), bins=edges)
                axes.stairs(heights, edges, fill=True, color=color, alpha=0.25, linewidth=0)
                axes.stairs(heights, edges, color=color, linewidth=1.6, label=name)
        axes.set_ylim(bottom=0)
        axes.set_xlim(0, edges[-1])
        axes.set_xlabel("mean gain")
        axes.set_ylabel("samples")
        compact_counts(axes, "y")
        legend_above(axes)
        return figure


def compare_galleries(
    a: GrowthTable, b: GrowthTable, found: Matched, thumbnails: Thumbnails
) -> list[Gallery]:
    """The most novel samples that only one of the two kept."""
    made = []
    for key, table, rows in (("A", a, found.only_a), ("B", b, found.only_b)):
        made.append(
            CardMaker(table, thumbnails).gallery(
                f"only-{key.lower()}",
                f"Only in {key}",
                f"Samples of {table.name} that the other does not have, most novel first.",
                rows,
                by_gain(table, rows)[:GALLERY_SIZE],
                SORT_KEYS,
                largest_first=True,
            )
        )
    return [gallery for gallery in made if gallery.cards]
