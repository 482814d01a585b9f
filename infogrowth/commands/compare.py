"""`infogrowth compare`: compare two grown datasets: overlap, gains, what only one kept."""

import json
import logging
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from infogrowth.config import option
from infogrowth.data.text import image_key
from infogrowth.files import atomic_write
from infogrowth.report.dataset import GrowthTable, open_dataset
from infogrowth.report.formatting import decimal, known, percent, shown

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Config:
    """Options of ``infogrowth compare``."""

    a: str = option(help="a result JSON or a growth folder", positional=True)
    b: str = option(help="the other one", positional=True)
    limit: int = option(10, "how many ids to list of what only one kept", min=0)
    output: str | None = option(
        None, "also write a page with images: FILE.html", short="-o", extensions=".html"
    )
    lmdb: str | None = option(None, "LMDB of the images for the page")
    json: bool = option(False, "print JSON instead of text")


def run(config: Config) -> int:
    """Print the comparison; write the page if asked to."""
    a, b = open_dataset(config.a), open_dataset(config.b)
    found = compare(a, b, config.limit)
    if config.output:
        with atomic_write(config.output, "wb") as file:
            file.write(page(a, b, found, config.lmdb))
        log.info("wrote %s", config.output)
    print(json.dumps(found, indent=2, ensure_ascii=False) if config.json else as_text(found))
    return 0


def match(
    a: GrowthTable, b: GrowthTable
) -> tuple[pd.DataFrame, pd.DataFrame, pd.DataFrame, pd.DataFrame]:
    """Rows of kept samples by id, with or without an extension; the first of equal ids counts.
    Returns rows of A and of B that are the same sample, in A's order; those only in A; only in B.
    """
    kept_a, kept_b = _by_key(a), _by_key(b)
    in_both = kept_a.index[kept_a.index.isin(kept_b.index)]
    only_b = kept_b[~kept_b.index.isin(in_both)]
    return kept_a.loc[in_both], kept_b.loc[in_both], kept_a.drop(in_both), only_b


def compare(a: GrowthTable, b: GrowthTable, limit: int = 10) -> dict[str, Any]:
    """Compare what A and B kept; ``limit`` ids are listed per part.

    Returns:
        ready for JSON: ``both``, ``only_a`` and ``only_b`` (count, mean gains, and the ids of
        largest mean gain; gains of ``both`` are A's), ``overlap`` (intersection over union), and
        over what is in both the number of ``other_caption``, the mean ``gain_difference``
        |A's − B's| and Pearson's ``gain_correlation``.
    """
    both_a, both_b, only_a, only_b = match(a, b)
    union = len(both_a) + len(only_a) + len(only_b)
    varied = min(both_a.gain.nunique(), both_b.gain.nunique()) > 1
    return {
        "name_a": a.name,
        "name_b": b.name,
        "count_a": len(both_a) + len(only_a),
        "count_b": len(both_a) + len(only_b),
        "both": _part(both_a, limit),
        "only_a": _part(only_a, limit),
        "only_b": _part(only_b, limit),
        "overlap": len(both_a) / union if union else 1.0,
        "other_caption": int((both_a.caption != both_b.caption).sum()),
        "gain_difference": known((both_a.gain - both_b.gain).abs().mean(skipna=False)),
        "gain_correlation": known(both_a.gain.corr(both_b.gain)) if varied else None,
    }


def by_gain(rows: pd.DataFrame) -> pd.DataFrame:
    """The largest mean gain first, ties in stream order."""
    return rows.iloc[np.argsort(-np.nan_to_num(rows.gain), kind="stable")]


def _by_key(table: GrowthTable) -> pd.DataFrame:
    rows = table.rows.assign(**dict(zip(("gain_image", "gain_text"), table.gains.T, strict=True)))
    rows = rows[table.kept].reset_index(names="row")
    rows = rows.set_index(rows.id.map(image_key))
    return rows[~rows.index.duplicated()]


def _part(rows: pd.DataFrame, limit: int) -> dict[str, Any]:
    means = {name: known(rows[name].mean(skipna=False)) for name in ("gain_image", "gain_text")}
    return {"count": len(rows), **means, "most_novel": by_gain(rows).id.head(limit).tolist()}


def as_text(found: dict[str, Any]) -> str:
    """The comparison for a terminal."""
    parts = {"only in A": "only_a", "in both": "both", "only in B": "only_b"}
    lines = [
        f"A  {shown(found['name_a'])}: {found['count_a']} samples",
        f"B  {shown(found['name_b'])}: {found['count_b']} samples",
        "",
        f"{'':<12} {'samples':>10} {'image gain':>12} {'text gain':>10}   (means)",
        *(
            f"{name:<12} {part['count']:>10} {decimal(part['gain_image']):>12} "
            f"{decimal(part['gain_text']):>10}"
            for name, part in ((name, found[key]) for name, key in parts.items())
        ),
        "",
        f"overlap (intersection over union)  {percent(100 * found['overlap'])}",
        f"in both with another caption       {found['other_caption']}",
        f"mean difference of gain in both    {decimal(found['gain_difference'])}",
        f"correlation of gain in both        {decimal(found['gain_correlation'])}",
    ]
    for name in ("A", "B"):
        if novel := found[f"only_{name.lower()}"]["most_novel"]:
            lines += ["", f"most novel only in {name}", *(f"  {shown(sample)}" for sample in novel)]
    return "\n".join(lines)


def page(a: GrowthTable, b: GrowthTable, found: dict[str, Any], lmdb: str | None) -> bytes:
    """The comparison with the most novel samples that only one of the two kept.

    Args:
        lmdb: of the images; None for the one that a growth folder recorded.
    """
    from infogrowth.report.charts import NARROW, draw_gains, svg
    from infogrowth.report.galleries import GALLERY_SIZE, Thumbnails, gallery
    from infogrowth.report.page import render

    recorded = a.settings.get("images") or b.settings.get("images")
    thumbnails = Thumbnails(lmdb, recorded)
    both, _, only_a, only_b = match(a, b)
    galleries = [
        gallery(f"only-{key}", rows, by_gain(rows).head(GALLERY_SIZE).set_index("row"))
        for key, rows in (("a", only_a), ("b", only_b))
        if len(rows)
    ]
    gains = {"only in A": only_a.gain, "in both": both.gain, "only in B": only_b.gain}
    figure = svg(
        "gains", (860, 280), draw_gains, gains, narrow=(NARROW, 280),
        description="Histograms of the mean gain of what only A, both, and only B kept.",
    )  # fmt: skip
    return render(
        "compare.html.j2",
        found=found,
        note=thumbnails.note,
        galleries=galleries,
        figure=figure,
        address=thumbnails.address,
    )
