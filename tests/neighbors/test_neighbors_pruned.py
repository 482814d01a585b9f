"""Search that skips rows must give the very answer of searching them all, whatever the rows."""

import logging

import numpy as np
import pytest
import torch

from infogrowth.neighbors import cells as cells_module
from infogrowth.neighbors import create_index, pruned
from infogrowth.neighbors.cells import CACHED_PRODUCTS, Cells
from infogrowth.neighbors.exact import ExactIndex
from infogrowth.neighbors.pruned import PrunedIndex
from infogrowth.neighbors.rows import unit_rows


@pytest.fixture(autouse=True)
def skipping_pays_early(monkeypatch):
    """So that a few thousand rows are many, in many cells and blocks."""
    monkeypatch.setattr(pruned, "FIRST_ROWS", 300)
    monkeypatch.setattr(pruned, "FEWEST_QUERIES", 1)
    monkeypatch.setattr(cells_module, "ROWS_PER_CELL", 40)
    monkeypatch.setattr(cells_module, "BLOCK_ROWS", 64)


def clustered(count, dimension, spread, seed=0):
    """Clusters within broader topics, as captions have them; some rows are exact copies."""
    random = np.random.default_rng(seed)
    topics = random.normal(size=(9, dimension))
    centers = topics[random.integers(9, size=count // 20)]
    centers = centers + 0.7 * random.normal(size=centers.shape)
    rows = centers[random.integers(len(centers), size=count)]
    scale = random.choice([0, 1e-7, spread], size=(count, 1), p=[0.05, 0.05, 0.9])
    return unit_rows(rows + scale * random.normal(size=rows.shape))[0]


def placeholders(count, dimension):
    """Ordinary rows, and one picture that came for every third address."""
    rows = clustered(count, dimension, 0.5)
    rows[::3] = rows[0]
    return rows


def isotropic(count, dimension):
    return unit_rows(np.random.default_rng(1).normal(size=(count, dimension)))[0]


PILES = {
    "clusters": lambda: clustered(3000, 64, 0.5),
    "near-copies": lambda: clustered(3000, 64, 1e-5),
    "placeholders": lambda: placeholders(3000, 64),
    "no structure": lambda: isotropic(3000, 64),
    "few columns": lambda: clustered(3000, 5, 0.3),
    "two bounds of the same columns": lambda: clustered(3000, 9, 0.3),
    "one direction": lambda: unit_rows(np.ones((900, 16)) * np.linspace(1, 2, 900)[:, None])[0],
}


def searched_all(rows, visible, k):
    index = ExactIndex(rows.shape[1], k, precision="float32")
    index.extend(rows)
    return index.search(rows, visible)


def assert_same(found, truth):
    np.testing.assert_array_equal(found.positions, truth.positions)
    np.testing.assert_array_equal(found.products, truth.products)


@pytest.mark.parametrize("k", [1, 4])
@pytest.mark.parametrize("pile", PILES)
def test_every_bit_is_that_of_searching_all_rows(pile, k):
    rows = PILES[pile]()
    visible = np.arange(len(rows))
    index = PrunedIndex(rows.shape[1], k)
    index.extend(rows)
    assert_same(index.search(rows, visible), searched_all(rows, visible, k))


@pytest.mark.parametrize("threads", [1, 3])
def test_growing_in_batches_gives_the_same_on_any_number_of_threads(threads):
    rows = clustered(4000, 48, 0.5)
    truth = searched_all(rows, np.arange(4000), 4)
    index, at, before = PrunedIndex(48, 4), 0, torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for size in (100, 1, 700, 13, 2500, 686):  # the cells are learned anew on the way
            index.extend(rows[at : at + size])
            found = index.search(rows[at : at + size], np.arange(at, at + size))
            assert_same(found, truth.part(slice(at, at + size)))
            at += size
        assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)


def test_truncated_rows_are_forgotten_and_replaced():
    rows = clustered(2400, 32, 0.5)
    index = PrunedIndex(32, 4)
    index.extend(rows[:1600])
    index.search(rows[:50], np.full(50, 1600))  # learns the cells
    index.truncate(900)
    index.extend(rows[1600:])
    held = np.concatenate([rows[:900], rows[1600:]])
    np.testing.assert_array_equal(index.rows(0, 1700), held)
    assert_same(index.search(held, np.arange(1700)), searched_all(held, np.arange(1700), 4))


def test_little_memory_changes_nothing():
    rows = clustered(2000, 32, 0.5)
    index = PrunedIndex(32, 4, memory_mb=0.1)
    index.extend(rows)
    assert_same(index.search(rows, np.arange(2000)), searched_all(rows, np.arange(2000), 4))


def test_many_copies_do_not_pile_up(monkeypatch):
    """Hits are thinned out on the way: copies of one picture reach every one of its queries."""
    monkeypatch.setattr(pruned, "MOST_HITS", 2000)
    rows = placeholders(2000, 32)
    most = []
    original = pruned.PrunedIndex._nearest

    def spy(self, asked, hits):
        most.append(len(hits))
        return original(self, asked, hits)

    monkeypatch.setattr(pruned.PrunedIndex, "_nearest", spy)
    index = PrunedIndex(32, 4)
    index.extend(rows)
    assert_same(index.search(rows, np.arange(2000)), searched_all(rows, np.arange(2000), 4))
    assert len(most) > 10 and max(most) < 667 * 667 / 4


def test_no_bound_lies_under_a_true_cosine():
    """Every row that reaches a threshold is in a block that the bounds let through."""
    rows = clustered(1700, 40, 0.4)
    held = torch.from_numpy(rows[:1500])
    cells = Cells(held)
    queries = torch.from_numpy(rows[1500:])
    truth = queries.double() @ held.double().T
    center_products, split = cells.centers_JD @ queries.T, cells.split(queries)
    blocks, scratch = cells.blocks(), torch.empty(CACHED_PRODUCTS)
    nearest = truth.max(1).values.float()
    passed = 0
    for block in range(len(blocks)):
        best = truth[:, blocks.padded(block)].max(1).values.float()
        asked = block, split, center_products
        assert len(cells.within_reach(*asked, best, scratch)) == 200
        alive = set(cells.within_reach(*asked, nearest, scratch).tolist())
        assert alive.issuperset((best >= nearest).nonzero()[:, 0].tolist())
        passed += len(alive)
    assert passed < 0.7 * 200 * len(blocks)  # and yet many are ruled out


def test_blocks_hold_every_row_once():
    cells = Cells(torch.from_numpy(placeholders(1000, 24)))
    blocks = cells.blocks()
    rows = [blocks.padded(b)[: blocks.size(b)] for b in range(len(blocks))]
    assert sorted(torch.cat(rows).tolist()) == list(range(1000))
    assert max(map(len, rows)) == 64  # the copies fill several blocks
    assert all(len(blocks.padded(b)) % cells_module.LANES == 0 for b in range(len(blocks)))


def test_most_rows_are_never_looked_at(monkeypatch):
    rows = clustered(4000, 64, 0.5)
    full = []
    original = pruned.PrunedIndex._hits

    def spy(self, blocks, block, asked, alive, *rest):
        full.append(len(alive) * blocks.size(block))
        return original(self, blocks, block, asked, alive, *rest)

    monkeypatch.setattr(pruned.PrunedIndex, "_hits", spy)
    index = PrunedIndex(64, 4)
    index.extend(rows)
    index.search(rows, np.full(4000, 4000))
    assert sum(full) < 0.25 * 4000 * 4000


def test_rows_without_structure_are_told_and_searched_whole(caplog):
    caplog.set_level(logging.INFO, "infogrowth")
    rows = isotropic(1200, 64)
    index = PrunedIndex(64, 4)
    index.extend(rows)
    for _ in range(2):
        index.search(rows, np.full(1200, 1200))
    assert sum("too little structure" in record.message for record in caplog.records) == 1


def test_a_search_that_does_not_pay_is_given_up_on_the_way(monkeypatch, caplog):
    caplog.set_level(logging.INFO, "infogrowth")
    monkeypatch.setattr(pruned, "QUERY_ROWS", 100)
    rows, visible = isotropic(1200, 64), np.arange(1200)
    index = PrunedIndex(64, 4)
    index.extend(rows)
    assert_same(index.search(rows, visible), searched_all(rows, visible, 4))
    assert sum("too little structure" in record.message for record in caplog.records) == 1


def test_more_neighbors_than_nearby_blocks_hold_are_found_all_the_same(caplog):
    caplog.set_level(logging.INFO, "infogrowth")
    rows, visible = clustered(1200, 32, 0.5), np.arange(1200)
    index = PrunedIndex(32, 300)
    index.extend(rows)
    assert_same(index.search(rows, visible), searched_all(rows, visible, 300))
    assert "too little structure" in caplog.text  # they were all searched whole


def test_what_training_set_for_its_own_products_does_not_reach_the_search():
    rows, visible = clustered(1500, 32, 0.5), np.arange(1500)
    truth = searched_all(rows, visible, 4)
    torch.set_default_dtype(torch.float64)
    try:
        with torch.autocast("cpu", torch.bfloat16):
            index = PrunedIndex(32, 4)
            index.extend(rows)
            assert_same(index.search(rows, visible), truth)
    finally:
        torch.set_default_dtype(torch.float32)


def test_exact_on_a_cpu_means_this_index():
    index = create_index("exact", 8, 4, "cpu", 64, sharded=False)
    assert index.describe() == PrunedIndex(8, 4, 64).describe()
