"""Charts and galleries of a comparison."""

import numpy as np
from matplotlib.figure import Figure

from infogrowth.report.charts import Palette, compact_counts, house_style, legend_above, new_figure
from infogrowth.report.comparing import Matched, by_gain
from infogrowth.report.dataset import GrownDataset
from infogrowth.report.galleries import GALLERY_SIZE, CardMaker, Gallery
from infogrowth.report.pictures import Pictures

SORT_KEYS = {"gain": "gain", "gain_image": "image gain", "gain_text": "text gain", "row": "arrival"}


def compare_figure(
    a: GrownDataset, b: GrownDataset, found: Matched, palette: Palette, width: float = 1000
) -> Figure:
    """Histograms of the mean gain of what only A, both, and only B kept."""
    with house_style(palette):
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
    a: GrownDataset, b: GrownDataset, found: Matched, pictures: Pictures
) -> list[Gallery]:
    """The most novel samples that only one of the two kept."""
    made = []
    for key, dataset, rows in (("A", a, found.only_a), ("B", b, found.only_b)):
        maker = CardMaker(dataset, pictures)
        made.append(
            Gallery(
                key=f"only-{key.lower()}",
                title=f"Only in {key}",
                explanation=f"Samples of {dataset.name} that the other has not, most novel first.",
                total=len(rows),
                cards=[maker.card(row) for row in by_gain(dataset, rows)[:GALLERY_SIZE]],
                sort_keys=SORT_KEYS,
                largest_first=True,
            )
        )
    return [gallery for gallery in made if gallery.cards]
