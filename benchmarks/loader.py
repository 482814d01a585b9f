"""How many workers keep a training step fed: samples/s of a loader from LMDB, with augmentation.

    python benchmarks/loader.py [--picture_sizes 256 640] [--image_size 224] [--json FILE]

Pictures are the bundled sample's, enlarged, with a photograph's grain, as JPEG (or those of an
LMDB of your own: --lmdb DIR). Timed are the parts of the work in one process, then the DataLoader
with one worker and with more, through the same dataset that training uses.
"""

import io
import math
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import infogrowth.threads  # noqa: F401 - before torch

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader

from infogrowth.cli import run_script
from infogrowth.config import option
from infogrowth.data.datasets import PairDataset
from infogrowth.data.image_stores import LmdbImages, LmdbWriter
from infogrowth.data.images import decode_image
from infogrowth.data.sources import open_source
from infogrowth.data.transforms import TrainingTransform, pixels, random_augment, random_crop
from infogrowth.files import atomic_write_json
from infogrowth.randomness import generator


@dataclass(frozen=True)
class Config:
    """Options of the benchmark."""

    lmdb: str | None = option(None, "pictures to use instead of made ones")
    source: str = option("processed_data/sample", "pictures that the made ones are made of")
    picture_sizes: list[int] = option([256, 640], "longer side of the made pictures, in pixels")
    image_size: int = option(224, "pixels a side that the model takes")
    workers: list[int] = option([1, 2], "loader processes to time")
    samples: int = option(2000, "pairs per measurement")
    step_rates: list[int] = option([100, 500, 1000, 2500], "samples/s that a training step eats")
    json: str | None = option(None, "write the rows to this file as well")


def run(config: Config) -> int:
    """Time the loader and say how many workers given step rates need."""
    torch.set_num_threads(1)
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        for name, path in datasets(config, Path(folder)):
            rows.extend(measured(name, LmdbImages(path), config))
    if config.json:
        atomic_write_json(config.json, rows, indent=2)
    return 0


def datasets(config: Config, folder: Path) -> Iterator[tuple[str, Path]]:
    """The LMDBs to read from, with a name each."""
    if config.lmdb is not None:
        yield config.lmdb, Path(config.lmdb)
        return
    for side in config.picture_sizes:
        with LmdbWriter(folder / f"{side}") as writer:
            for item in made_pictures(config.source, side):
                writer.put(*item)
        yield f"{side} x {side * 3 // 4} JPEG", folder / f"{side}"


def made_pictures(source: str, side: int, count: int = 400) -> Iterator[tuple[str, bytes]]:
    """Drawings enlarged to ``side`` x 3/4 ``side``, with grain, as JPEG of quality 90."""
    random = np.random.default_rng(0)
    source_samples = open_source(source)
    for number in range(min(count, len(source_samples))):
        data = source_samples.read(number).data
        assert data is not None
        drawing = decode_image(data).resize((side, side * 3 // 4), Image.Resampling.BICUBIC)
        grain = random.normal(scale=6, size=(drawing.height, drawing.width, 1))
        pixels = np.clip(np.asarray(drawing) + grain, 0, 255).astype(np.uint8)
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, "JPEG", quality=90)
        yield f"{number:06d}", buffer.getvalue()


def measured(name: str, images: LmdbImages, config: Config) -> Iterator[dict[str, Any]]:
    """One row for the parts of the work, one per number of workers; printed as they come."""
    keys = list(images.keys())
    kilobytes = np.mean([len(images.read(key)) for key in keys]) / 1e3
    print(f"\n{name}, {kilobytes:.0f} kB each, to {config.image_size} pixels")
    parts = part_times(images, keys, config.image_size)
    print("  processor time: " + ", ".join(f"{part} {ms:.2f} ms" for part, ms in parts.items()))
    print(f"  that is at most {1000 / sum(parts.values()):.0f} samples/s on a core of its own")
    yield {"pictures": name, "kilobytes": round(kilobytes, 1), "milliseconds": parts}
    dataset = PairDataset(
        [{"image": key, "caption": "a caption of some words"} for key in keys],
        images,
        TrainingTransform(config.image_size, normalize=False),
    )
    best = 0.0
    for workers in config.workers:
        rate = loader_rate(dataset, workers, config.samples)
        best = max(best, rate / workers)
        print(f"  {workers} workers: {rate:7.0f} samples/s, {rate / workers:.0f} per worker")
        yield {"pictures": name, "workers": workers, "samples_per_s": round(rate, 1)}
    for step_rate in config.step_rates:
        needed = math.ceil(step_rate / best)
        print(f"  a step of {step_rate:5d} samples/s needs {needed:3d} workers on own cores")
        yield {"pictures": name, "step_samples_per_s": step_rate, "workers_needed": needed}


def part_times(images: LmdbImages, keys: list[str], size: int) -> dict[str, float]:
    """Milliseconds of processor time that a sample takes in each part of the work."""
    parts = dict.fromkeys(("read", "decode", "crop", "augment", "pixels"), 0.0)
    transform = TrainingTransform(size)
    for number in range(400):
        random = generator(0, "augment", 0, number)
        clock = [time.process_time()]
        data = images.read(keys[number % len(keys)])
        clock.append(time.process_time())
        image = decode_image(data, at_least=transform.pixels_needed)
        clock.append(time.process_time())
        box = random_crop(image.width, image.height, transform.min_scale, random)
        image = image.resize((size, size), Image.Resampling.BICUBIC, box=box)
        clock.append(time.process_time())
        image = random_augment(image, random)
        clock.append(time.process_time())
        pixels(image)
        clock.append(time.process_time())
        for part, taken in zip(parts, np.diff(clock), strict=True):
            parts[part] += taken * 1000 / 400
    return {part: round(ms, 3) for part, ms in parts.items()}


def loader_rate(dataset: PairDataset, workers: int, samples: int) -> float:
    """Samples/s of a DataLoader once its workers run."""
    positions = [(number % len(dataset), 0, number) for number in range(samples)]
    loader = DataLoader(
        dataset,
        batch_size=50,
        sampler=positions,  # type: ignore[arg-type]  # any sized iterable will do
        num_workers=workers,
        prefetch_factor=4,
    )
    batches = iter(loader)
    for _ in range(2 * workers):  # until all workers are busy
        next(batches)
    started, seen = time.perf_counter(), 0
    for batch in batches:
        seen += len(batch["index"])
    return seen / (time.perf_counter() - started)


if __name__ == "__main__":
    print(f"{len(os.sched_getaffinity(0))} processors")
    sys.exit(run_script(Config, run))
