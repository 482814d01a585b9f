"""From numbers, charts and samples to one HTML file that needs nothing else.

Captions and ids are text from the web: the templates escape everything (autoescape), and a content
security policy lets the browser run this package's own script and nothing else, should a mistake
ever slip through. No address in the page leads outside it.
"""

import base64
import hashlib
from typing import Any

import jinja2
import numpy as np
import pandas as pd
from markupsafe import Markup

from infogrowth.growth.thresholds import StreamEstimate
from infogrowth.report import dataset, formatting
from infogrowth.report.charts import (
    NARROW,
    SMALL,
    draw_alignment,
    draw_gain,
    draw_growth,
    draw_purity,
    draw_visits,
    svg,
    wide_and_narrow,
)
from infogrowth.report.dataset import GrowthTable
from infogrowth.report.formatting import compact, decimal
from infogrowth.report.galleries import Thumbnails, galleries, samples
from infogrowth.report.projection import kept_map

GROUP_IMAGES = 12
_FILTERS = ("count", "decimal", "percent", "plain", "share", "shown", "compact")


def render(template: str, **context: Any) -> bytes:
    """Fill ``template`` (a name in report/templates); returns a whole page in UTF-8."""
    files = jinja2.PackageLoader("infogrowth.report", "templates")
    environment = jinja2.Environment(
        loader=files,
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update({name: getattr(formatting, name) for name in _FILTERS})
    style, script = (files.get_source(environment, name)[0] for name in ("style.css", "script.js"))
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode("ascii")
    own = {"style": Markup(style), "script": Markup(script), "script_digest": Markup(digest)}
    return environment.get_template(template).render(**own, **context).encode()


def dataset_context(
    table: GrowthTable,
    thumbnails: Thumbnails,
    notes: list[str],
    duplicate_distance: float | None = None,
) -> dict[str, Any]:
    """Everything that dataset.html.j2 shows."""
    duplicates = dataset.duplicate_groups(table, duplicate_distance)
    for group in duplicates["groups"]:
        group["samples"] = samples(table.rows.iloc[group["rows"][:GROUP_IMAGES]])
    head = dataset.headline(table)
    visits = dataset.expected_visits(table.gains[table.kept])
    return {
        "table": table,
        "address": thumbnails.address,
        "headline": head,
        "settings_line": settings_line(table),
        "notes": notes,
        "sources": list(dataset.by_source(table).itertuples()),
        "figures": dataset_charts(table, head, visits),
        "purity_note": purity_note(table.estimate) if table.estimate else None,
        "epoch_lengths": visits.sum(),
        "galleries": galleries(table),
        "duplicates": duplicates,
        "map": kept_map(table, thumbnails),
        "reasons": dataset.reason_counts(table),
    }


def dataset_charts(
    table: GrowthTable, head: dict[str, Any], visits: pd.DataFrame
) -> dict[str, Markup]:
    """The charts of dataset.html.j2 by name; without those for which the table has no dataset."""
    gains = dict(zip(("image", "text"), table.gains[table.kept].T, strict=True))
    if not table.has_text:
        del gains["text"]
    means = f"{decimal(head['gain_image'])} image and {decimal(head['gain_text'])} text"
    charts = {
        "gain": svg(
            "gains",
            f"Histogram of gains of the kept samples; means {means}.",
            SMALL,
            draw_gain,
            gains,
        ),
        "visits": svg(
            "visits",
            "Expected visits per epoch of the kept samples, ordered by gain, under the uniform, "
            "proportional and two-phase samplers.",
            SMALL,
            draw_visits,
            visits,
        ),
    }
    if table.neighbors is not None:
        curve = dataset.growth_curve(table)
        charts["growth"] = wide_and_narrow(
            "growth",
            "Of {seen} samples seen, {kept} were kept, {recaptioned} of them with a new caption, "
            "and {dropped} dropped. ".format_map(head)
            + _flattening(curve),
            (680, 380),
            (NARROW, 380),
            draw_growth,
            curve,
            dataset.source_starts(table),
        )
    alignment, verdicts = table.rows.alignment, table.rows.verdict
    if alignment.notna().any():
        under = compact((alignment < (table.min_align or 0)).sum())
        charts["alignment"] = svg(
            "alignment",
            f"Histogram of alignment; {under} samples lie under the threshold.",
            SMALL,
            draw_alignment,
            alignment.to_numpy(),
            verdicts.to_numpy(),
            table.min_align,
        )
    if table.estimate is not None:
        text = purity_note(table.estimate)
        charts["purity"] = svg("purity", text, SMALL, draw_purity, table.estimate, table.min_align)
    return charts


def purity_note(estimate: StreamEstimate) -> str:
    """What the estimate rests on, in one sentence."""
    low, high = (f"{100 * share:.1f}" for share in estimate.noise_interval)
    return (
        f"Estimated from {estimate.seeds} seeds: {100 * estimate.noise:.1f} % "
        f"of the stream's captions are wrong ({low} to {high} %)."
    )


def settings_line(table: GrowthTable) -> str:
    """The settings that matter in one line."""
    if table.neighbors is None:
        return "A result JSON: kept samples with their gains. A growth folder shows more."
    settings = table.settings
    # An encoder from a folder is named by its path: the last part says enough.
    encoder = str((settings.get("encoder") or {}).get("name") or "").rstrip("/").rsplit("/", 1)[-1]
    parts = [
        f"features of {encoder}" if encoder else None,
        f"alignment threshold {table.min_align:.3g}" if table.min_align is not None else None,
        f"gain over {settings['k']} nearest neighbors" if settings.get("k") else None,
    ]
    line = ", ".join(part for part in parts if part)
    return line[:1].upper() + line[1:] + "."


def _flattening(curve: pd.DataFrame) -> str:
    """First against last fifth of the stream, for readers who cannot see the curve."""
    gain = (curve.gain_image + curve.gain_text) / 2
    fifth = max(1, len(gain) // 5)
    first, last = gain[:fifth].mean(), gain[-fifth:].mean()
    if not np.isfinite(first + last):
        return ""
    return (
        f"The mean gain went from {decimal(first)} in the first fifth of the "
        f"stream to {decimal(last)} in the last."
    )
