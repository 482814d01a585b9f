"""From numbers, charts and cards to one HTML file that needs nothing else.

Captions and ids are text from the web: the templates escape everything (autoescape), and a content
security policy lets the browser run this package's own script and nothing else, should a mistake
ever slip through. No address in the page leads outside it.
"""

import base64
import hashlib
import math
from importlib import resources
from typing import Any

import jinja2
from markupsafe import Markup

from infogrowth.report.charts import compact

_TEMPLATES = resources.files("infogrowth.report") / "templates"


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
    environment.filters.update(
        count=count, decimal=decimal, percent=percent, share=share, shown=shown, compact=compact
    )
    return environment.get_template(template).render(
        style=Markup(_asset("style.css")),
        script=Markup(script),
        script_digest=Markup(_digest(script)),
        **context,
    )


def count(value: float) -> str:
    """A whole number with thin spaces between the thousands."""
    return f"{round(value):,}".replace(",", "\N{NARROW NO-BREAK SPACE}")


def decimal(value: float | None, places: int = 3) -> str:
    """A number with ``places`` decimals and a real minus sign; a dash when it is unknown."""
    if value is None or not math.isfinite(value):
        return "–"
    text = f"{value:.{places}f}"
    if float(text) == 0:
        text = text.lstrip("-")
    return text.replace("-", "\N{MINUS SIGN}")


def share(part: float, whole: float) -> float:
    """``part`` of ``whole`` in percent, 0 of nothing."""
    return 100 * part / whole if whole else 0.0


def percent(value: float) -> str:
    """A percentage for readers: 0.04 %, 3.2 %, 78 %; never rounded to 0 or 100 when it is not."""
    if 0 < value < 0.05:
        return "<\N{NARROW NO-BREAK SPACE}0.1\N{NARROW NO-BREAK SPACE}%"
    rounded = f"{value:.1f}" if value < 9.95 or 99 < value < 100 else f"{value:.0f}"
    if rounded == "100.0":
        rounded = "99.9"
    return f"{rounded}\N{NARROW NO-BREAK SPACE}%"


# Direction overrides would let a caption rewrite the text around it; other controls are noise.
_INVISIBLE = dict.fromkeys(
    [*range(0x00, 0x20), *range(0x7F, 0xA0), *range(0x202A, 0x202F), *range(0x2066, 0x206A)], " "
)


def shown(text: str) -> str:
    """Untrusted text as it may be shown: no control characters, valid Unicode. Not escaped."""
    return text.encode("utf-8", "replace").decode("utf-8").translate(_INVISIBLE)


def _asset(name: str) -> str:
    return (_TEMPLATES / name).read_text(encoding="utf-8")


def _digest(script: str) -> str:
    return base64.b64encode(hashlib.sha256(script.encode("utf-8")).digest()).decode("ascii")
