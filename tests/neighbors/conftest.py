"""Small steps, so that few rows take every path of the search."""

import pytest

from infogrowth.neighbors import index, scan


@pytest.fixture
def small_steps(monkeypatch):
    """Everything that waits for many rows or queries happens early."""
    monkeypatch.setitem(index.RUN, "cpu", 64)
    monkeypatch.setitem(index.AT_ONCE, "cpu", (300, 500))
    monkeypatch.setattr(index, "PROBE_ROWS", 256)
    monkeypatch.setattr(index, "MEMBERS", 4)
    monkeypatch.setitem(scan.TILE, "cpu", (5000, 7))
    monkeypatch.setattr(scan, "CROWDED_AT_ONCE", 20)
