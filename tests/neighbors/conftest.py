"""Small steps, so that few rows take every path of the search."""

import pytest

from infogrowth.neighbors import index, scan


@pytest.fixture
def small_steps(monkeypatch):
    """Everything that waits for many rows or queries happens early."""
    monkeypatch.setattr(index, "FEW_QUERIES", 1)
    monkeypatch.setattr(index, "LEARN_ROWS", 200)
    monkeypatch.setattr(index, "LEAST_COLUMNS", 8)
    monkeypatch.setattr(index, "PROBE_ROWS", 256)
    monkeypatch.setattr(scan, "FIRST_ROWS", 64)
