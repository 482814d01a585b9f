"""Two grown datasets side by side: what both kept, what only one kept, and how new that was."""

from dataclasses import dataclass

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from infogrowth.data.names import image_key
from infogrowth.report.charts import (
    COLORS,
    NARROW,
    compact_counts,
    legend_above,
    outlined_histogram,
    wide_and_narrow,
)
from infogrowth.report.dataset import GrowthTable
from infogrowth.report.formatting import decimal, percent, shown
from infogrowth.report.galleries import (
    GALLERY_SIZE,
    SORT_KEYS,
    Gallery,
    open_thumbnails,
    samples,
)
from infogrowth.report.page import render


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


def match(
    a: GrowthTable, b: GrowthTable
) -> tuple[pd.DataFrame, pd.DataFrame, pd.DataFrame, pd.DataFrame]:
    """Rows of kept samples by id, with or without an extension; the first of equal ids counts.

    Returns:
        rows of A and of B that are the same sample, in A's order; those only in A; only in B.
    """
    kept_a, kept_b = _by_key(a), _by_key(b)
    in_both = kept_a.index[kept_a.index.isin(kept_b.index)]
    only_b = kept_b[~kept_b.index.isin(in_both)]
    return kept_a.loc[in_both], kept_b.loc[in_both], kept_a.drop(in_both), only_b


def compare(a: GrowthTable, b: GrowthTable, limit: int = 10) -> Comparison:
    """Compare what A and B kept; ``limit`` ids are listed per part."""
    both_a, both_b, only_a, only_b = match(a, b)
    union = len(both_a) + len(only_a) + len(only_b)
    varied = min(both_a.gain.nunique(), both_b.gain.nunique()) > 1
    return Comparison(
        name_a=a.name,
        name_b=b.name,
        count_a=len(both_a) + len(only_a),
        count_b=len(both_a) + len(only_b),
        both=_part(both_a, limit),
        only_a=_part(only_a, limit),
        only_b=_part(only_b, limit),
        overlap=len(both_a) / union if union else 1.0,
        other_caption=int((both_a.caption != both_b.caption).sum()),
        gain_difference=_known((both_a.gain - both_b.gain).abs().mean(skipna=False)),
        gain_correlation=_known(both_a.gain.corr(both_b.gain)) if varied else None,
    )


def by_gain(rows: pd.DataFrame) -> pd.DataFrame:
    """The largest mean gain first, ties in stream order."""
    order = np.argsort(-np.nan_to_num(rows.gain), kind="stable")
    return rows.iloc[order]


def _by_key(table: GrowthTable) -> pd.DataFrame:
    rows = table.rows.assign(**dict(zip(("gain_image", "gain_text"), table.gains.T, strict=True)))
    rows = rows[table.kept].reset_index(names="row")
    rows = rows.set_index(rows.id.map(image_key))
    return rows[~rows.index.duplicated()]


def _part(rows: pd.DataFrame, limit: int) -> Part:
    image, text = rows.gain_image.mean(skipna=False), rows.gain_text.mean(skipna=False)
    return Part(len(rows), _known(image), _known(text), by_gain(rows).id.head(limit).tolist())


def _known(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None


def as_text(found: Comparison) -> str:
    """The comparison for a terminal."""
    parts = {"only in A": found.only_a, "in both": found.both, "only in B": found.only_b}
    lines = [
        f"A  {shown(found.name_a)}: {found.count_a} samples",
        f"B  {shown(found.name_b)}: {found.count_b} samples",
        "",
        f"{'':<12} {'samples':>10} {'image gain':>12} {'text gain':>10}   (means)",
        *(
            f"{name:<12} {part.count:>10} {decimal(part.gain_image):>12} "
            f"{decimal(part.gain_text):>10}"
            for name, part in parts.items()
        ),
        "",
        f"overlap (intersection over union)  {percent(100 * found.overlap)}",
        f"in both with another caption       {found.other_caption}",
        f"mean difference of gain in both    {decimal(found.gain_difference)}",
        f"correlation of gain in both        {decimal(found.gain_correlation)}",
    ]
    for name, part in (("A", found.only_a), ("B", found.only_b)):
        if part.most_novel:
            lines += ["", f"most novel only in {name}"]
            lines += [f"  {shown(sample)}" for sample in part.most_novel]
    return "\n".join(lines)


def page(a: GrowthTable, b: GrowthTable, found: Comparison, lmdb: str | None) -> bytes:
    """The comparison with the most novel samples that only one of the two kept.

    Args:
        lmdb: of the images; None for the one that a growth folder recorded.
    """
    thumbnails, missing = open_thumbnails(
        lmdb, a.settings.get("images") or b.settings.get("images")
    )
    both, _, only_a, only_b = match(a, b)
    galleries = [
        Gallery(
            f"only-{key.lower()}",
            f"Only in {key}",
            f"Samples of {table.name} that the other does not have, most novel first.",
            len(rows),
            samples(by_gain(rows).head(GALLERY_SIZE).set_index("row")),
            SORT_KEYS,
            largest_first=True,
        )
        for key, table, rows in (("A", a, only_a), ("B", b, only_b))
        if len(rows)
    ]
    figure = wide_and_narrow(
        "gains",
        "Histograms of the mean gain of what only A, both, and only B kept.",
        (860, 280),
        (NARROW, 280),
        draw_gains,
        {"only in A": only_a.gain, "in both": both.gain, "only in B": only_b.gain},
    )
    return render(
        "compare.html.j2",
        found=found,
        notes=[missing] if missing else [],
        galleries=galleries,
        figure=figure,
        address=thumbnails.address,
    )


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
    axes.set(ylim=(0, None), xlim=(0, edges[-1]), xlabel="mean gain", ylabel="samples")
    compact_counts(axes, "y")
    legend_above(axes)
