"""``infogrowth sweep``: what other thresholds would have kept, without embedding again."""

import json
import logging
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from infogrowth.config import option
from infogrowth.errors import UserError
from infogrowth.files import atomic_write

if TYPE_CHECKING:
    from infogrowth.report.sweep import Sweep

HELP = "report what other thresholds and static selections would have kept"
POSITIONAL = ("growth",)
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Config:
    """Options of ``infogrowth sweep``."""

    growth: str = option(help="growth folder (GROWTH_DIR)")
    min_align: list[float] = option([], "thresholds to try; by default a grid over the alignments")
    tops: list[int] = option([], "sizes of static selections; by default tenths of the kept set")
    output: str | None = option(None, "also write the plot: FILE.html or FILE.png", short="-o")
    json: bool = option(False, "print JSON instead of tables")


def run(config: Config) -> int:
    """Print the tables, or JSON; write the plot if asked to."""
    from infogrowth.report.dataset import open_growth
    from infogrowth.report.sweep import as_text, sweep

    suffix = Path(config.output).suffix.lower() if config.output else None
    if suffix not in (None, ".html", ".png"):
        raise UserError(f"--output {config.output} must end in .html or .png")
    for value in config.min_align:
        if not -1 <= value <= 1:  # NaN is refused too
            raise UserError(f"--min-align must lie between -1 and 1, not {value!r}")
    table = open_growth(config.growth)
    found = sweep(table, config.min_align, config.tops)
    if config.output:
        content = _page(table.name, found) if suffix == ".html" else _plot(found)
        with atomic_write(config.output, "wb") as file:
            file.write(content)
        log.info("wrote %s", config.output)
    print(json.dumps(asdict(found), indent=2) if config.json else as_text(found))
    return 0


def _plot(found: "Sweep") -> bytes:
    from infogrowth.report.charts import draw_sweep, png

    return png((760, 300), draw_sweep, found)


def _page(name: str, found: "Sweep") -> bytes:
    from infogrowth.report.charts import NARROW, draw_sweep, wide_and_narrow
    from infogrowth.report.page import render

    description = "Samples kept by alignment threshold, and information kept by the top N."
    figure = wide_and_narrow("sweep", description, (900, 300), (NARROW, 820), draw_sweep, found)
    return render("sweep.html.j2", title=name, found=found, figure=figure)
