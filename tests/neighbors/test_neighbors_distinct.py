"""Copies beyond the k-th are not held, and no answer tells the difference."""

import numpy as np
import pytest

from infogrowth.neighbors.distinct import DistinctIndex
from infogrowth.neighbors.exact import ExactIndex
from infogrowth.neighbors.rows import unit_rows
from infogrowth.neighbors.sharded import ShardedIndex


def pile(count, distinct, seed=0):
    """Rows of which few are different, in random order: some once, some hundreds of times."""
    random = np.random.default_rng(seed)
    different = unit_rows(random.normal(size=(distinct, 12)))[0]
    weight = random.random(distinct) ** 4
    return different[random.choice(distinct, count, p=weight / weight.sum())]


@pytest.mark.parametrize("k", [1, 4])
@pytest.mark.parametrize("batch_size", [1, 37, 900])
def test_the_answers_are_those_of_an_index_that_holds_every_copy(k, batch_size):
    rows = pile(900, 60)
    every, spared, held = ExactIndex(12, k), ExactIndex(12, k), []
    distinct = DistinctIndex(spared)
    for start in range(0, 900, batch_size):
        part = rows[start : start + batch_size]
        visible = start + np.arange(len(part))
        every.extend(part)
        distinct.extend(part)
        held.append(spared.count)
        expected, found = every.search(part, visible), distinct.search(part, visible)
        np.testing.assert_array_equal(found.positions, expected.positions)
        np.testing.assert_array_equal(found.products, expected.products)
    assert distinct.count == 900 and spared.count <= 60 * k
    np.testing.assert_array_equal(distinct.rows(13, 871), rows[13:871])


def test_a_truncated_index_counts_its_copies_anew():
    rows = pile(600, 20)
    spared = ExactIndex(12, 4)
    distinct = DistinctIndex(spared)
    distinct.extend(rows)
    distinct.truncate(90)
    distinct.extend(rows[300:])
    left = np.concatenate([rows[:90], rows[300:]])
    every = ExactIndex(12, 4)
    every.extend(left)
    visible = np.arange(len(left))
    np.testing.assert_array_equal(
        distinct.search(left, visible).positions, every.search(left, visible).positions
    )
    np.testing.assert_array_equal(distinct.rows(0, len(left)), left)
    assert spared.count <= 80


@pytest.mark.parametrize("k", [1, 4])
def test_rows_that_could_not_be_added_leave_no_trace(k, monkeypatch):
    rows = pile(300, 40)
    spared = ExactIndex(12, k)
    distinct = DistinctIndex(spared)
    distinct.extend(rows[:100])
    original = ExactIndex.extend

    def out_of_memory(self, added):
        original(self, added[: len(added) // 2])
        raise MemoryError

    monkeypatch.setattr(ExactIndex, "extend", out_of_memory)
    with pytest.raises(MemoryError):
        distinct.extend(rows[100:])
    monkeypatch.undo()
    distinct.truncate(100)  # as the engine does when anything goes wrong
    distinct.extend(rows[100:])
    every = ExactIndex(12, k)
    every.extend(rows)
    expected, found = (index.search(rows, np.arange(300)) for index in (every, distinct))
    np.testing.assert_array_equal(found.positions, expected.positions)
    np.testing.assert_array_equal(distinct.rows(0, 300), rows)


def test_each_rank_spares_its_own_copies():
    rows = pile(700, 15)
    every = ExactIndex(12, 4)
    every.extend(rows)
    visible = np.arange(700)
    expected = every.search(rows, visible)
    ranks = []
    for rank in range(3):
        local = ExactIndex(12, 4)
        index = ShardedIndex(DistinctIndex(local), rank, 3, lambda array: [array])
        index.extend(rows)
        assert local.count <= 60
        ranks.append(index.local_search(rows, visible))
    merged = np.sort(np.concatenate([part.products for part in ranks], axis=1), axis=1)[:, ::-1]
    np.testing.assert_array_equal(merged[:, :4], expected.products)


def test_an_empty_index_has_no_rows():
    distinct = DistinctIndex(ExactIndex(12, 4))
    assert distinct.rows(0, 0).shape == (0, 12)
    assert (distinct.search(pile(3, 3), np.zeros(3, np.int64)).positions == -1).all()
