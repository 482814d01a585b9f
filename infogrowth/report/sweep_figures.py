"""Charts of a sweep."""

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from infogrowth.report.charts import Palette, compact_counts, house_style, legend_above, new_figure
from infogrowth.report.sweeping import Sweep


def sweep_figure(
    found: Sweep, palette: Palette, width: float = 760, stacked: bool = False
) -> Figure:
    """Samples kept by threshold, and the information kept by the top N.

    Args:
        stacked: one chart under the other, for narrow screens.
    """
    with house_style(palette):
        figure = new_figure(width, 560 if stacked else 300)
        shape = (2, 1) if stacked else (1, 2)
        left, right = figure.subplots(*shape) if found.tops else (figure.subplots(), None)
        _thresholds(left, found, palette)
        if right is not None:
            _tops(right, found, palette)
        return figure


def _thresholds(axes: Axes, found: Sweep, palette: Palette) -> None:
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
    compact_counts(axes, "y")
    legend_above(axes)


def _tops(axes: Axes, found: Sweep, palette: Palette) -> None:
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
    compact_counts(axes, "x")
    legend_above(axes)
