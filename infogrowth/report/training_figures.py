"""Charts of training runs side by side."""

from collections.abc import Sequence

from matplotlib.figure import Figure

from infogrowth.report.charts import Palette, compact_counts, house_style, legend_above, new_figure
from infogrowth.report.training_runs import TrainingRun, smoothed

DASHES = ["solid", (0, (5, 1.5)), (0, (1.5, 1.2)), (0, (6, 1.5, 1.5, 1.5))]


def runs_figure(
    runs: Sequence[TrainingRun], what: str, palette: Palette, width: float = 570
) -> Figure:
    """``what`` ("loss" or "recall") of each run over the samples it has seen."""
    with house_style(palette):
        figure = new_figure(width, 300)
        axes = figure.subplots()
        colors = palette.runs()
        for number, run in enumerate(runs):
            curve = run.loss if what == "loss" else run.recall
            if len(curve.values) == 0:
                continue
            at, means = smoothed(curve.values) if what == "loss" else (slice(None), curve.values)
            axes.plot(
                curve.seen[at],
                means,
                color=colors[number % len(colors)],
                linestyle=DASHES[number // len(colors) % len(DASHES)],
                marker="o" if len(means) <= 30 else "",
                markersize=4,
                label=_short(run.name),
            )
        axes.set_xlabel("samples seen")
        axes.set_ylabel("loss" if what == "loss" else "mean recall (percent)")
        axes.set_xlim(left=0)
        compact_counts(axes, "x")
        legend_above(axes, columns=2 if width < 450 else 4)
        return figure


def _short(name: str) -> str:
    # matplotlib leaves labels that begin with an underscore out of the legend
    name = name if len(name) <= 24 else name[:11] + "…" + name[-12:]
    return f"\N{ZERO WIDTH SPACE}{name}" if name.startswith("_") else name
