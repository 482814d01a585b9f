"""From numbers, charts and samples to one HTML file that needs nothing else.

Captions and ids are text from the web: the templates escape everything (autoescape), and a content
security policy lets the browser run this package's own script and nothing else, should a mistake
ever slip through. No address in the page leads outside it.
"""

import base64
import hashlib
from collections.abc import Callable
from functools import partial
from typing import Any

import jinja2
import pandas as pd
from markupsafe import Markup

from infogrowth.annotations import SPACES
from infogrowth.report import charts, dataset, formatting
from infogrowth.report.dataset import GrowthTable
from infogrowth.report.galleries import Thumbnails, galleries, samples
from infogrowth.report.projection import kept_map

GROUP_IMAGES = 12
_FILTERS = ("count", "decimal", "known", "percent", "plain", "share", "shown", "compact")


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
    table: GrowthTable, thumbnails: Thumbnails, duplicate_distance: float | None = None
) -> dict[str, Any]:
    """Everything that dataset.html.j2 shows."""
    duplicates = dataset.duplicate_groups(table, duplicate_distance)
    for group in duplicates["groups"]:
        group["samples"] = samples(table.rows.iloc[group["rows"][:GROUP_IMAGES]])
    visits = dataset.expected_visits(table.gains[table.kept])
    curve = dataset.growth_curve(table)
    gain = (curve.gain_image + curve.gain_text) / 2
    fifth = max(1, len(gain) // 5)
    return {
        "table": table,
        "address": thumbnails.address,
        "headline": dataset.headline(table),
        "note": thumbnails.note,
        "sources": list(dataset.by_source(table).itertuples()),
        "figures": _figures(table, curve, visits),
        # First against last fifth of the stream, for readers who cannot see the curve.
        "flattening": [gain[:fifth].mean(), gain[-fifth:].mean()],
        "epoch_lengths": visits.sum(),
        "galleries": galleries(table),
        "duplicates": duplicates,
        "map": kept_map(table, thumbnails),
        "reasons": dataset.reason_counts(table),
    }


def _figures(
    table: GrowthTable, curve: pd.DataFrame, visits: pd.DataFrame
) -> dict[str, Callable[..., Markup]]:
    """The charts of dataset.html.j2 by name, which describes them; without those for which the
    table has no data."""
    gains = dict(zip(SPACES, table.gains[table.kept].T, strict=True))
    if not table.has_text:
        del gains["text"]
    figures: dict[str, Callable[..., Markup]] = {
        "gain": partial(charts.svg, "gains", charts.SMALL, charts.draw_gain, gains),
        "visits": partial(charts.svg, "visits", charts.SMALL, charts.draw_visits, visits),
    }
    if table.neighbors is not None:
        data: tuple[Any, ...] = (curve, dataset.source_starts(table))
        narrow = charts.NARROW, 380
        figures["growth"] = partial(
            charts.svg, "growth", (680, 380), charts.draw_growth, *data, narrow=narrow
        )
    if table.rows.alignment.notna().any():
        data = table.rows.alignment.to_numpy(), table.rows.verdict.to_numpy(), table.min_align
        figures["alignment"] = partial(
            charts.svg, "alignment", charts.SMALL, charts.draw_alignment, *data
        )
    if table.estimate is not None:
        data = table.estimate, table.min_align
        figures["purity"] = partial(charts.svg, "purity", charts.SMALL, charts.draw_purity, *data)
    return figures
