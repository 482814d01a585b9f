"""What the tests of the search share: the slow truth, rows that are hard, ranks in one process."""

import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from infogrowth.neighbors.base import Shard
from infogrowth.neighbors.index import NeighborIndex
from infogrowth.rows import unit_rows


def brute_force(rows, queries, visible, k):
    """Positions and cosines of the k nearest, ties by position, all products in float64.

    Rounded to 1e-13, so that copies tie whatever the order of summation."""
    products = np.round(queries.astype(np.float64) @ rows.astype(np.float64).T, 13)
    products[np.arange(len(rows)) >= np.asarray(visible)[:, None]] = -np.inf
    order = np.argsort(-products, axis=1, kind="stable")[:, :k]
    best = np.take_along_axis(products, order, axis=1)
    return np.where(best > -np.inf, order, -1), best


def near_copies(count, dimension, seed=0, clusters=6):
    """Dense clusters: exact copies, and copies that differ by less than any rounding to half."""
    random = np.random.default_rng(seed)
    centers = random.normal(size=(clusters, dimension))
    scale = random.choice([0, 1e-7, 1e-5, 1e-3, 0.1], size=(count, 1))
    rows = centers[random.integers(clusters, size=count)]
    return unit_rows(rows + scale * random.normal(size=rows.shape))[0]


def clustered(count, dimension, seed=0, clusters=300):
    random = np.random.default_rng(seed)
    centers = random.normal(size=(clusters, dimension))
    noise = 0.4 * random.normal(size=(count, dimension))
    return unit_rows(centers[random.integers(clusters, size=count)] + noise)[0]


def assert_exact(found, rows, queries, visible, k):
    positions, products = brute_force(rows, queries, visible, k)
    if (found.positions != positions).any():  # what ties to the last bit may differ
        at = np.clip(found.positions, 0, None)
        again = (rows[at].astype(np.float64) * queries[:, None]).sum(2)
        np.testing.assert_allclose(
            np.where(positions >= 0, again, 0), np.where(positions >= 0, products, 0), atol=2e-13
        )
    present = positions >= 0
    np.testing.assert_array_equal(found.positions >= 0, present)
    np.testing.assert_allclose(found.products[present], products[present], atol=1e-12, rtol=0)
    assert np.isnan(found.distances[~present]).all()


def in_batches(index, rows, batch_size):
    """Positions and products of rows that are added and looked up batch by batch."""
    found = []
    for start in range(0, len(rows), batch_size):
        part = rows[start : start + batch_size]
        found.append(index.search_and_extend(part, np.ones(len(part), bool)))
    return merged(found)


def merged(found):
    """Positions and products of several answers, one below the other."""
    return (
        np.concatenate([part.positions for part in found]),
        np.concatenate([part.products for part in found]),
    )


def on_ranks(world_size, work, *arguments, **options):
    """What `work(index)` returns on each of `world_size` ranks, simulated by threads."""
    arrays, barrier = [None] * world_size, threading.Barrier(world_size, timeout=60)

    def one(rank):
        def gather(array):
            arrays[rank] = array
            barrier.wait()
            every = list(arrays)
            barrier.wait()
            return every

        return work(NeighborIndex(*arguments, shard=Shard(rank, world_size, gather), **options))

    with ThreadPoolExecutor(world_size) as pool:
        return list(pool.map(one, range(world_size)))
