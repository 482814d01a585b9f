"""Exact search must be exact: against brute force in float64, among near-copies, in any layout."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import assert_exact, brute_force, clustered, in_batches, near_copies

from infogrowth.errors import UserError
from infogrowth.neighbors import codes as codes_module
from infogrowth.neighbors import index as index_module
from infogrowth.neighbors import scan
from infogrowth.neighbors.codes import Coder, multiply
from infogrowth.neighbors.index import NeighborIndex
from infogrowth.neighbors.store import RowStore
from infogrowth.rows import unit_rows


@pytest.fixture(params=["int8", "float32", "float64"])
def form(request, monkeypatch, small_steps):
    """How queries are multiplied: codes as this device does it or where it has no integers, or
    everything in float64, as where rows are a crowd."""
    if request.param == "float32":
        monkeypatch.setattr(codes_module, "has_integers", lambda device: False)
    if request.param == "float64":
        monkeypatch.setattr(scan, "CROWD", -1000)
    return request.param


@pytest.mark.parametrize("k", [1, 4, 9])
def test_search_among_near_copies_equals_float64_brute_force(form, k):
    rows = near_copies(1500, 33)
    index = NeighborIndex(33, k)
    for start in range(0, 1500, 400):
        index.extend(rows[start : start + 400])
    queries = np.concatenate([rows[:300], near_copies(77, 33, seed=1)])
    visible = np.full(len(queries), 1500)
    assert_exact(index.search(queries, visible), rows, queries, visible, k)


def test_codes_leave_few_rows_in_question(form, monkeypatch):
    random = np.random.default_rng(3)
    spectrum = 1 / (1 + np.arange(64.0)) ** 0.8
    rows = unit_rows(random.normal(size=(3000, 64)) * spectrum)[0]
    queries = unit_rows(rows[:600] + 0.02 * random.normal(size=(600, 64)))[0]
    index = NeighborIndex(64, 4)
    index.extend(rows)
    resolved = []
    fold_sum = scan.fold_sum
    monkeypatch.setattr(scan, "fold_sum", lambda x: resolved.append(len(x)) or fold_sum(x))
    visible = np.full(600, 3000)
    assert_exact(index.search(queries, visible), rows, queries, visible, 4)
    assert 4 * 600 <= sum(resolved) < 600 * 40  # of 3,000 rows


@pytest.mark.parametrize("dimension", [1, 2, 48, 64, 384])
def test_no_cosine_is_further_from_the_product_of_codes_than_the_error(dimension):
    random = np.random.default_rng(0)
    sparse = np.where(random.random((300, dimension)) < 3 / dimension, 1.0, 0) + 1e-9
    rows = np.concatenate([near_copies(300, dimension, seed=5), unit_rows(sparse)[0]])
    coder = Coder(dimension, torch.device("cpu"))
    codes, error = coder.encode(torch.from_numpy(rows))
    scores = multiply(codes, codes).double() / coder.unit
    bound = error[:, None].double() + error.double() * (1 + error[:, None].double())
    true = rows.astype(np.float64) @ rows.astype(np.float64).T
    assert bool((np.abs(true - scores.numpy()) <= bound.numpy() + 1e-12).all())
    assert float(error.max()) < 0.03


def test_products_of_codes_have_the_same_bits_in_integers_and_in_float32(monkeypatch):
    codes = Coder(100, torch.device("cpu")).encode(torch.from_numpy(near_copies(200, 100)))[0]
    integers = multiply(codes[:30], codes)
    monkeypatch.setattr(codes_module, "has_integers", lambda device: False)
    assert torch.equal(integers, multiply(codes[:30], codes))
    expected = codes[:30].numpy().astype(np.int64) @ codes.numpy().astype(np.int64).T
    np.testing.assert_array_equal(integers.numpy(), expected)


def test_copies_are_found_in_order_of_insertion(form):
    rows = np.repeat(unit_rows(np.random.default_rng(0).normal(size=(3, 20)))[0], 700, axis=0)
    index = NeighborIndex(20, 4)
    index.extend(rows)
    found = index.search(rows[[0, 800, 1500]], np.full(3, len(rows)))
    assert found.positions.tolist() == [
        [0, 1, 2, 3], [700, 701, 702, 703], [1400, 1401, 1402, 1403],
    ]  # fmt: skip
    assert (found.distances < 1e-6).all()


@pytest.mark.parametrize("memory_mb", [0.01, 0.3, 256])
@pytest.mark.parametrize("queries_at_once", [5, 4096])
def test_no_layout_of_blocks_changes_a_bit(form, memory_mb, queries_at_once, monkeypatch):
    rows = near_copies(700, 24, seed=2)
    visible = np.arange(700)
    plain = NeighborIndex(24, 4)
    plain.extend(rows)
    expected = plain.search(rows, visible)
    assert_exact(expected, rows, rows, visible, 4)
    monkeypatch.setitem(index_module.AT_ONCE, "cpu", (queries_at_once, queries_at_once))
    index = NeighborIndex(24, 4, memory_mb=memory_mb)
    index.extend(rows)
    found = index.search(rows, visible)
    np.testing.assert_array_equal(found.products, expected.products)
    np.testing.assert_array_equal(found.positions, expected.positions)


@pytest.mark.parametrize("cells_from", [None, 16])
@settings(max_examples=30, deadline=None)
@given(
    count=st.integers(1, 150), dimension=st.sampled_from([1, 2, 3, 8, 33]), k=st.integers(1, 6),
    kind=st.sampled_from(["any", "copies", "collinear", "constant", "opposite", "nearly constant"]),
    batch=st.integers(1, 160), seed=st.integers(0, 99),
)  # fmt: skip
def test_any_data_in_any_batches(cells_from, count, dimension, k, kind, batch, seed):
    """Exact search is exact; in cells every cosine is that of the row, none is nearer than the
    truth, and neither depends on batches."""
    k = min(k, count)
    random = np.random.default_rng(seed)
    rows = random.normal(size=(count, dimension))
    if kind == "copies":
        rows = rows[random.integers(min(count, 3), size=count)]
    elif kind == "collinear":
        rows = rows[:1] * random.choice([-2.0, 1.0, 3.0], size=(count, 1))
    elif kind == "constant":
        rows[:] = 1.0
    elif kind == "opposite":
        rows[1::2] = -rows[: len(rows[1::2])]
    elif kind == "nearly constant":
        rows = 1 + 1e-7 * rows
    rows = unit_rows(rows)[0]
    visible = np.arange(count)
    positions, products = in_batches(
        NeighborIndex(dimension, k, cells_from=cells_from), rows, batch
    )
    again = in_batches(NeighborIndex(dimension, k, cells_from=cells_from), rows, 37)
    np.testing.assert_array_equal(positions, again[0])
    np.testing.assert_array_equal(products, again[1])
    truth = brute_force(rows, rows, visible, k)
    there = positions >= 0
    true_products = (rows[np.clip(positions, 0, None)].astype(np.float64) * rows[:, None]).sum(2)
    np.testing.assert_allclose(products[there], true_products[there], atol=1e-12)
    assert (positions < np.maximum(visible, 1)[:, None]).all()
    assert (products[:, 1:] <= products[:, :-1]).all()
    if cells_from is None:
        np.testing.assert_array_equal(there, truth[0] >= 0)
        np.testing.assert_allclose(products[there], truth[1][there], atol=1e-12)
    else:
        best = truth[1][:, :1]
        assert (products[:, :1][best > -np.inf] <= best[best > -np.inf] + 1e-12).all()


def test_truncated_rows_are_forgotten_and_replaced(form):
    rows = clustered(900, 12)
    index = NeighborIndex(12, 4)
    index.extend(rows)
    index.search(rows, np.full(900, 900))
    index.truncate(300)
    index.extend(rows[600:])
    held = np.concatenate([rows[:300], rows[600:]])
    np.testing.assert_array_equal(index.rows(0, 600), held)
    assert_exact(index.search(rows, np.full(900, 600)), held, rows, np.full(900, 600), 4)


def test_an_empty_index_and_no_queries_find_nothing():
    index = NeighborIndex(5, 4)
    rows = near_copies(3, 5)
    assert (index.search(rows, np.zeros(3, np.int64)).positions == -1).all()
    index.extend(rows)
    assert index.search(rows[:0], np.zeros(0, np.int64)).positions.shape == (0, 4)
    assert (index.search(rows, np.zeros(3, np.int64)).positions == -1).all()


def allow_legacy():
    torch.set_float32_matmul_precision("medium")


def allow_by_the_new_switch():
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    torch.backends.mkldnn.matmul.fp32_precision = "bf16"


@pytest.mark.parametrize("allow", [allow_legacy, allow_by_the_new_switch])
def test_reduced_precision_allowed_for_training_does_not_reach_the_search(allow, small_steps):
    rows = near_copies(1200, 64)
    index = NeighborIndex(64, 4)
    index.extend(rows)

    def state():
        return (
            torch.backends.cuda.matmul.fp32_precision,
            torch.backends.mkldnn.matmul.fp32_precision,
        )

    before = state()
    allow()
    allowed = state()
    try:
        found = index.search(rows, np.full(1200, 1200))
        assert state() == allowed != before
    finally:
        cuda, cpu = torch.backends.cuda.matmul, torch.backends.mkldnn.matmul
        cuda.fp32_precision, cpu.fp32_precision = before
        if allow is allow_legacy:
            torch.set_float32_matmul_precision("highest")
    assert_exact(found, rows, rows, np.full(1200, 1200), 4)


def test_an_index_made_in_inference_mode_serves_afterwards():
    rows = near_copies(600, 16)
    with torch.inference_mode():
        index = NeighborIndex(16, 4, cells_from=128)
        index.extend(rows[:300])
        index.search(rows[:300], np.arange(300))
    index.extend(rows[300:])
    assert (index.search(rows, np.arange(600)).positions[1:, 0] >= 0).all()


def test_threads_that_share_the_work_find_the_same(small_steps, monkeypatch):
    monkeypatch.setattr(index_module, "FEW_PAIRS", 0)
    rows = clustered(2000, 24)
    found = []
    for threads in (1, 3):
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            found.append(in_batches(NeighborIndex(24, 4, cells_from=1024), rows, 700))
            assert torch.get_num_threads() == threads
        finally:
            torch.set_num_threads(before)
    np.testing.assert_array_equal(found[0][0], found[1][0])
    np.testing.assert_array_equal(found[0][1], found[1][1])


def test_more_neighbors_than_groups_of_rows(small_steps):
    rows = clustered(900, 16)
    index = NeighborIndex(16, 150)
    index.extend(rows)
    visible = np.full(40, 900)
    assert_exact(index.search(rows[:40], visible), rows, rows[:40], visible, 150)


def test_a_card_that_cannot_hold_old_and_new_rows_moves_them_by_way_of_the_host(monkeypatch):
    store = RowStore(3, torch.float32, torch.device("cpu"))
    rows = torch.arange(9000, dtype=torch.float32).view(-1, 3)
    room, empty = 3000, store._empty

    def on_a_card(count):
        if count + len(getattr(store, "_buffer", ())) > room:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return empty(count)

    store._empty = on_a_card
    for start in range(0, 3000, 250):
        store.extend(rows[start : start + 250])
    torch.testing.assert_close(store.rows, rows)
    with pytest.raises(torch.OutOfMemoryError):
        store.extend(rows[:1])
    torch.testing.assert_close(store.rows, rows)  # as it was
    at = torch.tensor([[2999, 0], [1500, 2321]])
    torch.testing.assert_close(store.take(at), rows[at])


def test_running_out_of_memory_is_one_sentence(monkeypatch):
    index = NeighborIndex(256, 4)

    def full(self, rows):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")

    monkeypatch.setattr(RowStore, "_empty", full)
    with pytest.raises(UserError, match="bytes a row"):
        index.extend(near_copies(10, 256))
    assert index.count == 0
