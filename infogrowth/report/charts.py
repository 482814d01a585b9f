"""The report's charts: each draws numbers into a figure, which becomes a PNG or part of a page.

On a page a chart is an inline SVG whose colors are CSS variables, so it follows the reader's light
or dark theme. Nothing here reads a file.
"""

import io
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import matplotlib as mpl
import numpy as np
import pandas as pd
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from infogrowth.growth.thresholds import StreamEstimate
from infogrowth.report.formatting import compact

INCH = 72.0  # an SVG of matplotlib counts in points
_STYLE = Path(__file__).parent / "templates/charts.mplstyle"

# By role; the names are the page's CSS variables.
COLORS = {
    "ink": "#1c2430",
    "muted": "#566070",
    "grid": "#dfe3ea",
    "kept": "#0f8f7a",
    "recaptioned": "#d98a00",
    "dropped": "#c8385a",
    "image": "#2f6fde",
    "text": "#8a4fd0",
    "run2": "#d9730d",
    "run6": "#6b7280",
}
_VARIABLES = {color: f"var(--{role})" for role, color in COLORS.items()}
DASHED, DOTTED = (0, (4, 2.5)), (0, (1, 1.5))

Size = tuple[float, float]  # width and height in CSS pixels
SMALL: Size = (350, 260)
NARROW = 350  # width on a phone
Draw = Callable[..., None]  # takes a figure and data


def draw_figure(size: Size, draw: Draw, *data: Any) -> Figure:
    """A figure with what ``draw`` makes of the data, in the style of the report."""
    with mpl.rc_context(fname=_STYLE):
        figure = Figure(figsize=(size[0] / INCH, size[1] / INCH), layout="constrained")
        draw(figure, *data)
        return figure


def png(size: Size, draw: Draw, *data: Any) -> bytes:
    """The chart on white, two device pixels per CSS pixel."""
    buffer = io.BytesIO()
    figure = draw_figure(size, draw, *data)
    figure.savefig(buffer, format="png", dpi=2 * INCH, facecolor="white")
    return buffer.getvalue()


def svg(
    name: str, size: Size, draw: Draw, *data: Any, description: str, narrow: Size | None = None
) -> Markup:
    """The chart as an inline SVG that follows the page's theme.

    Args:
        name: unique on the page; makes the ids inside the SVG unique, and the same every time.
        description: for a reader who cannot see the chart.
        narrow: the size on a phone: the chart is there twice, and the page shows one of them.
    """
    if narrow:
        both = '<div class="only-wide">{}</div><div class="only-narrow">{}</div>'
        sizes = {name: size, f"{name}-narrow": narrow}
        drawn = [svg(n, s, draw, *data, description=description) for n, s in sizes.items()]
        return Markup(both).format(*drawn)
    buffer = io.BytesIO()
    no_metadata = dict.fromkeys(["Date", "Creator", "Format", "Type"])
    figure = draw_figure(size, draw, *data)
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
        figure.savefig(buffer, format="svg", metadata=no_metadata)
    ElementTree.register_namespace("", "http://www.w3.org/2000/svg")
    ElementTree.register_namespace("xlink", "http://www.w3.org/1999/xlink")
    root = ElementTree.fromstring(buffer.getvalue())
    for element in root.iter():
        for key, value in element.attrib.items():
            if key == "id":
                value = f"{name}-{value}"
            elif key == "style":
                value = re.sub("#[0-9a-f]{6}", lambda c: _VARIABLES.get(c[0], c[0]), value)
            elif key.endswith("href"):
                value = value.replace("#", f"#{name}-")
            element.set(key, value.replace("url(#", f"url(#{name}-"))
    root.attrib.update({"role": "img", "aria-label": description, "class": "chart"})
    del root.attrib["height"], root.attrib["width"]
    return Markup(ElementTree.tostring(root, encoding="unicode"))


def is_narrow(figure: Figure) -> bool:
    """Whether the figure is for a phone."""
    return figure.get_figwidth() * INCH < NARROW + 100


def finish(axes: Axes, compact_counts: str = "", columns: int = 4, **settings: Any) -> None:
    """What all charts end with: labels and limits, and the legend in one row over the plot.

    Args:
        compact_counts: "x", "y" or "xy": the axes whose ticks are counts, like 12k and 3M.
        settings: for ``axes.set``.
    """
    axes.set(**settings)
    for name in compact_counts:
        axis = axes.xaxis if name == "x" else axes.yaxis
        axis.set_major_locator(mpl.ticker.MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]))
        axis.set_major_formatter(lambda value, _: compact(value))
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1.02), ncols=columns)


def note(
    axes: Axes, text: str, at: tuple[float, float], offset: tuple[float, float], **style
) -> None:
    """A few words beside ``at``: x in data, y as a share of the height of the axes."""
    style = {"fontsize": 10, "xycoords": ("data", "axes fraction"), **style}
    axes.annotate(text, at, xytext=offset, textcoords="offset points", **style)


def outlined_histogram(
    axes: Axes, values: np.ndarray, edges: np.ndarray, color: str, label: str, alpha: float
) -> None:
    """A histogram to see others through; what lies beyond the edges is in the last bar."""
    heights, _ = np.histogram(np.clip(values, edges[0], edges[-1]), bins=edges)
    axes.stairs(heights, edges, fill=True, color=color, alpha=alpha, linewidth=0)
    axes.stairs(heights, edges, color=color, linewidth=1.6, label=label)


def draw_growth(figure: Figure, curve: pd.DataFrame, starts: list[tuple[int, str]]) -> None:
    """Counts over the stream, and under them how much new each block of it brought.

    Args:
        curve: as numbers.growth_curve makes it.
        starts: where each source begins; a dotted line marks it, the page lists their names.
    """
    counts, gains = figure.subplots(2, 1, sharex=True, height_ratios=[1.25, 1])
    seen = np.concatenate([[0], curve.seen])
    layers = [name for name in ("kept", "recaptioned", "dropped") if curve[name].iloc[-1] > 0]
    counts.stackplot(
        seen,
        [np.concatenate([[0], curve[name]]) for name in layers],
        labels=layers,
        colors=[COLORS[name] for name in layers],
        alpha=0.82,
        linewidth=0,
    )
    for space in ("image", "text"):
        middles, label = (seen[:-1] + seen[1:]) / 2, f"{space} gain"
        gains.plot(middles, curve[f"gain_{space}"], color=COLORS[space], label=label)
    finish(counts, "y", ylabel="samples so far", ylim=(0, seen[-1]))
    gains.set(ylabel="mean gain of new", xlabel="samples seen")
    finish(gains, "x", ylim=(0, None), xlim=(0, seen[-1]))
    for number, (start, _) in enumerate(starts[1:13], start=2):
        for axes in (counts, gains):
            axes.axvline(start, color=COLORS["ink"], linewidth=0.9, linestyle=(0, (1, 2)))
        note(gains, f"source {number}", (start, 1), (4, -2), va="top", color=COLORS["muted"])


def draw_alignment(
    figure: Figure, alignment: np.ndarray, verdicts: np.ndarray, min_align: float | None
) -> None:
    """Histogram of the alignment that decided, stacked by verdict, with the threshold drawn in.

    Args:
        alignment: (N,) NaN where unknown.
        verdicts: (N,) str.
    """
    axes = figure.subplots()
    by_verdict = {
        verdict: alignment[np.isfinite(alignment) & (verdicts == verdict)]
        for verdict in ("kept", "recaptioned", "dropped")
    }
    by_verdict = {verdict: values for verdict, values in by_verdict.items() if len(values)}
    axes.hist(
        list(by_verdict.values()),
        bins=list(_edges(np.concatenate(list(by_verdict.values())), min_align)),
        stacked=True,
        color=[COLORS[verdict] for verdict in by_verdict],
        label=list(by_verdict),
        linewidth=0,
        rwidth=0.92,
    )
    finish(axes, "y", xlabel="alignment: cosine of image and caption", ylabel="samples")
    if min_align is not None:
        axes.axvline(min_align, color=COLORS["ink"], linewidth=1.4, linestyle=DASHED)
        text = f"threshold {min_align:.3g}"
        note(axes, text, (min_align, 1), (-5, -3), ha="right", va="top", fontsize=10.5)


def _edges(values: np.ndarray, threshold: float | None) -> np.ndarray:
    """About 40 bins, with an edge exactly at the threshold so that no bar straddles it."""
    low, high = float(values.min()), float(values.max())
    if threshold is None:
        return np.linspace(low, high if high > low else low + 1e-3, 41)
    low, high = min(low, threshold), max(high, threshold)
    step = max(high - low, 1e-3) / 40
    below = int(np.ceil((threshold - low) / step))
    above = int(np.ceil((high - threshold) / step)) + 1
    return threshold + step * np.arange(-below, above + 1)


def draw_gain(figure: Figure, gains: dict[str, np.ndarray]) -> None:
    """Histograms of the gains of the kept samples, by space."""
    axes = figure.subplots()
    finite = np.concatenate(list(gains.values()))
    finite = finite[np.isfinite(finite)]
    low, high = (float(finite.min()), float(finite.max())) if len(finite) else (0.0, 1.0)
    # A few first samples, when everything is new, would squeeze the others into one bar.
    top = max(1.15 * float(np.quantile(finite, 0.99)), 1e-6) if len(finite) else 1.0
    top = min(top, high) if high > 0 else top
    edges = np.linspace(min(0.0, low), top, 41)
    for space, values in gains.items():
        values = values[np.isfinite(values)]
        outlined_histogram(axes, values, edges, COLORS[space], f"{space} gain", alpha=0.28)
    beyond = " (last bar: or more)" if high > top else ""
    axes.set_xlabel("gain: mean distance to the nearest kept" + beyond)
    finish(axes, "y", ylim=(0, None), xlim=(edges[0], edges[-1]), ylabel="kept samples")


def draw_gains(figure: Figure, parts: dict[str, pd.Series]) -> None:
    """Histograms of the mean gain of what only A, both, and only B kept."""
    axes = figure.subplots()
    everything = pd.concat(list(parts.values())).dropna()
    top = float(np.quantile(everything, 0.999)) if len(everything) else 1.0
    edges = np.linspace(0, max(top, 1e-6), 41)
    for (name, gain), color in zip(parts.items(), ("image", "kept", "text"), strict=True):
        if gain.notna().any():
            values = gain.dropna().to_numpy()
            outlined_histogram(axes, values, edges, COLORS[color], name, alpha=0.25)
    finish(axes, "y", ylim=(0, None), xlim=(0, edges[-1]), xlabel="mean gain", ylabel="samples")


def draw_visits(figure: Figure, visits: pd.DataFrame) -> None:
    """Expected visits per epoch under each sampler, over the kept samples ordered by gain.

    Args:
        visits: as numbers.expected_visits makes it.
    """
    axes = figure.subplots()
    count = len(visits)
    # 200 points of the sorted curve draw it as well as a million.
    at = np.unique(np.linspace(0, count - 1, min(count, 200)).round().astype(int))
    share = 100 * (at + 0.5) / max(count, 1)
    curves = visits.sort_values("even", kind="stable").iloc[at]
    styles = {
        "uniform": (COLORS["muted"], DOTTED),
        "proportional": (COLORS["image"], "solid"),
        "two_phase": (COLORS["recaptioned"], "solid"),
    }
    for name, (color, dashes) in styles.items():
        label = name.replace("_", "-")
        axes.plot(share, curves[name], color=color, linestyle=dashes, label=label)
    # The even and the odd epochs of two-phase, named where they are farthest apart.
    even, odd = curves.even.to_numpy(), curves.odd.to_numpy()
    inner = np.flatnonzero((share > 8) & (share < 80))
    middle = inner[np.abs(even - odd)[inner].argmax()] if len(inner) else len(share) // 2
    for name, values, other in (("even", even, odd), ("odd", odd, even)) if count else ():
        axes.plot(share, values, color=COLORS["recaptioned"], linewidth=1.1, linestyle=(0, (4, 2)))
        above = values[middle] >= other[middle]
        style = {"va": "bottom" if above else "top", "ha": "center", "color": COLORS["muted"]}
        offset = (0, 3 if above else -3)
        note(axes, name, (share[middle], values[middle]), offset, xycoords="data", **style)
    axes.set_xlabel("kept samples, least to most gain (percent)")
    finish(axes, xlim=(0, 100), ylim=(0, None), ylabel="visits per epoch")


def draw_sweep(figure: Figure, found: dict[str, Any]) -> None:
    """Samples kept by threshold, purity where it is known, and the information kept by the top N:
    side by side, or one under the other on a phone."""
    thresholds, tops = pd.DataFrame(found["thresholds"]), pd.DataFrame(found["tops"])
    pure = thresholds[thresholds.purity.notna()]
    panels: list[tuple[Any, ...]] = [(_draw_thresholds, thresholds)]
    if len(pure):
        in_force = thresholds.threshold[thresholds.in_force]
        curves = (pure.threshold, pure.purity, pure.right_lost)
        panels.append((_draw_purity_curves, *curves, *in_force))
    if len(tops):
        panels.append((_draw_tops, tops))
    shape = (len(panels), 1) if is_narrow(figure) else (1, len(panels))
    for axes, (draw, *data) in zip(
        figure.subplots(*shape, squeeze=False).flat, panels, strict=True
    ):
        draw(axes, *data)


def _draw_thresholds(axes: Axes, rows: pd.DataFrame) -> None:
    at, own = rows.threshold, rows.kept - rows.recaptioned
    axes.plot(at, rows.kept, color=COLORS["kept"], marker="o", markersize=3.5, label="kept")
    if rows.recaptioned.any():
        color = COLORS["recaptioned"]
        axes.fill_between(at, own, rows.kept, color=color, alpha=0.45, lw=0, label="recaptioned")
    if not rows.exact.all():
        axes.plot(at, rows.kept_at_most, color=COLORS["kept"], linestyle=DOTTED, label="at most")
    for threshold in at[rows.in_force]:
        axes.axvline(threshold, color=COLORS["ink"], linewidth=1.2, linestyle=DASHED)
        note(axes, "in force", (threshold, 0), (5, 5))
    axes.set(xlabel="alignment threshold (min_align)", ylabel="samples kept")
    finish(axes, "y", ylim=(0, None))


def _draw_tops(axes: Axes, rows: pd.DataFrame) -> None:
    counts, information = [0, *rows["count"]], [0, *(100 * rows.information)]
    color = COLORS["image"]
    axes.plot(counts, information, color=color, marker="o", markersize=3.5, label="top N by gain")
    ends = [0, counts[-1]], [0, 100 * rows.share.iloc[-1]]
    axes.plot(*ends, color=COLORS["muted"], linestyle=DOTTED, label="at random")
    axes.set(xlabel="samples selected (N)", ylabel="information kept (percent)")
    finish(axes, "x", ylim=(0, 103), xlim=(0, None))


def draw_purity(figure: Figure, estimate: StreamEstimate, min_align: float | None) -> None:
    """Estimated purity and loss over all thresholds that keep something."""
    at = np.quantile(estimate.stream, np.linspace(0, 0.99, 200))
    curves = estimate.purity(at), estimate.right_lost(at)
    _draw_purity_curves(figure.subplots(), at, *curves, min_align)


def _draw_purity_curves(
    axes: Axes, at: Any, purity: Any, lost: Any, min_align: float | None = None
) -> None:
    axes.plot(at, 100 * (1 - purity), color=COLORS["dropped"], label="wrong among kept")
    axes.plot(at, 100 * lost, color=COLORS["image"], label="right ones lost")
    if min_align is not None:
        axes.axvline(min_align, color=COLORS["ink"], linewidth=1.2, linestyle=DASHED)
    axes.set_ylim(0, None)
    axes.set_xlim(at.min(), at.max() if at.max() > at.min() else None)
    axes.set(xlabel="alignment threshold (min_align)", ylabel="percent (estimated)")
    finish(axes, columns=2)
