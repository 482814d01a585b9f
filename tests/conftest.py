"""Shared fixtures: where the golden files and the bundled sample are."""

from pathlib import Path

import infogrowth.threads  # noqa: F401 - before any test loads torch

import pytest


@pytest.fixture(scope="session")
def golden() -> Path:
    """Numerical fixtures computed with the paper's own code (see golden/README.md)."""
    return Path(__file__).parent / "golden"


@pytest.fixture(scope="session")
def repository() -> Path:
    """The top folder of the checkout."""
    return Path(__file__).parents[1]
