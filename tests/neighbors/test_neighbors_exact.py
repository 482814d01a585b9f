"""Exact search must be exact: against brute force in float64, among near-copies, in any layout."""

import numpy as np
import pytest
import torch

from infogrowth.neighbors import exact
from infogrowth.neighbors.exact import ExactIndex
from infogrowth.neighbors.rows import unit_rows


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


def assert_exact(found, rows, queries, visible, k):
    positions, products = brute_force(rows, queries, visible, k)
    np.testing.assert_array_equal(found.positions, positions)
    present = positions >= 0
    np.testing.assert_allclose(found.products[present], products[present], atol=1e-12, rtol=0)
    assert np.isnan(found.distances[~present]).all()


@pytest.mark.parametrize("precision", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("k", [1, 4, 9])
def test_search_among_near_copies_equals_float64_brute_force(precision, k):
    rows = near_copies(1500, 33)
    index = ExactIndex(33, k, precision=precision)
    for start in range(0, 1500, 400):
        index.extend(rows[start : start + 400])
    queries = np.concatenate([rows[:300], near_copies(77, 33, seed=1)])
    visible = np.full(len(queries), 1500)
    assert_exact(index.search(queries, visible), rows, queries, visible, k)


@pytest.mark.parametrize("precision", ["float32", "bfloat16", "float16"])
def test_half_precision_is_really_used_and_mostly_suffices_on_ordinary_features(
    precision, monkeypatch
):
    random = np.random.default_rng(3)
    rows = unit_rows(random.normal(size=(3000, 64)))[0]
    queries = unit_rows(rows[:600] + 0.05 * random.normal(size=(600, 64)))[0]
    index = ExactIndex(64, 4, precision=precision)
    index.extend(rows)
    certain = {}
    original = ExactIndex._nominate

    def spy(self, queries_nd, visible, first_row, used):
        found = original(self, queries_nd, visible, first_row, used)
        certain[used] = float(found[2].float().mean())
        return found

    monkeypatch.setattr(ExactIndex, "_nominate", spy)
    visible = np.full(600, 3000)
    assert_exact(index.search(queries, visible), rows, queries, visible, 4)
    assert next(iter(certain)) == getattr(torch, precision)
    assert certain[getattr(torch, precision)] > 0.5


def test_the_error_bound_covers_every_rounding_of_half_precision():
    rows = near_copies(400, 48, seed=5)
    for precision in (torch.float32, torch.bfloat16, torch.float16):
        index = ExactIndex(48, 4, precision=str(precision).removeprefix("torch."))
        index.extend(rows)
        queries = torch.from_numpy(rows[:100])
        held = index._rows if index._halves is None else index._halves
        scores = (queries.to(precision) @ held.filled.T).float().double()
        true = queries.double() @ torch.from_numpy(rows).double().T
        bound = torch.stack(
            [index._error_bound(queries, scores[:, column], precision) for column in range(400)], 1
        )
        assert bool((true <= scores + bound).all())


def test_copies_are_found_in_order_of_insertion():
    rows = np.repeat(unit_rows(np.random.default_rng(0).normal(size=(3, 20)))[0], 700, axis=0)
    for precision in ("float32", "bfloat16"):
        index = ExactIndex(20, 4, precision=precision)
        index.extend(rows)
        found = index.search(rows[[0, 800, 1500]], np.full(3, len(rows)))
        assert found.positions.tolist() == [
            [0, 1, 2, 3], [700, 701, 702, 703], [1400, 1401, 1402, 1403],
        ]  # fmt: skip
        assert (found.distances < 1e-6).all()


@pytest.mark.parametrize("memory_mb", [0.01, 0.3, 256])
@pytest.mark.parametrize("query_rows", [5, 4096])
def test_no_layout_of_blocks_changes_a_bit(memory_mb, query_rows, monkeypatch):
    monkeypatch.setattr(exact, "QUERY_ROWS", query_rows)
    monkeypatch.setattr(exact, "TAIL_ROWS", 64)
    rows = near_copies(700, 24, seed=2)
    index = ExactIndex(24, 4, memory_mb=memory_mb, precision="float32")
    index.extend(rows)
    visible = np.arange(700)
    found = index.search(rows, visible)
    assert_exact(found, rows, rows, visible, 4)
    monkeypatch.undo()
    plain = ExactIndex(24, 4)
    plain.extend(rows)
    np.testing.assert_array_equal(plain.search(rows, visible).products, found.products)


def test_scratch_memory_stays_within_its_bound(monkeypatch):
    asked = []
    original = torch.empty

    def spy(*size, **options):
        made = original(*size, **options)
        asked.append(made.numel() * made.element_size())
        return made

    index = ExactIndex(8, 4, memory_mb=2, precision="float32")
    index.extend(near_copies(5000, 8))
    monkeypatch.setattr(torch, "empty", spy)
    index.search(near_copies(512, 8), np.full(512, 5000))
    assert asked and max(asked) <= 2 * 2**20


def test_rows_before_the_first_are_left_out():
    rows = near_copies(600, 16)
    index = ExactIndex(16, 4)
    index.extend(rows)
    visible = np.sort(np.random.default_rng(0).integers(256, 601, size=90))
    found = index.search(rows[:90], visible, first_row=256)
    positions, _ = brute_force(rows[256:], rows[:90], visible - 256, 4)
    np.testing.assert_array_equal(found.positions, np.where(positions >= 0, positions + 256, -1))


def test_truncated_rows_are_forgotten_and_replaced():
    rows = near_copies(900, 12)
    index = ExactIndex(12, 4, precision="bfloat16")
    index.extend(rows)
    index.truncate(300)
    index.extend(rows[600:])
    held = np.concatenate([rows[:300], rows[600:]])
    np.testing.assert_array_equal(index.rows(0, 600), held)
    assert_exact(index.search(rows, np.full(900, 600)), held, rows, np.full(900, 600), 4)


def test_an_empty_index_and_no_queries_find_nothing():
    index = ExactIndex(5, 4)
    rows = near_copies(3, 5)
    assert (index.search(rows, np.zeros(3, np.int64)).positions == -1).all()
    index.extend(rows)
    assert index.search(rows[:0], np.zeros(0, np.int64)).positions.shape == (0, 4)
    assert (index.search(rows, np.zeros(3, np.int64)).positions == -1).all()


def test_reduced_precision_allowed_for_training_does_not_reach_the_search():
    rows = near_copies(1200, 64)
    index = ExactIndex(64, 4, precision="float32")
    index.extend(rows)
    torch.set_float32_matmul_precision("medium")
    try:
        found = index.search(rows, np.full(1200, 1200))
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision("highest")
    assert_exact(found, rows, rows, np.full(1200, 1200), 4)
