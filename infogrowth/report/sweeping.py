"""What other thresholds would have kept, from the recorded decisions alone.

The counts of a threshold are exact as far as the record goes: a sample is kept when its own
caption reaches the threshold, recaptioned when only its new one does. What the record cannot tell
is how well a recaption fits that was never looked at, or was refused; where that matters the count
is a range. The gains are those recorded: with another kept set they would differ a little, as the
nearest kept samples would be others.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from infogrowth.errors import UserError
from infogrowth.growth.sampling import normalized_gains, select_top
from infogrowth.growth.thresholds import StreamEstimate
from infogrowth.report.dataset import GrowthTable

if TYPE_CHECKING:  # the tables need no matplotlib
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from infogrowth.report.charts import Palette

UNKNOWN_RECAPTION = "alignment and recaption below min_align"
DUPLICATE = "id is already in the dataset"
DEFAULT_SHARES = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)


@dataclass(frozen=True)
class ThresholdRow:
    """What ``min_align`` = ``threshold`` would have kept.

    ``kept`` is exact when ``kept_at_most`` equals it; otherwise recaptions whose fit is not on
    record could add up to ``kept_at_most``.
    """

    threshold: float
    kept: int
    kept_at_most: int
    recaptioned: int
    dropped: int
    mean_gain: float | None  # of the kept samples, as recorded
    in_force: bool
    purity: float | None = None  # estimated share of right captions above it, of the stream's own
    right_lost: float | None = None  # estimated share of the stream's right captions below it

    @property
    def exact(self) -> bool:
        """Whether the record tells the count to the sample."""
        return self.kept == self.kept_at_most


@dataclass(frozen=True)
class TopRow:
    """What a static selection of the ``count`` samples of largest gain keeps."""

    count: int
    share: float  # of the kept samples
    min_gain: float  # mean of image and text gain of the last one in
    mean_gain: float
    information: float  # share of the sum of the normalized gains


@dataclass(frozen=True)
class Sweep:
    """The whole answer, with the sentences a reader needs to judge it."""

    thresholds: list[ThresholdRow]
    tops: list[TopRow]
    notes: list[str]

    def as_json(self) -> dict[str, Any]:
        """Plain values for ``--json``."""
        rows = [asdict(row) | {"exact": row.exact} for row in self.thresholds]
        return {"thresholds": rows, "tops": [asdict(row) for row in self.tops], "notes": self.notes}


def sweep(table: GrowthTable, thresholds: Sequence[float] = (), tops: Sequence[int] = ()) -> Sweep:
    """Evaluate ``thresholds`` and ``tops``; both have sensible defaults when empty.

    Raises:
        UserError: no alignments on record, or a top that is not between 1 and the kept count.
    """
    if not np.isfinite(table.original_alignment).any():
        raise UserError(f"{table.name!r} has no alignments on record, so nothing to sweep")
    values = _thresholds(table, thresholds)
    rows = [_threshold_row(table, value) for value in values]
    gains = table.gains[table.kept]
    return Sweep(rows, _top_rows(gains, tops), _notes(table, rows))


def _thresholds(table: GrowthTable, given: Sequence[float]) -> list[float]:
    if given:
        values = {float(value) for value in given}
    else:
        finite = table.original_alignment[np.isfinite(table.original_alignment)]
        low, high = np.quantile(finite, [0.005, 0.995])
        step = 0.05 if high - low > 0.4 else 0.02
        values = set(np.round(np.arange(np.floor(low / step), np.ceil(high / step) + 1) * step, 6))
    if table.min_align is not None:
        values.add(table.min_align)
    return sorted(float(value) for value in values)


def _threshold_row(table: GrowthTable, threshold: float) -> ThresholdRow:
    """Which rows pass, decided in float32 like the engine; an id counts once."""
    limit = np.float32(threshold)
    original, final = (
        values.astype(np.float32) for values in (table.original_alignment, table.alignment)
    )
    own = (original >= limit) | table.seeds & table.kept
    new = ~own & table.recaptioned & (final >= limit)
    unknown = ~own & ~new & _fit_not_on_record(table, threshold)
    kept = _once_per_id(table, own | new)
    at_most = _once_per_id(table, own | new | unknown)
    gain = table.mean_gain[kept]
    gain = gain[np.isfinite(gain)]
    return ThresholdRow(
        threshold=threshold,
        kept=int(kept.sum()),
        kept_at_most=int(at_most.sum()),
        recaptioned=int((kept & new).sum()),
        dropped=int(len(kept) - kept.sum()),
        mean_gain=float(gain.mean()) if len(gain) else None,
        in_force=table.min_align is not None and threshold == table.min_align,
        purity=_share(table.estimate and table.estimate.purity(threshold)),
        right_lost=_share(table.estimate and table.estimate.right_lost(threshold)),
    )


def _share(value: Any) -> float | None:
    return None if value is None or not np.isfinite(value) else float(value)


def _fit_not_on_record(table: GrowthTable, threshold: float) -> np.ndarray:
    """Rows whose recaption might reach ``threshold``, but was refused or never looked at."""
    in_force = table.min_align
    if in_force is None or threshold == in_force:
        return np.zeros(len(table.ids), dtype=bool)
    if threshold < in_force:  # a refused recaption is under min_align, perhaps not under this
        return table.reasons == UNKNOWN_RECAPTION
    never_looked_at = np.isfinite(table.original_alignment) & (
        table.original_alignment.astype(np.float32) >= np.float32(in_force)
    )
    return never_looked_at if _had_recaptions(table) else np.zeros(len(table.ids), dtype=bool)


def _had_recaptions(table: GrowthTable) -> bool:
    return bool(table.recaptioned.any() or (table.reasons == UNKNOWN_RECAPTION).any())


def _once_per_id(table: GrowthTable, passes: np.ndarray) -> np.ndarray:
    """The rows that would be kept: the first passing one of each id."""
    if not (table.reasons == DUPLICATE).any():
        return passes
    seen: set[str] = set()
    kept = np.zeros_like(passes)
    for row in np.flatnonzero(passes).tolist():
        if table.ids[row] not in seen:
            seen.add(table.ids[row])
            kept[row] = True
    return kept


def _top_rows(gains: np.ndarray, tops: Sequence[int]) -> list[TopRow]:
    count = len(gains)
    if count == 0 or not (gains.mean(axis=1) > 0).any():
        return []
    for top in tops:
        if not 1 <= top <= count:
            raise UserError(f"--tops {top} is not between 1 and the {count} kept samples")
    chosen = sorted(set(tops)) or sorted({max(1, round(count * s)) for s in DEFAULT_SHARES})
    mean, normalized = gains.mean(axis=1), normalized_gains(gains)
    rows = []
    for top in chosen:
        selected = select_top(gains, top)
        rows.append(
            TopRow(
                count=top,
                share=top / count,
                min_gain=float(mean[selected].min()),
                mean_gain=float(mean[selected].mean()),
                information=float(normalized[selected].sum() / normalized.sum()),
            )
        )
    return rows


def _notes(table: GrowthTable, rows: list[ThresholdRow]) -> list[str]:
    notes = [
        "Kept counts by threshold come from the recorded alignments; nothing is embedded again."
    ]
    if all(row.exact for row in rows):
        given = ", provided that no recaptions are offered, as in this growth"
        notes.append(f"All of them are exact{'' if _had_recaptions(table) else given}.")
    else:
        notes.append(
            "Where a range is given, samples have or may have a recaption whose fit is not on "
            "record: the lower count holds if none of them fits, the upper if all do."
        )
    notes.append(
        "Gains are those recorded in this growth. With another threshold other samples would be "
        "kept, the nearest neighbors would change and so would the gains: take them as estimates."
    )
    if table.estimate is not None:
        low, high = (100 * share for share in table.estimate.noise_interval)
        notes.append(
            f"Purity and right captions lost are estimates from {table.estimate.seeds} seeds: "
            f"{100 * table.estimate.noise:.1f} % of the stream's captions seem wrong ({low:.1f} to "
            f"{high:.1f} %). They count own captions only, not new ones."
        )
    notes.append("Static selection of the top N from the dataset as it is: exact.")
    return notes


def sweep_figure(
    found: Sweep, palette: Palette, width: float = 760, stacked: bool = False
) -> Figure:
    """Samples kept by threshold, and the information kept by the top N.

    Args:
        stacked: one chart under the other, for narrow screens.
    """
    from infogrowth.report.charts import chart_style, new_figure

    with chart_style(palette):
        figure = new_figure(width, 820 if stacked else 300)
        draw = [_draw_thresholds]
        draw += [_draw_purity] * any(row.purity is not None for row in found.thresholds)
        draw += [_draw_tops] * bool(found.tops)
        shape = (len(draw), 1) if stacked else (1, len(draw))
        panels = figure.subplots(*shape, squeeze=False).flat
        for axes, panel in zip(panels, draw, strict=True):
            panel(axes, found, palette)
        return figure


def purity_figure(
    estimate: StreamEstimate, min_align: float | None, palette: Palette, width: float = 350
) -> Figure:
    """Estimated purity and loss over all thresholds that keep something."""
    from infogrowth.report.charts import chart_style, new_figure

    with chart_style(palette):
        figure = new_figure(width, 260)
        at = np.quantile(estimate.stream, np.linspace(0, 0.99, 200))
        _purity_curves(
            figure.subplots(), at, estimate.purity(at), estimate.right_lost(at), min_align, palette
        )
        return figure


def _draw_purity(axes: Axes, found: Sweep, palette: Palette) -> None:
    rows = [row for row in found.thresholds if row.purity is not None]
    columns = ([getattr(row, name) for row in rows] for name in ("threshold", "purity"))
    at, purity = (np.array(column, float) for column in columns)
    lost = np.array([np.nan if row.right_lost is None else row.right_lost for row in rows])
    in_force = next((row.threshold for row in found.thresholds if row.in_force), None)
    _purity_curves(axes, at, purity, lost, in_force, palette)


def _purity_curves(
    axes: Axes, at: np.ndarray, purity: np.ndarray, lost: np.ndarray, min_align: float | None,
    palette: Palette,
) -> None:  # fmt: skip
    from infogrowth.report.charts import legend_above

    axes.plot(at, 100 * (1 - purity), color=palette.dropped, label="wrong among kept")
    axes.plot(at, 100 * lost, color=palette.image, label="right ones lost")
    if min_align is not None:
        axes.axvline(min_align, color=palette.ink, linewidth=1.2, linestyle=(0, (4, 2.5)))
    axes.set_ylim(0, None)
    axes.set_xlim(float(at.min()), float(at.max()) if at.max() > at.min() else None)
    axes.set_xlabel("alignment threshold (min_align)")
    axes.set_ylabel("percent (estimated)")
    legend_above(axes, columns=2)


def _draw_thresholds(axes: Axes, found: Sweep, palette: Palette) -> None:
    at = [row.threshold for row in found.thresholds]
    kept = [row.kept for row in found.thresholds]
    own = [row.kept - row.recaptioned for row in found.thresholds]
    axes.plot(at, kept, color=palette.kept, marker="o", markersize=3.5, label="kept")
    if any(row.recaptioned for row in found.thresholds):
        axes.fill_between(
            at, own, kept, color=palette.recaptioned, alpha=0.45, linewidth=0, label="recaptioned"
        )
    if not all(row.exact for row in found.thresholds):
        most = [row.kept_at_most for row in found.thresholds]
        axes.plot(at, most, color=palette.kept, linestyle=(0, (1, 1.5)), label="at most")
    for row in found.thresholds:
        if row.in_force:
            axes.axvline(row.threshold, color=palette.ink, linewidth=1.2, linestyle=(0, (4, 2.5)))
            axes.annotate(
                "in force",
                (row.threshold, 0),
                xycoords=("data", "axes fraction"),
                xytext=(5, 5),
                textcoords="offset points",
                fontsize=10,
            )
    axes.set_ylim(bottom=0)
    axes.set_xlabel("alignment threshold (min_align)")
    axes.set_ylabel("samples kept")
    _finish(axes, "y")


def _draw_tops(axes: Axes, found: Sweep, palette: Palette) -> None:
    counts = [row.count for row in found.tops]
    axes.plot(
        [0, *counts],
        [0, *(100 * row.information for row in found.tops)],
        color=palette.image,
        marker="o",
        markersize=3.5,
        label="top N by gain",
    )
    axes.plot(
        [0, counts[-1]],
        [0, 100 * found.tops[-1].share],
        color=palette.muted,
        linestyle=(0, (1, 1.5)),
        label="at random",
    )
    axes.set_ylim(0, 103)
    axes.set_xlim(left=0)
    axes.set_xlabel("samples selected (N)")
    axes.set_ylabel("information kept (percent)")
    _finish(axes, "x")


def _finish(axes: Axes, counted: str) -> None:
    from infogrowth.report.charts import compact_counts, legend_above

    compact_counts(axes, counted)
    legend_above(axes)
