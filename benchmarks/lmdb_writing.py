"""LMDB writing: batched transactions against one transaction per image, on the same images.

    python benchmarks/lmdb_writing.py [--source processed_data/sample] [--rounds 3] [--json FILE]

Both write the same bytes under the same keys into a fresh LMDB on the same disk, and both end
with everything on disk; the results are compared. A third row is the whole packing, with every
image decoded first. The order of the rounds alternates; the best round of each counts.
"""

import logging
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import lmdb

from infogrowth.cli import run_script
from infogrowth.commands.pack import pack
from infogrowth.config import option
from infogrowth.data.image_stores import LmdbWriter
from infogrowth.data.sources import Source, open_source
from infogrowth.files import atomic_write_json

Items = list[tuple[str, bytes]]


@dataclass(frozen=True)
class Config:
    """Options of the benchmark."""

    source: str = option("processed_data/sample", "images in any layout that the writer reads")
    directory: str = option("output", "a folder on the disk that is measured")
    rounds: int = option(3, "how often each way is timed")
    json: str | None = option(None, "write the rows to this file as well")


def run(config: Config) -> int:
    """Time both ways of writing, check that they agree, print the table."""
    logging.getLogger("infogrowth").setLevel(logging.WARNING)  # no progress bars in the timing
    source = open_source(config.source)
    items = [(s.id, s.data) for s in source if s.data is not None and s.problem is None]
    ways: dict[str, Callable[[Path], object]] = {
        "one transaction per image": lambda path: one_by_one(path, items),
        "batched transactions": lambda path: batched(path, items),
        "batched, each image decoded": lambda path: packed(path, source),
    }
    seconds = best_times(ways, Path(config.directory), config.rounds)
    baseline = seconds["one transaction per image"]
    size = sum(len(data) for _, data in items)
    rows = [
        {
            "way": way,
            "images": len(items),
            "megabytes": round(size / 1e6, 2),
            "seconds": round(taken, 4),
            "images_per_s": round(len(items) / taken),
            "speedup": round(baseline / taken, 1),
        }
        for way, taken in seconds.items()
    ]
    print(f"{len(items)} images, {size / 1e6:.1f} MB, best of {config.rounds} rounds")
    for row in rows:
        print(
            f"{row['way']:28s} {row['seconds']:8.3f} s  {row['images_per_s']:8d} images/s"
            f"  {row['speedup']:6.1f}x"
        )
    if config.json:
        atomic_write_json(config.json, rows, indent=2)
    return 0


def best_times(
    ways: dict[str, Callable[[Path], object]], directory: Path, rounds: int
) -> dict[str, float]:
    """Seconds of each way's best round; refuses ways that leave different LMDBs."""
    directory.mkdir(parents=True, exist_ok=True)
    seconds = dict.fromkeys(ways, float("inf"))
    contents: dict[bytes, bytes] | None = None
    for number in range(rounds):
        order = list(ways) if number % 2 == 0 else list(ways)[::-1]
        for way in order:
            folder = Path(tempfile.mkdtemp(dir=directory))
            try:
                os.sync()  # what others wrote is not our time
                started = time.perf_counter()
                ways[way](folder / "lmdb")
                seconds[way] = min(seconds[way], time.perf_counter() - started)
                found = content(folder / "lmdb")
                if contents is not None and found != contents:
                    raise SystemExit(f"{way} left another LMDB than the others")
                contents = found
            finally:
                shutil.rmtree(folder)
    return seconds


def content(path: Path) -> dict[bytes, bytes]:
    """All that an LMDB holds."""
    with (
        lmdb.open(str(path), readonly=True, lock=False) as environment,
        environment.begin() as transaction,
    ):
        return dict(transaction.cursor())


def one_by_one(path: Path, items: Items) -> None:
    """A transaction for every image, in a map that is large enough from the start."""
    with lmdb.open(str(path), map_size=1 << 40) as environment:
        for key, data in items:
            with environment.begin(write=True) as transaction:
                transaction.put(key.encode(), data)


def batched(path: Path, items: Items) -> None:
    """Our writer."""
    with LmdbWriter(path) as writer:
        for key, data in items:
            writer.put(key, data)


def packed(path: Path, source: Source) -> None:
    """Our whole packing: read, decode, write, with annotations."""
    workers = len(os.sched_getaffinity(0))
    pack(source, path.parent, path.name, workers, max_pixels=100_000_000)
    (path.parent / f"lmdb_{path.name}").rename(path)


if __name__ == "__main__":
    sys.exit(run_script(Config, run))
