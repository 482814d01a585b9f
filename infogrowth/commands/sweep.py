"""`infogrowth sweep`: report what other thresholds and static selections would have kept.

The counts of a threshold are exact as far as the record goes: a sample is kept when its own
caption reaches the threshold, recaptioned when only its new one does. What is not on record
is how well a recaption fits that was never looked at, or was refused; where that matters the count
is a range. The gains are those recorded: with another kept set they would differ a little, as the
nearest kept samples would be others.
"""

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from infogrowth.config import option
from infogrowth.errors import UserError
from infogrowth.files import atomic_write
from infogrowth.growth.decisions import Reason
from infogrowth.growth.sampling import normalized_gains, select_top
from infogrowth.report.dataset import GrowthTable, open_growth
from infogrowth.report.formatting import decimal, known, percent

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Config:
    """Options of ``infogrowth sweep``."""

    growth: str = option(help="growth folder (GROWTH_DIR)", positional=True)
    min_align: list[float] = option([], "thresholds to try [a grid of them]", min=-1, max=1)
    tops: list[int] = option([], "sizes of static selections; by default tenths of the kept set")
    output: str | None = option(
        None, "also write the plot: FILE.html or FILE.png", short="-o", extensions=".html .png"
    )
    json: bool = option(False, "print JSON instead of tables")


def run(config: Config) -> int:
    """Print the tables, or JSON; write the plot if asked to."""
    table = open_growth(config.growth)
    found = sweep(table, config.min_align, config.tops)
    if config.output:
        from infogrowth.report.charts import NARROW, draw_sweep, png, svg
        from infogrowth.report.page import render

        if config.output.lower().endswith(".png"):
            content = png((760, 300), draw_sweep, found)
        else:
            text = "Samples kept by alignment threshold, and information kept by the top N."
            narrow = NARROW, 820
            chart = svg("sweep", (900, 300), draw_sweep, found, narrow=narrow, description=text)
            content = render("sweep.html.j2", title=table.name, found=found, figure=chart)
        with atomic_write(config.output, "wb") as file:
            file.write(content)
        log.info("wrote %s", config.output)
    print(json.dumps(found, indent=2) if config.json else as_text(found))
    return 0


def sweep(
    table: GrowthTable, thresholds: Sequence[float] = (), tops: Sequence[int] = ()
) -> dict[str, Any]:
    """Evaluate ``thresholds`` and ``tops``; both have sensible defaults when empty. Raises
    UserError: no alignments on record, or a top that is not between 1 and the kept count.

    Returns:
        ready for JSON, ``thresholds``, a record for each (``kept_at_most`` is more than ``kept``
        where recaptions whose fit is not on record could add to it; ``purity`` and ``right_lost``
        are the estimated shares of right captions above it, and of the stream's right captions
        below it); ``tops``, a record for each static selection (``information`` is its share of
        the sum of the normalized gains); and ``notes``, the sentences a reader needs to judge them.
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
    tried = (Reason.RECAPTIONED, Reason.LOW_RECAPTION)
    had_recaptions = bool(table.rows.reason.isin(tried).any())
    rows = [_threshold_row(table, value, had_recaptions) for value in sorted(values)]
    notes = _notes(table, all(row["exact"] for row in rows), had_recaptions)
    top_rows = _top_rows(table.gains[table.kept], tops)
    return {"thresholds": rows, "tops": top_rows, "notes": notes}


def _threshold_row(table: GrowthTable, threshold: float, had_recaptions: bool) -> dict[str, Any]:
    """Which rows pass, decided in float32 like the engine; an id counts once."""
    rows, in_force, limit = table.rows, table.min_align, np.float32(threshold)
    original = rows.original_alignment.astype(np.float32)
    own = (original >= limit) | ((rows.reason == Reason.SEED) & table.kept)
    new = ~own & (rows.verdict == "recaptioned") & (rows.alignment.astype(np.float32) >= limit)
    maybe = own  # rows whose recaption might reach it, but was refused or never looked at
    if in_force is not None and threshold < in_force:
        maybe = rows.reason == Reason.LOW_RECAPTION  # under min_align, perhaps not under this
    elif in_force is not None and threshold > in_force and had_recaptions:
        maybe = original >= np.float32(in_force)  # never looked at
    kept, at_most = _once_per_id(rows, own | new), _once_per_id(rows, own | new | maybe)
    estimate = table.estimate
    return {
        "threshold": threshold,
        "kept": int(kept.sum()),
        "kept_at_most": int(at_most.sum()),
        "recaptioned": int((kept & new).sum()),
        "dropped": int((~kept).sum()),
        "mean_gain": known(rows.gain[kept].mean()),
        "in_force": in_force is not None and threshold == in_force,
        "purity": known(float(estimate.purity(threshold))) if estimate else None,
        "right_lost": known(float(estimate.right_lost(threshold))) if estimate else None,
        "exact": bool(kept.sum() == at_most.sum()),
    }


def _once_per_id(rows: pd.DataFrame, passes: pd.Series) -> pd.Series:
    """The rows that would be kept: the first passing one of each id."""
    return passes & ~rows.index.isin(rows.index[passes][rows.id[passes].duplicated()])


def _top_rows(gains: np.ndarray, tops: Sequence[int]) -> list[dict[str, Any]]:
    count, mean = len(gains), gains.mean(axis=1)
    if not (mean > 0).any():
        return []
    normalized, rows = normalized_gains(gains), []
    for top in sorted(set(tops)) or sorted({max(1, round(count * (n / 10))) for n in range(1, 11)}):
        selected = select_top(gains, top)
        rows.append(
            {
                "count": top,
                "share": top / count,
                "min_gain": float(mean[selected].min()),
                "mean_gain": float(mean[selected].mean()),
                "information": float(normalized[selected].sum() / normalized.sum()),
            }
        )
    return rows


def _notes(table: GrowthTable, exact: bool, had_recaptions: bool) -> list[str]:
    notes = [
        "Kept counts by threshold come from the recorded alignments; nothing is embedded again."
    ]
    if exact:
        given = ", provided that there are no recaptions, as in this growth"
        notes.append(f"All of them are exact{'' if had_recaptions else given}.")
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


def as_text(found: dict[str, Any]) -> str:
    """The sweep for a terminal; a star marks the threshold in force."""

    def percent_or_dash(share: float | None) -> str:
        return "–" if share is None else percent(100 * share)

    lines = [
        f"{'min_align':>10} {'kept':>16} {'recaptioned':>12} {'dropped':>9} {'mean gain':>10} "
        f"{'purity':>8} {'right lost':>11}"
    ]
    for row in found["thresholds"]:
        kept = f"{row['kept']}" if row["exact"] else f"{row['kept']} to {row['kept_at_most']}"
        name = f"{row['threshold']:g}" + ("*" if row["in_force"] else " ")
        lines.append(
            f"{name:>10} {kept:>16} {row['recaptioned']:>12} {row['dropped']:>9} "
            f"{decimal(row['mean_gain']):>10} {percent_or_dash(row['purity']):>8} "
            f"{percent_or_dash(row['right_lost']):>11}"
        )
    if found["tops"]:
        titles = f"{'top N':>10} {'share':>16} {'min gain':>12} {'mean':>9} {'information':>12}"
        lines += ["", titles]
    lines += [
        f"{top['count']:>10} {100 * top['share']:>15.1f}% {top['min_gain']:>12.3f} "
        f"{top['mean_gain']:>9.3f} {100 * top['information']:>11.1f}%"
        for top in found["tops"]
    ]
    return "\n".join([*lines, "", *(f"* {note}" for note in found["notes"])])
