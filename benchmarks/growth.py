"""Growth, ours against the paper's loop, on the same features.

    python benchmarks/growth.py --sizes 20000,100000 --json output/growth.json [--plot growth.png]
    python benchmarks/growth.py --large            # a million kept
    python benchmarks/growth.py --measured a.json b.json --plot growth.png
    python benchmarks/growth.py --cuda             # CC3M on one GPU, against the matrix bound

Measured is throughput at a given size: a dataset of that many kept pairs is put in place (ours:
`InfoGrowth.restore`; the paper's: bulk insertion into its two graphs), then further pairs are
added and timed. The paper's loop is hnswlib (cosine, M 48, ef_construction 100, ef 32) with one
sample at a time, two indexes and k 4, written here from that description. Gains of the first pairs
given are compared with brute force in float64. Each engine runs in its own process, so that its
peak memory is its own. "Pairs per CPU second" counts the work of all threads, and so stays
comparable on a machine that others use too. "Put in place" is the rate at which the kept pairs were
inserted, files read included. "First batch" are the seconds that ours took over its
first 512 pairs, when the approximate index learns its cells; it does so again whenever the dataset
has doubled (the log says how long that takes). The peaks of matrix products in float32 and int8 on
these cores are measured in the same run. Needs the extra package hnswlib.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

PROBE = 512  # pairs whose gains are checked
PORTION = 65536
ENGINES = ("paper", "exact", "approximate")
MILLION = 1_000_000
CC3M = 2_700_000


# --- features -------------------------------------------------------------------------------------


def clustered(size: int, dimension: int, seed: int = 0) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Portions of image and text features: clusters of about twenty pairs within broader topics,
    captions well aligned (cosine about 0.6) but nearer to some other images than others are."""
    random = np.random.default_rng(seed)
    topics = random.normal(size=(max(1, size // 2000), dimension)).astype(np.float32)
    owner = random.integers(len(topics), size=max(1, size // 20))
    shift = random.standard_normal((len(owner), dimension), np.float32)
    centers = topics[owner] + 0.7 * shift
    for start in range(0, size, PORTION):
        count = min(PORTION, size - start)
        meaning = centers[random.integers(len(centers), size=count)]
        noise = random.standard_normal((2, count, dimension), np.float32)
        yield tuple(unit(meaning + 0.6 * part) for part in noise)  # type: ignore[misc]


def unit(rows: np.ndarray) -> np.ndarray:
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def from_embeddings(path: str, size: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Real embeddings (N, 2, D): the two spaces, in a random order."""
    rows = np.load(path, mmap_mode="r")
    if len(rows) < size:
        raise SystemExit(f"{path} holds {len(rows)} rows; {size} are needed")
    order = np.random.default_rng(1).permutation(len(rows))[:size]
    for start in range(0, size, PORTION):
        part = np.asarray(rows[np.sort(order[start : start + PORTION])], np.float32)
        yield unit(part[:, 0]), unit(part[:, 1])


def write_features(folder: Path, size: int, options: argparse.Namespace) -> None:
    """Put the features of `size` kept pairs and of the pairs to process into `folder`."""
    total = size + PROBE + options.rounds * options.batch
    portions = (
        from_embeddings(options.embeddings, total)
        if options.embeddings
        else clustered(total, options.dimension)
    )
    with open(folder / "image.bin", "wb") as image, open(folder / "text.bin", "wb") as text:
        for images, texts in portions:
            images.astype(np.float32).tofile(image)
            texts.astype(np.float32).tofile(text)


def read_features(folder: Path, space: str, start: int, stop: int, dimension: int) -> np.ndarray:
    with open(folder / f"{space}.bin", "rb") as stream:
        stream.seek(start * dimension * 4)
        rows = np.fromfile(stream, np.float32, max(0, stop - start) * dimension)
    return rows.reshape(-1, dimension)


# --- truth ----------------------------------------------------------------------------------------


def true_gains(folder: Path, size: int, dimension: int) -> np.ndarray:
    """Gains (PROBE, 2) of the first pairs processed, by brute force in float64: each sees the kept
    pairs and the pairs processed before it."""
    gains = np.empty((PROBE, 2))
    for column, space in enumerate(("image", "text")):
        probe = read_features(folder, space, size, size + PROBE, dimension).astype(np.float64)
        probe = unit(probe)
        best = np.full((PROBE, 4), -np.inf)
        for start in range(0, size, 8192):
            rows = read_features(folder, space, start, min(size, start + 8192), dimension)
            products = probe @ unit(rows.astype(np.float64)).T
            merged = np.concatenate([best, products], axis=1)
            best = -np.partition(-merged, 3, axis=1)[:, :4]
        among = np.where(np.tri(PROBE, k=-1, dtype=bool), probe @ probe.T, -np.inf)
        merged = np.concatenate([best, among], axis=1)
        gains[:, column] = 1 - (-np.partition(-merged, 3, axis=1)[:, :4]).mean(axis=1)
    return gains


# --- engines, each in its own process -------------------------------------------------------------

Measured = tuple[float, float, float, float, np.ndarray]
"""Pairs per second, pairs per CPU second, pairs put in place per second, seconds of the first
batch, gains (PROBE, 2)."""


def paper_engine(folder: Path, size: int, options: argparse.Namespace) -> Measured:
    """The paper's loop: one sample at a time, two hnswlib graphs."""
    import hnswlib

    dimension = options.dimension
    graphs = []
    begun = time.perf_counter()
    for space in ("image", "text"):
        graph = hnswlib.Index(space="cosine", dim=dimension)
        graph.init_index(size + options.rounds * PROBE, M=48, ef_construction=100)
        for start in range(0, size, PORTION):
            stop = min(size, start + PORTION)
            rows = read_features(folder, space, start, stop, dimension)
            graph.add_items(rows, np.arange(start, stop))
        graph.set_ef(32)
        graphs.append(graph)
    placed = size / (time.perf_counter() - begun)
    gains, seconds, work = [], [], []
    at = size
    for _ in range(options.rounds):
        images = read_features(folder, "image", at, at + PROBE, dimension)
        texts = read_features(folder, "text", at, at + PROBE, dimension)
        start_time, start_work = time.perf_counter(), time.process_time()
        for number, (image, text) in enumerate(zip(images, texts, strict=True)):
            if float(image @ text) < -1:
                continue
            gain = []
            for graph, vector in zip(graphs, (image, text), strict=True):
                gain.append(float(graph.knn_query(vector, k=4)[1].mean()))
                graph.add_items(vector, at + number)
            gains.append(gain)
        seconds.append(time.perf_counter() - start_time)
        work.append(time.process_time() - start_work)
        at += PROBE
    return PROBE / min(seconds), PROBE / min(work), placed, 0.0, np.array(gains[:PROBE])


def our_engine(index: str, folder: Path, size: int, options: argparse.Namespace) -> Measured:
    """`InfoGrowth`, restored at `size` kept pairs, fed with one batch per round."""
    from infogrowth import InfoGrowth

    logging.basicConfig(level=logging.INFO, format="    %(message)s")
    dimension = options.dimension
    growth = InfoGrowth(min_align=-1.0, index=index, device="cpu")
    settings = growth.settings
    ids = [f"{number:08d}" for number in range(size)]

    def portions(space: str) -> Iterator[np.ndarray]:
        for start in range(0, size, PORTION):
            yield read_features(folder, space, start, min(size, start + PORTION), dimension)

    begun = time.perf_counter()
    growth = InfoGrowth.restore(
        settings, ids, ids, np.ones((size, 2)), portions("image"), portions("text"), device="cpu"
    )
    placed = size / (time.perf_counter() - begun)
    gains, seconds, work = [], [], []
    at = size
    # The first batch also learns where rows lie.
    for batch in (PROBE, *[options.batch] * options.rounds):
        images = read_features(folder, "image", at, at + batch, dimension)
        texts = read_features(folder, "text", at, at + batch, dimension)
        names = [f"{number:08d}" for number in range(at, at + batch)]
        start_time, start_work = time.perf_counter(), time.process_time()
        gains.append(growth.process(names, names, images, texts).gains)
        seconds.append(time.perf_counter() - start_time)
        work.append(time.process_time() - start_work)
        at += batch
    first, *timed = seconds
    return batch / min(timed), batch / min(work[1:]), placed, first, gains[0]


def measure(engine: str, folder: Path, size: int, options: argparse.Namespace) -> None:
    """Run one engine in this process and print its row."""
    run: Callable[[], Measured] = {
        "paper": lambda: paper_engine(folder, size, options),
        "exact": lambda: our_engine("exact", folder, size, options),
        "approximate": lambda: our_engine("approximate", folder, size, options),
    }[engine]
    speed, work, placed, learning, gains = run()
    truth = np.load(folder / f"truth_{size}.npy")
    error = np.abs(gains - truth).ravel()
    row = {
        "size": size,
        "engine": engine,
        "pairs_per_s": round(speed, 1),
        "pairs_per_cpu_s": round(work, 1),
        "placed_per_s": round(placed),
        "first_batch_s": round(learning, 2),
        "gain_error_mean": float(error.mean()),
        "gain_error_p99": float(np.quantile(error, 0.99)),
        "gain_error_max": float(error.max()),
        "peak_rss_mb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024),
    }
    print("ROW " + json.dumps(row), flush=True)


def product_speed() -> str:
    """Products of float32 and of int8 matrices on all cores of this machine, now."""
    import torch

    left = torch.randn(2048, 2048)
    codes = (left * 30).to(torch.int8)
    best = {"float32": np.inf, "int8": np.inf}
    for _ in range(5):
        for name, product in (
            ("float32", lambda: left @ left),
            ("int8", lambda: torch._int_mm(codes, codes)),
        ):
            start = time.perf_counter()
            product()
            best[name] = min(best[name], time.perf_counter() - start)
    return ", ".join(f"{name} {2 * 2048**3 / s / 1e9:.0f} GOP/s" for name, s in best.items())


def compare(options: argparse.Namespace) -> list[dict[str, float | str]]:
    """All engines at all sizes, each in a process of its own."""
    rows: list[dict[str, float | str]] = []
    print(f"matrix products: {product_speed()}", flush=True)
    for size in options.sizes:
        with tempfile.TemporaryDirectory() as name:
            write_features(Path(name), size, options)
            truth = true_gains(Path(name), size, options.dimension)
            np.save(Path(name) / f"truth_{size}.npy", truth)
            for engine in options.engines:
                worker = [sys.executable, __file__, "--worker", engine, name]
                worker += ["--sizes", str(size), "--dimension", str(options.dimension)]
                worker += ["--batch", str(options.batch), "--rounds", str(options.rounds)]
                output = subprocess.run(worker, check=True, stdout=subprocess.PIPE, text=True)
                line = [x for x in output.stdout.splitlines() if x.startswith("ROW ")][-1]
                rows.append(json.loads(line[4:]))
                print(rows[-1], flush=True)
    return rows


# --- a GPU ----------------------------------------------------------------------------------------


def cuda(options: argparse.Namespace) -> None:
    """Grow CC3M's size from nothing on one GPU; the bound is the matrix products alone."""
    import torch

    from infogrowth import InfoGrowth

    if not torch.cuda.is_available():
        raise SystemExit("--cuda needs a GPU, and torch sees none")
    size, dimension = options.sizes[0] if options.sizes else CC3M, options.dimension
    portions = list(clustered(size, dimension))
    growth = InfoGrowth(min_align=-1.0, device="cuda")
    start, at = time.perf_counter(), 0
    for images, texts in portions:
        ids = [f"{number:08d}" for number in range(at, at + len(images))]
        growth.process(ids, ids, images, texts)
        at += len(images)
    torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    left = torch.randn(4096, dimension, device="cuda", dtype=torch.float16)
    right = torch.randn(32768, dimension, device="cuda", dtype=torch.float16)
    for repeat in range(110):
        if repeat == 10:
            torch.cuda.synchronize()
            start = time.perf_counter()
        left @ right.T
    torch.cuda.synchronize()
    per_product = (time.perf_counter() - start) / 100 / (len(left) * len(right))
    bound = per_product * size * size  # two spaces, half of all pairs each
    print(
        f"{torch.cuda.get_device_name()}: {size} pairs x 2 x {dimension} in {seconds:.1f} s "
        f"({size / seconds:.0f} pairs/s), matrix products alone {bound:.1f} s, "
        f"ratio {seconds / bound:.1f}; peak GPU memory "
        f"{torch.cuda.max_memory_allocated() / 2**30:.1f} GiB"
    )


# --- presentation ---------------------------------------------------------------------------------


def plot(rows: list[dict[str, float | str]], path: str) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 3, figsize=(12, 3.6))
    columns = ("pairs_per_s", "gain_error_mean", "peak_rss_mb")
    titles = ("pairs per second", "mean gain error", "peak memory (MB)")
    for axis, column, title in zip(axes, columns, titles, strict=True):
        for engine in ENGINES:
            points = [(row["size"], row[column]) for row in rows if row["engine"] == engine]
            if points:
                axis.plot(*zip(*sorted(points), strict=True), marker="o", label=engine)
        axis.set(xscale="log", xlabel="pairs kept", title=title)
        axis.set_yscale("log")
        axis.grid(alpha=0.3)
    axes[0].legend()
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def table(rows: list[dict[str, float | str]]) -> str:
    lines = [
        "| kept | engine | pairs/s | × paper | pairs per CPU second | × paper per core "
        "| put in place/s | first batch s | gain error mean | p99 | max | peak MB |",
        "| ---: | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for row in rows:
        base = [r for r in rows if r["size"] == row["size"] and r["engine"] == "paper"]
        ratio = f"{float(row['pairs_per_s']) / float(base[0]['pairs_per_s']):.1f}" if base else ""
        work = "pairs_per_cpu_s"
        per_core = f"{float(row[work]) / float(base[0][work]):.1f}" if base else ""
        lines.append(
            f"| {row['size']:,} | {row['engine']} | {row['pairs_per_s']:,.0f} | {ratio} | "
            f"{row['pairs_per_cpu_s']:,.0f} | {per_core} | {row['placed_per_s']:,} | "
            f"{row['first_batch_s']:.1f} | "
            f"{row['gain_error_mean']:.1e} | {row['gain_error_p99']:.1e} | "
            f"{row['gain_error_max']:.1e} | {row['peak_rss_mb']:,} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sizes", type=lambda text: [int(x) for x in text.split(",")])
    parser.add_argument("--dimension", type=int, default=256)
    parser.add_argument("--batch", type=int, default=16384, help="pairs given to ours at once")
    parser.add_argument("--rounds", type=int, default=3, help="of which the best counts")
    parser.add_argument("--engines", type=lambda text: text.split(","), default=list(ENGINES))
    parser.add_argument("--embeddings", help="real features instead: a .npy of (N, 2, D)")
    parser.add_argument("--large", action="store_true", help="a million kept")
    parser.add_argument("--cuda", action="store_true", help="CC3M's size on a GPU")
    parser.add_argument("--measured", nargs="+", help="rows of earlier runs instead of measuring")
    parser.add_argument("--json", help="write the rows to this file")
    parser.add_argument("--plot", help="draw the rows into this PNG")
    parser.add_argument("--worker", nargs=2, metavar=("ENGINE", "FOLDER"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.cuda:
        return cuda(options)
    if options.large:
        options.sizes = [MILLION]
    options.sizes = options.sizes or [20_000, 100_000]
    if options.embeddings:
        options.dimension = np.load(options.embeddings, mmap_mode="r").shape[-1]
    if options.worker:
        return measure(options.worker[0], Path(options.worker[1]), options.sizes[0], options)
    if options.measured:
        rows = [row for path in options.measured for row in json.loads(Path(path).read_text())]
    else:
        rows = compare(options)
    print(table(rows))
    if options.json:
        os.makedirs(os.path.dirname(options.json) or ".", exist_ok=True)
        Path(options.json).write_text(json.dumps(rows, indent=1) + "\n")
    if options.plot:
        plot(rows, options.plot)


if __name__ == "__main__":
    main()
