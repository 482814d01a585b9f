"""How charts look, on paper and on the page: one palette by role, one style.

A matplotlib figure is drawn once per purpose. For a page it becomes an inline SVG whose colors are
CSS variables, so it follows the reader's light or dark theme; for a file it becomes a PNG.
"""

import io
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from xml.etree import ElementTree

import matplotlib as mpl
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from infogrowth.report.formatting import compact

INCH = 72.0  # an SVG of matplotlib counts in points


@dataclass(frozen=True)
class Palette:
    """Colors by role; the names are the page's CSS variables."""

    ink: str = "#1c2430"
    muted: str = "#566070"
    grid: str = "#dfe3ea"
    surface: str = "#ffffff"
    kept: str = "#0f8f7a"
    recaptioned: str = "#d98a00"
    dropped: str = "#c8385a"
    image: str = "#2f6fde"
    text: str = "#8a4fd0"
    accent: str = "#2f6fde"
    run1: str = "#2f6fde"
    run2: str = "#d9730d"
    run3: str = "#0f8f7a"
    run4: str = "#c8385a"
    run5: str = "#8a4fd0"
    run6: str = "#6b7280"

    def runs(self) -> list[str]:
        """Colors for several training runs side by side."""
        return [self.run1, self.run2, self.run3, self.run4, self.run5, self.run6]


PAPER = Palette()
# On the page a color is a placeholder no chart would choose, replaced by its CSS variable.
_PLACEHOLDERS = {field.name: f"#fe{i:02x}01" for i, field in enumerate(fields(Palette))}
PAGE = Palette(**_PLACEHOLDERS)


@contextmanager
def chart_style(palette: Palette) -> Iterator[None]:
    """Quiet axes, light horizontal grid, text left as text; restores matplotlib afterwards."""
    with mpl.rc_context(
        {
            "svg.fonttype": "none",
            "svg.hashsalt": "infogrowth",  # same ids every time: same report, same bytes
            "text.parse_math": False,  # names of runs are not formulas
            "font.family": "DejaVu Sans",
            "font.size": 11,
            "axes.edgecolor": palette.grid,
            "axes.labelcolor": palette.muted,
            "axes.labelsize": 11,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.spines.left": False,
            "axes.grid": True,
            "axes.grid.axis": "y",
            "axes.axisbelow": True,
            "axes.facecolor": "none",
            "figure.facecolor": "none",
            "grid.color": palette.grid,
            "grid.linewidth": 0.8,
            "xtick.color": palette.grid,
            "ytick.color": palette.grid,
            "xtick.labelcolor": palette.muted,
            "ytick.labelcolor": palette.muted,
            "xtick.labelsize": 10.5,
            "ytick.labelsize": 10.5,
            "ytick.major.size": 0,
            "text.color": palette.ink,
            "lines.linewidth": 1.9,
            "lines.solid_capstyle": "round",
            "legend.frameon": False,
            "legend.fontsize": 11,
            "legend.labelcolor": palette.ink,
            "legend.handlelength": 1.3,
            "legend.handleheight": 0.8,
            "legend.borderaxespad": 0,
            "legend.columnspacing": 1.4,
        }
    ):
        yield


def new_figure(width: float, height: float) -> Figure:
    """A figure of ``width`` by ``height`` CSS pixels at its natural size (no pyplot state)."""
    return Figure(figsize=(width / INCH, height / INCH), layout="constrained")


def compact_counts(axis_of: Axes, which: str) -> None:
    """Tick labels like 12k and 3M on the x or y axis."""
    axis = axis_of.xaxis if which == "x" else axis_of.yaxis
    axis.set_major_locator(mpl.ticker.MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]))
    axis.set_major_formatter(lambda value, _: compact(value))


def legend_above(axes: Axes, columns: int = 4) -> None:
    """The legend in one row over the plot, at its left edge."""
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1.02), ncols=columns)


def to_png(figure: Figure, scale: float = 2.0) -> bytes:
    """The figure on white, ``scale`` device pixels per CSS pixel."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=INCH * scale, facecolor="white")
    return buffer.getvalue()


def to_page(figure: Figure, name: str, description: str) -> Markup:
    """The figure as an inline SVG that follows the page's theme.

    Args:
        name: unique on the page; makes the ids inside the SVG unique.
        description: what a reader who cannot see the chart is told.
    """
    buffer = io.BytesIO()
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    ElementTree.register_namespace("", "http://www.w3.org/2000/svg")
    ElementTree.register_namespace("xlink", "http://www.w3.org/1999/xlink")
    root = ElementTree.fromstring(buffer.getvalue())
    _drop_metadata(root)
    for element in root.iter():
        _theme(element)
    _rename_ids(root, name)
    root.attrib.update({"role": "img", "aria-label": description, "class": "chart"})
    root.attrib.pop("height", None)
    root.attrib.pop("width", None)
    return Markup(ElementTree.tostring(root, encoding="unicode"))


_COLOR = re.compile("|".join(_PLACEHOLDERS.values()))
_VARIABLE = {color: f"var(--{name})" for name, color in _PLACEHOLDERS.items()}


def _theme(element: ElementTree.Element) -> None:
    style = element.get("style")
    if style:
        element.set("style", _COLOR.sub(lambda found: _VARIABLE[found.group()], style))


def _drop_metadata(root: ElementTree.Element) -> None:
    for child in list(root):
        if child.tag.endswith("}metadata"):
            root.remove(child)


def _rename_ids(root: ElementTree.Element, name: str) -> None:
    """Ids and the references to them get ``name`` in front: a page holds many SVGs."""
    for element in root.iter():
        for key, value in element.attrib.items():
            if key == "id":
                element.set(key, f"{name}-{value}")
            elif key.endswith("href") and value.startswith("#"):
                element.set(key, f"#{name}-{value[1:]}")
            elif value.startswith("url(#"):
                element.set(key, f"url(#{name}-{value[5:]}")
            elif "url(#" in value:
                element.set(key, value.replace("url(#", f"url(#{name}-"))
