"""The report's charts, each a function of numbers and a palette; nothing here reads a file."""

from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from infogrowth.report.charts import (
    PAGE,
    Palette,
    chart_style,
    compact_counts,
    legend_above,
    new_figure,
    to_page,
)
from infogrowth.report.dataset import GrowthTable
from infogrowth.report.formatting import compact, decimal
from infogrowth.report.numbers import GrowthCurve, Visits, headline
from infogrowth.report.sweeping import purity_figure

SAMPLER_NAMES = {
    "uniform": "uniform",
    "proportional": "proportional",
    "two_phase": "two-phase",
}


def growth_figure(curve: GrowthCurve, palette: Palette, width: float = 760) -> Figure:
    """Counts over the stream, and under them how much new each block of it brought."""
    with chart_style(palette):
        figure = new_figure(width, 380)
        counts, gains = figure.subplots(2, 1, sharex=True, height_ratios=[1.25, 1])
        seen = np.concatenate([[0], curve.seen])
        layers = [
            ("kept", curve.kept, palette.kept),
            ("recaptioned", curve.recaptioned, palette.recaptioned),
            ("dropped", curve.dropped, palette.dropped),
        ]
        shown = [layer for layer in layers if layer[1][-1] > 0] or layers[:1]
        counts.stackplot(
            seen,
            [np.concatenate([[0], values]) for _, values, _ in shown],
            labels=[name for name, _, _ in shown],
            colors=[color for _, _, color in shown],
            alpha=0.82,
            linewidth=0,
        )
        compact_counts(counts, "y")
        counts.set_ylabel("samples so far")
        counts.set_ylim(0, max(curve.seen[-1], 1))
        legend_above(counts)
        middles = (seen[:-1] + seen[1:]) / 2
        gains.plot(middles, curve.gain_image, color=palette.image, label="image gain")
        gains.plot(middles, curve.gain_text, color=palette.text, label="text gain")
        gains.set_ylim(bottom=0)
        gains.set_ylabel("mean gain of new")
        gains.set_xlabel("samples seen")
        compact_counts(gains, "x")
        gains.set_xlim(0, max(curve.seen[-1], 1))
        legend_above(gains)
        _mark_sources(counts, gains, curve, palette)
        return figure


def _mark_sources(counts: Axes, gains: Axes, curve: GrowthCurve, palette: Palette) -> None:
    """A dotted line where another source began; the page lists their names."""
    for number, (start, _) in enumerate(curve.source_starts[1:13], start=2):
        for axes in (counts, gains):
            axes.axvline(start, color=palette.ink, linewidth=0.9, linestyle=(0, (1, 2)))
        gains.annotate(
            f"source {number}",
            (start, 1),
            xycoords=("data", "axes fraction"),
            xytext=(4, -2),
            textcoords="offset points",
            va="top",
            fontsize=10,
            color=palette.muted,
        )


def alignment_figure(
    alignment: np.ndarray,
    verdicts: np.ndarray,
    min_align: float | None,
    palette: Palette,
    width: float = 350,
) -> Figure:
    """Histogram of the alignment that decided, stacked by verdict, with the threshold drawn in.

    Args:
        alignment: (N,) NaN where unknown.
        verdicts: (N,) str.
    """
    with chart_style(palette):
        figure = new_figure(width, 260)
        axes = figure.subplots()
        finite = np.isfinite(alignment)
        edges = _edges(alignment[finite], min_align)
        colors = {
            "kept": palette.kept,
            "recaptioned": palette.recaptioned,
            "dropped": palette.dropped,
        }
        shown = [verdict for verdict in colors if (finite & (verdicts == verdict)).any()]
        axes.hist(
            [alignment[finite & (verdicts == verdict)] for verdict in shown],
            bins=list(edges),
            stacked=True,
            color=[colors[verdict] for verdict in shown],
            label=shown,
            linewidth=0,
            rwidth=0.92,
        )
        axes.set_xlabel("alignment: cosine of image and caption")
        axes.set_ylabel("samples")
        compact_counts(axes, "y")
        legend_above(axes)
        if min_align is not None:
            axes.axvline(min_align, color=palette.ink, linewidth=1.4, linestyle=(0, (4, 2.5)))
            axes.annotate(
                f"threshold {min_align:.3g}",
                (min_align, 1),
                xycoords=("data", "axes fraction"),
                xytext=(-5, -3),
                textcoords="offset points",
                ha="right",
                va="top",
                fontsize=10.5,
            )
        return figure


def gain_figure(gains: np.ndarray, has_text: bool, palette: Palette, width: float = 350) -> Figure:
    """Histograms of the image and the text gain of the kept samples.

    Args:
        gains: (K, 2).
        has_text: False draws the image gain alone (class-labeled thumbnails).
    """
    with chart_style(palette):
        figure = new_figure(width, 260)
        axes = figure.subplots()
        finite = gains[np.isfinite(gains)]
        # A few first samples, when everything is new, would squeeze the others into one bar.
        top = max(1.15 * float(np.quantile(finite, 0.99)), 1e-6) if len(finite) else 1.0
        top = min(top, float(finite.max())) if len(finite) and finite.max() > 0 else top
        edges = np.linspace(min(0.0, float(finite.min()) if len(finite) else 0.0), top, 41)
        columns = [(0, "image gain", palette.image), (1, "text gain", palette.text)]
        for column, name, color in columns[: 2 if has_text else 1]:
            values = gains[:, column]
            heights, _ = np.histogram(np.clip(values[np.isfinite(values)], None, top), bins=edges)
            axes.stairs(heights, edges, fill=True, color=color, alpha=0.28, linewidth=0)
            axes.stairs(heights, edges, color=color, linewidth=1.6, label=name)
        axes.set_ylim(bottom=0)
        axes.set_xlim(edges[0], edges[-1])
        beyond = len(finite) and finite.max() > top
        axes.set_xlabel(
            "gain: mean distance to the nearest kept" + (" (last bar: or more)" * bool(beyond))
        )
        axes.set_ylabel("kept samples")
        compact_counts(axes, "y")
        legend_above(axes)
        return figure


def visits_figure(visits: Visits, palette: Palette, width: float = 350) -> Figure:
    """Expected visits per epoch under each sampler, over the kept samples ordered by gain."""
    with chart_style(palette):
        figure = new_figure(width, 260)
        axes = figure.subplots()
        order = np.argsort(visits.gains, kind="stable")
        # 200 points of the sorted curve draw it as well as a million.
        at = np.unique(np.linspace(0, len(order) - 1, min(len(order), 200)).round().astype(int))
        share = 100 * (at + 0.5) / max(len(order), 1)
        styles = {
            "uniform": (palette.muted, (0, (1, 1.5))),
            "proportional": (palette.accent, "solid"),
            "two_phase": (palette.recaptioned, "solid"),
        }
        for name, values in visits.per_epoch.items():
            color, dashes = styles[name]
            axes.plot(
                share, values[order][at], color=color, linestyle=dashes, label=SAMPLER_NAMES[name]
            )
        if len(at):
            _draw_phases(axes, share, {k: v[order][at] for k, v in visits.phases.items()}, palette)
        axes.set_xlim(0, 100)
        axes.set_ylim(bottom=0)
        axes.set_xlabel("kept samples, least to most gain (percent)")
        axes.set_ylabel("visits per epoch")
        legend_above(axes)
        return figure


def _draw_phases(
    axes: Axes, share: np.ndarray, phases: dict[str, np.ndarray], palette: Palette
) -> None:
    """The even and the odd epochs of two-phase, named where they are farthest apart."""
    even, odd = phases["even"], phases["odd"]
    inner = np.flatnonzero((share > 8) & (share < 80))
    at = inner[np.abs(even - odd)[inner].argmax()] if len(inner) else len(share) // 2
    for name, values, other in (("even", even, odd), ("odd", odd, even)):
        axes.plot(share, values, color=palette.recaptioned, linewidth=1.1, linestyle=(0, (4, 2)))
        above = values[at] >= other[at]
        axes.annotate(
            name,
            (share[at], values[at]),
            xytext=(0, 3 if above else -3),
            textcoords="offset points",
            va="bottom" if above else "top",
            ha="center",
            fontsize=10,
            color=palette.muted,
        )


def _edges(values: np.ndarray, threshold: float | None) -> np.ndarray:
    """About 40 bins, with an edge exactly at the threshold so that no bar straddles it."""
    low, high = (float(values.min()), float(values.max())) if len(values) else (0.0, 1.0)
    if threshold is None:
        return np.linspace(low, high if high > low else low + 1e-3, 41)
    low, high = min(low, threshold), max(high, threshold)
    step = max(high - low, 1e-3) / 40
    below = int(np.ceil((threshold - low) / step))
    above = int(np.ceil((high - threshold) / step)) + 1
    return threshold + step * np.arange(-below, above + 1)


def dataset_charts(table: GrowthTable, curve: GrowthCurve, visits: Visits) -> dict[str, Any]:
    head = headline(table)
    charts: dict[str, Any] = {"growth": None, "growth_narrow": None, "alignment": None}
    if table.has_decisions:
        description = (
            f"Of {head.seen} samples seen, {head.kept} were kept, {head.recaptioned} of them with "
            f"a new caption, and {head.dropped} dropped. {_flattening(curve)}"
        )
        wide = growth_figure(curve, PAGE, 680)
        narrow = growth_figure(curve, PAGE, 350)
        charts["growth"] = to_page(wide, "growth", description)
        charts["growth_narrow"] = to_page(narrow, "growth-narrow", description)
    if np.isfinite(table.alignment).any():
        under = int((table.alignment < (table.min_align or 0)).sum())
        figure = alignment_figure(table.alignment, table.verdicts, table.min_align, PAGE)
        charts["alignment"] = to_page(
            figure,
            "alignment",
            f"Histogram of alignment; {compact(under)} samples lie under the threshold.",
        )
    charts["purity"] = None
    if table.estimate is not None:
        low, high = (f"{100 * share:.1f}" for share in table.estimate.noise_interval)
        charts["purity_note"] = (
            f"Estimated from {table.estimate.seeds} seeds: {100 * table.estimate.noise:.1f} % "
            f"of the stream's captions are wrong ({low} to {high} %)."
        )
        charts["purity"] = to_page(
            purity_figure(table.estimate, table.min_align, PAGE), "purity", charts["purity_note"]
        )
    charts["gain"] = to_page(
        gain_figure(table.gains[table.kept], table.has_text, PAGE),
        "gains",
        f"Histogram of gains of the kept samples; means {decimal(head.gain_image)} image "
        f"and {decimal(head.gain_text)} text.",
    )
    charts["visits"] = to_page(
        visits_figure(visits, PAGE),
        "visits",
        "Expected visits per epoch of the kept samples, ordered by gain, under the uniform, "
        "proportional and two-phase samplers.",
    )
    return charts


def _flattening(curve: GrowthCurve) -> str:
    """First against last fifth of the stream, for readers who cannot see the curve."""
    gain = (curve.gain_image + curve.gain_text) / 2
    fifth = max(1, len(gain) // 5)
    first, last = gain[:fifth], gain[-fifth:]
    if not (np.isfinite(first).any() and np.isfinite(last).any()):
        return ""
    return (
        f"The mean gain went from {decimal(float(np.nanmean(first)))} in the first fifth of the "
        f"stream to {decimal(float(np.nanmean(last)))} in the last."
    )
