"""Floods of identical rows: answers as by brute force, at the cost of a few copies."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import assert_exact

from infogrowth.neighbors import scan
from infogrowth.neighbors.copies import Copies
from infogrowth.neighbors.index import NeighborIndex


def unit(rows):
    rows = np.asarray(rows, np.float32)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


@pytest.mark.parametrize("cells_from", [None, 1024])
def test_a_flood_of_copies_changes_no_answer_and_costs_little(monkeypatch, cells_from):
    rng = np.random.default_rng(0)
    rows = unit(rng.normal(size=(3000, 32)))
    rows[rng.random(3000) < 0.6] = rows[7]
    resolved = []
    fold_sum = scan.fold_sum
    monkeypatch.setattr(scan, "fold_sum", lambda x: resolved.append(len(x)) or fold_sum(x))
    index = NeighborIndex(32, 4, cells_from=cells_from)
    index.extend(rows)
    visible = np.arange(3000)
    found = index.search(rows, visible)
    copies = np.flatnonzero((rows == rows[7]).all(axis=1))
    later = copies[copies > copies[4]]
    assert (found.positions[later] == copies[:4]).all()
    if cells_from is None:
        assert_exact(found, rows, rows, visible, 4)
    assert sum(resolved) < 60 * 3000  # without the marks: some 1,800 copies for each of 1,800


@settings(max_examples=60, deadline=None)
@given(
    kinds=st.lists(st.integers(0, 5), max_size=40),
    cut=st.integers(0, 40),
    more=st.lists(st.integers(0, 5), max_size=20),
    k=st.integers(1, 4),
)
def test_marks_are_those_of_counting_from_the_start(kinds, cut, more, k):
    patterns = unit(np.random.default_rng(1).normal(size=(6, 5)))
    copies = Copies(k)
    copies.add(patterns[kinds])
    copies.truncate(cut)
    marked = copies.add(patterns[more])
    kept = kinds[:cut]
    expected = [(kept + more[:at]).count(kind) >= k for at, kind in enumerate(more)]
    assert marked.tolist() == expected
