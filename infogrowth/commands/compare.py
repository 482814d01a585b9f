"""``infogrowth compare``: two grown datasets side by side."""

import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from infogrowth.config import option
from infogrowth.errors import UserError
from infogrowth.files import atomic_write

if TYPE_CHECKING:
    from infogrowth.report.comparing import Comparison
    from infogrowth.report.dataset import GrowthTable

HELP = "compare two grown datasets: overlap, gains, what only one kept"
POSITIONAL = ("a", "b")
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Config:
    """Options of ``infogrowth compare``."""

    a: str = option(help="a result JSON or a growth folder")
    b: str = option(help="the other one")
    limit: int = option(10, "how many ids to list of what only one kept")
    output: str | None = option(None, "also write a page with images: FILE.html", short="-o")
    lmdb: str | None = option(None, "LMDB of the images for the page")
    json: bool = option(False, "print JSON instead of text")


def run(config: Config) -> int:
    """Print the comparison; write the page if asked to."""
    from infogrowth.report.comparing import compare

    if config.limit < 0:
        raise UserError("--limit counts ids: it cannot be negative")
    if config.output and not config.output.endswith(".html"):
        raise UserError(f"--output {config.output} must end in .html")
    a, b = _open(config.a), _open(config.b)
    found = compare(a, b, config.limit)
    if config.output:
        with atomic_write(config.output, "wb") as file:
            file.write(_page(a, b, found, config.lmdb))
        log.info("wrote %s", config.output)
    text = json.dumps(found.as_json(), indent=2, ensure_ascii=False)
    print(text if config.json else as_text(found))
    return 0


def as_text(found: "Comparison") -> str:
    """The comparison for a terminal."""
    from infogrowth.report.formatting import decimal, percent, shown

    def row(name: str, count: int, image: float | None, text: float | None) -> str:
        return f"{name:<12} {count:>10} {decimal(image):>12} {decimal(text):>10}"

    lines = [
        f"A  {shown(found.name_a)}: {found.count_a} samples",
        f"B  {shown(found.name_b)}: {found.count_b} samples",
        "",
        f"{'':<12} {'samples':>10} {'image gain':>12} {'text gain':>10}   (means)",
        row("only in A", found.only_a.count, found.only_a.gain_image, found.only_a.gain_text),
        row("in both", found.both.count, found.both.gain_image, found.both.gain_text),
        row("only in B", found.only_b.count, found.only_b.gain_image, found.only_b.gain_text),
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


def _open(path: str) -> "GrowthTable":
    from infogrowth.report.dataset import open_annotations, open_growth

    return open_growth(path) if Path(path).is_dir() else open_annotations(path)


def _page(a: "GrowthTable", b: "GrowthTable", found: "Comparison", lmdb: str | None) -> bytes:
    from infogrowth.report.charts import PAGE, to_page
    from infogrowth.report.comparing import compare_figure, compare_galleries, match
    from infogrowth.report.galleries import open_thumbnails
    from infogrowth.report.page import render

    thumbnails, note = open_thumbnails(lmdb, a.images or b.images)
    matched = match(a, b)
    description = "Histograms of the mean gain of what only A, both, and only B kept."
    page = render(
        "compare.html.j2",
        found=found,
        notes=[note] if note else [],
        galleries=compare_galleries(a, b, matched, thumbnails),
        figure=to_page(compare_figure(a, b, matched, PAGE, 860), "gains", description),
        figure_narrow=to_page(compare_figure(a, b, matched, PAGE, 350), "narrow", description),
    )
    return page.encode("utf-8")
