"""``infogrowth sweep``: what other thresholds would have kept, without embedding again."""

import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from infogrowth.config import option
from infogrowth.errors import UserError
from infogrowth.files import atomic_write

if TYPE_CHECKING:
    from infogrowth.report.sweeping import Sweep

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
    from infogrowth.report.sweeping import sweep

    suffix = Path(config.output).suffix.lower() if config.output else None
    if suffix not in (None, ".html", ".png"):
        raise UserError(f"--output {config.output} must end in .html or .png")
    for value in config.min_align:
        if not -1 <= value <= 1:  # NaN is refused too
            raise UserError(f"--min-align must lie between -1 and 1, not {value!r}")
    dataset = open_growth(config.growth)
    found = sweep(dataset, config.min_align, config.tops)
    if config.output:
        content = _page(dataset.name, found) if suffix == ".html" else _plot(found)
        with atomic_write(config.output, "wb") as file:
            file.write(content)
        log.info("wrote %s", config.output)
    print(json.dumps(found.as_json(), indent=2) if config.json else as_text(found))
    return 0


def as_text(found: "Sweep") -> str:
    """The sweep for a terminal; a star marks the threshold in force."""
    from infogrowth.report.formatting import decimal, percent

    def percent_or_dash(share: float | None) -> str:
        return "–" if share is None else percent(100 * share)

    lines = [
        f"{'min_align':>10} {'kept':>16} {'recaptioned':>12} {'dropped':>9} {'mean gain':>10} "
        f"{'purity':>8} {'right lost':>11}"
    ]
    for row in found.thresholds:
        kept = f"{row.kept}" if row.exact else f"{row.kept} to {row.kept_at_most}"
        name = f"{row.threshold:g}" + ("*" if row.in_force else " ")
        lines.append(
            f"{name:>10} {kept:>16} {row.recaptioned:>12} {row.dropped:>9} "
            f"{decimal(row.mean_gain):>10} {percent_or_dash(row.purity):>8} "
            f"{percent_or_dash(row.right_lost):>11}"
        )
    if found.tops:
        lines += [
            "",
            f"{'top N':>10} {'share':>16} {'min gain':>12} {'mean':>9} {'information':>12}",
        ]
        lines += [
            f"{row.count:>10} {100 * row.share:>15.1f}% {row.min_gain:>12.3f} "
            f"{row.mean_gain:>9.3f} {100 * row.information:>11.1f}%"
            for row in found.tops
        ]
    return "\n".join([*lines, "", *(f"* {note}" for note in found.notes)])


def _plot(found: "Sweep") -> bytes:
    from infogrowth.report.charts import PAPER, to_png
    from infogrowth.report.sweeping import sweep_figure

    return to_png(sweep_figure(found, PAPER))


def _page(name: str, found: "Sweep") -> bytes:
    from infogrowth.report.charts import PAGE, to_page
    from infogrowth.report.page import render
    from infogrowth.report.sweeping import sweep_figure

    description = "Samples kept by alignment threshold, and information kept by the top N."
    page = render(
        "sweep.html.j2",
        title=name,
        found=found,
        figure=to_page(sweep_figure(found, PAGE, 900), "sweep", description),
        figure_narrow=to_page(sweep_figure(found, PAGE, 350, True), "sweep-narrow", description),
    )
    return page.encode("utf-8")
