"""From numbers, charts and cards to one HTML file that needs nothing else.

Captions and ids are text from the web: the templates escape everything (autoescape), and a content
security policy lets the browser run this package's own script and nothing else, should a mistake
ever slip through. No address in the page leads outside it.
"""

import base64
import hashlib
from importlib import resources
from typing import Any

import jinja2
from markupsafe import Markup

from infogrowth.report import formatting, numbers
from infogrowth.report.dataset import GrowthTable
from infogrowth.report.figures import dataset_charts
from infogrowth.report.galleries import CardMaker, Thumbnails, galleries, groups
from infogrowth.report.map import kept_map

_TEMPLATES = resources.files("infogrowth.report") / "templates"
_FILTERS = ("count", "decimal", "percent", "plain", "share", "shown", "compact")


def render(template: str, **context: Any) -> str:
    """Fill ``template`` (a name in report/templates) and return a whole page."""
    script = _asset("script.js")
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("infogrowth.report", "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update({name: getattr(formatting, name) for name in _FILTERS})
    return environment.get_template(template).render(
        style=Markup(_asset("style.css")),
        script=Markup(script),
        script_digest=Markup(_digest(script)),
        **context,
    )


def dataset_context(
    table: GrowthTable,
    thumbnails: Thumbnails,
    notes: list[str],
    duplicate_distance: float | None = None,
) -> dict[str, Any]:
    """Everything that dataset.html.j2 shows."""
    maker = CardMaker(table, thumbnails)
    found = numbers.duplicate_groups(table, duplicate_distance)
    curve = numbers.growth_curve(table)
    visits = numbers.expected_visits(table.gains[table.kept])
    return {
        "dataset": True,
        "has_decisions": table.has_decisions,
        "has_text": table.has_text,
        "headline": numbers.headline(table),
        "settings_line": settings_line(table),
        "settings_table": sorted((key, str(value)) for key, value in table.settings.items()),
        "k": table.settings.get("k"),
        "notes": notes,
        "sources": numbers.by_source(table),
        "figures": dataset_charts(table, curve, visits),
        "epoch_lengths": visits.epoch_length,
        "galleries": galleries(maker),
        "groups": {
            "shown": groups(maker, found),
            "total": len(found.groups),
            "samples": sum(map(len, found.groups)),
            "distance": found.distance,
            "usual": found.usual,
        },
        "map": kept_map(table, maker),
        "reasons": numbers.reason_counts(table),
    }


def settings_line(table: GrowthTable) -> str:
    """The settings that matter in one line."""
    if not table.has_decisions:
        return "A result JSON: kept samples with their gains. A growth folder tells more."
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


def _asset(name: str) -> str:
    return (_TEMPLATES / name).read_text(encoding="utf-8")


def _digest(script: str) -> str:
    return base64.b64encode(hashlib.sha256(script.encode("utf-8")).digest()).decode("ascii")
