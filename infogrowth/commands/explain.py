"""``infogrowth explain``: why one sample was kept, recaptioned or dropped."""

import json
import logging
from dataclasses import dataclass

from infogrowth.config import option
from infogrowth.errors import UserError
from infogrowth.files import atomic_write

HELP = "report why a sample was kept, recaptioned or dropped, with its nearest neighbors"
POSITIONAL = ("growth", "id")
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Config:
    """Options of ``infogrowth explain``."""

    growth: str = option(help="growth folder (GROWTH_DIR)")
    id: str = option(help="id of the sample, with or without its extension")
    json: bool = option(False, "print JSON: a list, as an id may have come several times")
    image: str | None = option(None, "also write the sample and its neighbors as a PNG strip")
    lmdb: str | None = option(None, "LMDB of the images; by default the one the growth used")


def run(config: Config) -> int:
    """Print the explanation; exit status 2 when there is no such sample."""
    from infogrowth.report.dataset import open_growth
    from infogrowth.report.explain import as_text, explain, image_strip
    from infogrowth.report.galleries import open_thumbnails

    table = open_growth(config.growth)
    found = explain(table, config.id)
    if config.image is not None:
        thumbnails, note = open_thumbnails(config.lmdb, table.settings.get("images"))
        if note:
            raise UserError(note[:1].lower() + note[1:].rstrip("."))
        with atomic_write(config.image, "wb") as file:
            image_strip(found[-1], thumbnails).save(file, "PNG")
        log.info("wrote %s", config.image)
    if config.json:
        print(json.dumps([one.as_json() for one in found], indent=2, ensure_ascii=False))
    else:
        print("\n\n".join(as_text(one) for one in found))
    return 0
