"""Which library should the approximate engine use? faiss and usearch at equal gain error.

    python benchmarks/approximate_libraries.py [--size 200000] [--dimension 256]

Clustered features; every library is filled with the same rows, then asked with the same queries;
printed are rows added per second, lookups per second and the gain error against exact search.
"""

import argparse
import time

import faiss
import numpy as np
from usearch.index import Index

from infogrowth.neighbors.exact import ExactIndex

QUERIES = 8192


def clustered(size: int, dimension: int) -> np.ndarray:
    """Unit rows (size, dimension) float32 in clusters of about twenty within broader topics."""
    random = np.random.default_rng(0)
    topics = random.normal(size=(max(1, size // 2000), dimension))
    centers = topics[random.integers(len(topics), size=max(1, size // 20))]
    centers = centers + 0.7 * random.normal(size=centers.shape)
    rows = centers[random.integers(len(centers), size=size)].astype(np.float32)
    rows += 0.5 * random.standard_normal(rows.shape, dtype=np.float32)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def report(name: str, added: float, asked: float, size: int, error: np.ndarray) -> None:
    print(
        f"{name:32s} add {size / added:9.0f}/s  ask {QUERIES / asked:9.0f}/s  "
        f"gain error mean {error.mean():.5f}  p99 {np.quantile(error, 0.99):.5f}",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", type=int, default=200_000)
    parser.add_argument("--dimension", type=int, default=256)
    options = parser.parse_args()
    everything = clustered(options.size + QUERIES, options.dimension)
    rows, queries = everything[: options.size], everything[options.size :]

    exact = ExactIndex(options.dimension, 4)
    exact.extend(rows)
    start = time.perf_counter()
    found = exact.search(queries, np.full(QUERIES, len(rows)))
    truth = found.distances.mean(axis=1)
    elapsed = time.perf_counter() - start
    report("ours, exact", 1e-9, elapsed, len(rows), np.zeros(1))

    lists = int(4 * np.sqrt(len(rows)))
    start = time.perf_counter()
    quantizer = faiss.IndexFlatIP(options.dimension)
    inverted = faiss.IndexIVFFlat(quantizer, options.dimension, lists, faiss.METRIC_INNER_PRODUCT)
    inverted.cp.niter = 10
    inverted.train(rows[:: max(1, len(rows) // (lists * 40))])
    trained = time.perf_counter() - start
    inverted.add(rows)
    added = time.perf_counter() - start
    print(f"faiss IVF trained in {trained:.1f} s")
    for probes in (4, 8, 16, 32, 64):
        inverted.nprobe = probes
        start = time.perf_counter()
        products, _ = inverted.search(queries, 4)
        elapsed = time.perf_counter() - start
        error = (1 - products).mean(axis=1) - truth
        report(f"faiss IVF{lists} nprobe {probes}", added, elapsed, len(rows), error)

    graph = faiss.IndexHNSWFlat(options.dimension, 32, faiss.METRIC_INNER_PRODUCT)
    graph.hnsw.efConstruction = 100
    start = time.perf_counter()
    graph.add(rows)
    added = time.perf_counter() - start
    for breadth in (32, 128):
        graph.hnsw.efSearch = breadth
        start = time.perf_counter()
        products, _ = graph.search(queries, 4)
        elapsed = time.perf_counter() - start
        error = (1 - products).mean(axis=1) - truth
        report(f"faiss HNSW32 ef {breadth}", added, elapsed, len(rows), error)

    usearch = Index(
        ndim=options.dimension, metric="cos", connectivity=32, expansion_add=100, dtype="f32"
    )
    start = time.perf_counter()
    usearch.add(np.arange(len(rows)), rows)
    added = time.perf_counter() - start
    for breadth in (32, 128):
        usearch.expansion_search = breadth
        start = time.perf_counter()
        matches = usearch.search(queries, 4)
        elapsed = time.perf_counter() - start
        error = matches.distances.mean(axis=1) - truth
        report(f"usearch M32 ef {breadth}", added, elapsed, len(rows), error)


if __name__ == "__main__":
    main()
