"""The host's share of growth: pairs per second of `grow` where looking up neighbors costs nothing.

    python benchmarks/growth_host.py [--pairs 262144] [--against OTHER_CHECKOUT]

A stand-in for the index answers at once, with rows drawn at random and distances that fall; all
else is the command as users run it: features are read, brought to unit length, cleaned and decided,
decisions, kept features and the result JSON are written. About a quarter of the pairs is dropped.
With `--against` the same is measured with the code of another checkout, in turns (best of each),
and the ratio is printed.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

DIMENSION = 256
SHARD = 65536
WORDS = ["a", "the", "red", "small", "wooden", "boat", "dog", "river", "near", "two", "café", "狐"]


def write_features(folder: Path, pairs: int) -> None:
    """A features folder in the clip-retrieval layout, float16 as `embed` writes it."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    random = np.random.default_rng(0)
    for name in ("img_emb", "text_emb", "metadata"):
        (folder / name).mkdir(parents=True)
    for number, start in enumerate(range(0, pairs, SHARD)):
        count = min(SHARD, pairs - start)
        image = random.standard_normal((count, DIMENSION), np.float32)
        noise = random.standard_normal((count, DIMENSION), np.float32)
        text = image + np.where(random.random((count, 1)) < 0.25, 5, 0.8).astype(np.float32) * noise
        for name, rows in (("img_emb", image), ("text_emb", text)):
            rows /= np.linalg.norm(rows, axis=1, keepdims=True)
            np.save(folder / name / f"{name}_{number:04d}.npy", rows.astype(np.float16))
        chosen = random.integers(len(WORDS), size=(count, 10))
        captions = [" ".join(WORDS[word] for word in row) for row in chosen.tolist()]
        ids = [f"{row:09d}" for row in range(start, start + count)]
        table = pa.table({"image_path": ids, "caption": captions})
        pq.write_table(table, folder / "metadata" / f"metadata_{number:04d}.parquet")


class FreeIndex:
    """Answers without looking: rows at random among those that are visible."""

    alone = True

    def __init__(self, dimension: int, k: int) -> None:
        self.dimension, self.k, self.count = dimension, k, 0
        self._random = np.random.default_rng(0)
        self._products = np.sort(self._random.random((65536, k)))[:, ::-1].copy()

    def extend(self, rows: np.ndarray) -> None:
        self.count += len(rows)

    def truncate(self, count: int) -> None:
        self.count = min(self.count, count)

    def search(self, queries: np.ndarray, visible: np.ndarray) -> Any:
        from infogrowth.neighbors import Neighbors

        draws = self._random.random((len(queries), self.k), np.float32)
        positions = (draws * visible[:, None]).astype(np.int64)
        absent = np.arange(self.k) >= visible[:, None]
        products = np.where(absent, -np.inf, np.resize(self._products, positions.shape))
        return Neighbors(np.where(absent, -1, positions), products)

    def search_and_extend(self, queries: np.ndarray, joins: np.ndarray) -> Any:
        found = self.search(queries, self.count + np.cumsum(joins) - joins)
        self.count += int(joins.sum())
        return found

    def describe(self) -> str:
        return "free"

    def report(self) -> dict[str, Any]:
        return {"search": "free"}


def measure(features: Path) -> None:
    """Grow in this process; prints the seconds, from opening the features to the JSON on disk."""
    import pandas  # noqa: F401 - pyarrow would import it, and torch, while time runs
    import torch  # noqa: F401

    for name in ("growth.engine", "growth.dataset", "commands.grow_session"):  # now and before
        with contextlib.suppress(ImportError):
            home = importlib.import_module(f"infogrowth.{name}")
            if hasattr(home, "create_index"):
                home.create_index = lambda kind, width, k, *rest, **more: FreeIndex(width, k)
    from infogrowth.commands import grow

    with tempfile.TemporaryDirectory(dir=features.parent) as folder:
        config = grow.Config(
            features=str(features), growth=f"{folder}/growth", output=[f"{folder}/grown.json"]
        )
        started, work = time.perf_counter(), time.process_time()
        grow.run(config)
        seconds, work = time.perf_counter() - started, time.process_time() - work
        print(json.dumps({"seconds": seconds, "cpu": work}))


def run_once(checkout: Path, features: Path) -> dict[str, float]:
    command = [sys.executable, __file__, "--measure", str(features)]
    answer = subprocess.run(
        command,
        env={**os.environ, "PYTHONPATH": str(checkout)},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return json.loads(answer.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, default=4 * SHARD)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--against", type=Path, help="another checkout, measured in turns")
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        measure(options.measure)
        return
    checkouts = {"this checkout": Path(__file__).parents[1]}
    if options.against:
        checkouts["the other"] = options.against.resolve()
    with tempfile.TemporaryDirectory() as folder:
        features = Path(folder) / "features"
        write_features(features, options.pairs)
        best: dict[str, dict[str, float]] = {}
        for _ in range(options.rounds):
            for name, checkout in checkouts.items():
                found = run_once(checkout, features)
                if name not in best or found["seconds"] < best[name]["seconds"]:
                    best[name] = found
    for name, found in best.items():
        speed, each = options.pairs / found["seconds"], 1e6 * found["seconds"] / options.pairs
        cpu = 1e6 * found["cpu"] / options.pairs
        print(f"{name:<14} {speed:9,.0f} pairs/s  {each:6.1f} µs a pair  {cpu:6.1f} µs of CPU time")
    if options.against:
        ratio = best["the other"]["seconds"] / best["this checkout"]["seconds"]
        print(f"{ratio:.2f} times the other's pairs per second")


if __name__ == "__main__":
    main()
