"""`infogrowth report`: show a grown dataset (and training runs) on one self-contained HTML page."""

import logging
from dataclasses import dataclass
from typing import Any

from infogrowth.annotations import load_annotations
from infogrowth.config import option
from infogrowth.errors import UserError
from infogrowth.files import atomic_write

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Config:
    """Options of ``infogrowth report``."""

    growth: str | None = option(None, "growth folder (GROWTH_DIR) to show", positional=True)
    annotations: str | None = option(None, "a result JSON, not a growth folder", excludes="growth")
    lmdb: str | None = option(None, "LMDB of the images; by default the one the growth used")
    training: list[str] = option([], "training runs to lay side by side (folders with log.jsonl)")
    output: str = option("report.html", "the page to write", short="-o")
    atlas: str | None = option(
        None, "decisions for Embedding Atlas: FILE.parquet", extensions=".parquet", needs="growth"
    )
    truth: str | None = option(
        None, "annotation JSON of the right captions: scores the growth", needs="growth"
    )
    title: str | None = option(None, "title of the page; by default the folder's name")
    duplicate_distance: float | None = option(
        None, "of near-duplicates; auto: a fifth of that to a usual nearest image", min=0, max=2
    )


def run(config: Config) -> int:
    """Write the page; logs where it is and how large."""
    if not (config.growth or config.annotations or config.training):
        raise UserError("give a growth folder, --annotations FILE.json, or --training RUN_DIR …")
    # Drawing libraries take a second to load: only once it is clear that there is work to do.
    from infogrowth.report.page import render
    from infogrowth.report.training_runs import read_runs, training_context

    context: dict[str, Any] = {"title": "Training", "table": None, "training": None}
    if config.growth or config.annotations:
        context |= _dataset(config)
    if config.training:
        context |= training_context(read_runs(config.training))
    page = render("report.html.j2", **context | ({"title": config.title} if config.title else {}))
    with atomic_write(config.output, "wb") as file:
        file.write(page)
    log.info("wrote %s (%.1f MB)", config.output, len(page) / 1e6)
    return 0


def _dataset(config: Config) -> dict[str, Any]:
    from infogrowth.evaluation.truth import score_captions
    from infogrowth.report.dataset import open_annotations, open_growth
    from infogrowth.report.galleries import Thumbnails
    from infogrowth.report.page import dataset_context
    from infogrowth.report.projection import ATLAS_COMMAND, write_atlas

    table = (
        open_growth(config.growth) if config.growth else open_annotations(str(config.annotations))
    )
    if not len(table.rows):
        raise UserError(f"{config.growth} holds no samples yet; run `python -m infogrowth grow`")
    thumbnails = Thumbnails(config.lmdb, table.settings.get("images"))
    if path := config.atlas:
        write_atlas(path, table, thumbnails)
        log.info("wrote %s; look at it with: %s", path, ATLAS_COMMAND.format(path=path))
    context = dataset_context(table, thumbnails, config.duplicate_distance)
    context |= {"title": table.name, "truth": None}
    if config.truth:  # captions before and after, where the right ones are known
        captions = {entry["image"]: entry["caption"] for entry in load_annotations(config.truth)}
        right = {name: [text] if isinstance(text, str) else text for name, text in captions.items()}
        if not table.rows.id[table.rows.reason != "seed"].isin(list(right)).any():
            raise UserError(f"{config.truth} has none of the samples of {table.name}: other ids?")
        context["truth"] = score_captions(table.rows, right)
    return context
