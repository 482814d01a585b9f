"""What other thresholds would have kept, from the recorded decisions alone.

The counts of a threshold are exact as far as the record goes: a sample is kept when its own
caption reaches the threshold, recaptioned when only its new one does. What the record cannot tell
is how well a recaption fits that was never looked at, or was refused; where that matters the count
is a range. The gains are those recorded: with another kept set they would differ a little, as the
nearest kept samples would be others.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from infogrowth.errors import UserError
from infogrowth.growth.decisions import Reason
from infogrowth.growth.sampling import normalized_gains, select_top
from infogrowth.report.dataset import GrowthTable
from infogrowth.report.formatting import decimal, percent

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
    purity: float | None  # estimated share of right captions above it, of the stream's own
    right_lost: float | None  # estimated share of the stream's right captions below it
    exact: bool


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


def sweep(table: GrowthTable, thresholds: Sequence[float] = (), tops: Sequence[int] = ()) -> Sweep:
    """Evaluate ``thresholds`` and ``tops``; both have sensible defaults when empty.

    Raises:
        UserError: no alignments on record, or a top that is not between 1 and the kept count.
    """
    alignment = table.rows.original_alignment.dropna()
    if not len(alignment):
        raise UserError(f"{table.name!r} has no alignments on record, so nothing to sweep")
    if not thresholds:
        low, high = np.quantile(alignment, [0.005, 0.995])
        step = 0.05 if high - low > 0.4 else 0.02
        grid = np.arange(np.floor(low / step), np.ceil(high / step) + 1) * step
        thresholds = np.round(grid, 6).tolist()
    values = {float(value) for value in thresholds}
    if table.min_align is not None:
        values.add(table.min_align)
    rows = [_threshold_row(table, value) for value in sorted(values)]
    return Sweep(rows, _top_rows(table.gains[table.kept], tops), _notes(table, rows))


def _threshold_row(table: GrowthTable, threshold: float) -> ThresholdRow:
    """Which rows pass, decided in float32 like the engine; an id counts once."""
    rows, limit = table.rows, np.float32(threshold)
    own = rows.original_alignment.astype(np.float32) >= limit
    own |= (rows.reason == Reason.SEED) & table.kept
    new = ~own & (rows.verdict == "recaptioned") & (rows.alignment.astype(np.float32) >= limit)
    kept = _once_per_id(rows, own | new)
    at_most = _once_per_id(rows, own | new | _fit_not_on_record(table, threshold))
    gain, estimate = rows.gain[kept].mean(), table.estimate
    return ThresholdRow(
        threshold=threshold,
        kept=int(kept.sum()),
        kept_at_most=int(at_most.sum()),
        recaptioned=int((kept & new).sum()),
        dropped=int((~kept).sum()),
        mean_gain=_known(gain),
        in_force=table.min_align is not None and threshold == table.min_align,
        purity=_known(estimate.purity(threshold)) if estimate else None,
        right_lost=_known(estimate.right_lost(threshold)) if estimate else None,
        exact=bool(kept.sum() == at_most.sum()),
    )


def _known(value: Any) -> float | None:
    return float(value) if np.isfinite(value) else None


def _fit_not_on_record(table: GrowthTable, threshold: float) -> pd.Series:
    """Rows whose recaption might reach ``threshold``, but was refused or never looked at."""
    rows, in_force = table.rows, table.min_align
    if in_force is not None and threshold < in_force:
        # A refused recaption is under min_align, perhaps not under this.
        return rows.reason == Reason.LOW_RECAPTION
    if in_force is None or threshold == in_force or not _had_recaptions(table):
        return pd.Series(False, rows.index)
    return rows.original_alignment.astype(np.float32) >= np.float32(in_force)  # never looked at


def _had_recaptions(table: GrowthTable) -> bool:
    rows = table.rows
    return bool(((rows.verdict == "recaptioned") | (rows.reason == Reason.LOW_RECAPTION)).any())


def _once_per_id(rows: pd.DataFrame, passes: pd.Series) -> pd.Series:
    """The rows that would be kept: the first passing one of each id."""
    return passes & ~rows.index.isin(rows.index[passes][rows.id[passes].duplicated()])


def _top_rows(gains: np.ndarray, tops: Sequence[int]) -> list[TopRow]:
    count, mean = len(gains), gains.mean(axis=1)
    if not (mean > 0).any():
        return []
    for top in tops:
        if not 1 <= top <= count:
            raise UserError(f"--tops {top} is not between 1 and the {count} kept samples")
    chosen = sorted(set(tops)) or sorted({max(1, round(count * s)) for s in DEFAULT_SHARES})
    normalized = normalized_gains(gains)
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
        given = ", provided that there are no recaptions, as in this growth"
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


def as_text(found: Sweep) -> str:
    """The sweep for a terminal; a star marks the threshold in force."""

    def percent_or_dash(share: float | None) -> str:
        return "–" if share is None else percent(100 * share)

    lines = [
        f"{'min_align':>10} {'kept':>16} {'recaptioned':>12} {'dropped':>9} {'mean gain':>10} "
        f"{'purity':>8} {'right lost':>11}"
    ]
    for row in found.thresholds:
        kept = f"{row.kept}" if row.exact else f"{row.kept} to {row.kept_at_most}"
        name = f"{row.threshold:g}" + ("*" if row.in_force else " ")
        lines.append(
            f"{name:>10} {kept:>16} {row.recaptioned:>12} {row.dropped:>9} "
            f"{decimal(row.mean_gain):>10} {percent_or_dash(row.purity):>8} "
            f"{percent_or_dash(row.right_lost):>11}"
        )
    if found.tops:
        titles = f"{'top N':>10} {'share':>16} {'min gain':>12} {'mean':>9} {'information':>12}"
        lines += ["", titles]
    for top in found.tops:
        lines.append(
            f"{top.count:>10} {100 * top.share:>15.1f}% {top.min_gain:>12.3f} "
            f"{top.mean_gain:>9.3f} {100 * top.information:>11.1f}%"
        )
    return "\n".join([*lines, "", *(f"* {note}" for note in found.notes)])
