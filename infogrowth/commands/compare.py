"""``infogrowth compare``: two grown datasets side by side."""

import json
import logging
from dataclasses import asdict, dataclass

from infogrowth.config import option
from infogrowth.errors import UserError
from infogrowth.files import atomic_write

HELP = "compare two grown datasets: overlap, gains, what only one kept"
POSITIONAL = ("a", "b")
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Config:
    """Options of ``infogrowth compare``."""

    a: str = option(help="a result JSON or a growth folder")
    b: str = option(help="the other one")
    limit: int = option(10, "how many ids to list of what only one kept", min=0)
    output: str | None = option(None, "also write a page with images: FILE.html", short="-o")
    lmdb: str | None = option(None, "LMDB of the images for the page")
    json: bool = option(False, "print JSON instead of text")


def run(config: Config) -> int:
    """Print the comparison; write the page if asked to."""
    from infogrowth.report.compare import as_text, compare, page
    from infogrowth.report.dataset import open_dataset

    if config.output and not config.output.endswith(".html"):
        raise UserError(f"--output {config.output} must end in .html")
    a, b = open_dataset(config.a), open_dataset(config.b)
    found = compare(a, b, config.limit)
    if config.output:
        with atomic_write(config.output, "wb") as file:
            file.write(page(a, b, found, config.lmdb))
        log.info("wrote %s", config.output)
    print(
        json.dumps(asdict(found), indent=2, ensure_ascii=False) if config.json else as_text(found)
    )
    return 0
