"""Fixtures of the data tests; the pictures themselves are drawn in drawn_pictures.py."""

import pytest
from drawn_pictures import jpeg


@pytest.fixture(scope="session")
def pictures() -> dict[str, bytes]:
    """Twelve JPEGs by key."""
    return {f"{number:09d}": jpeg(number) for number in range(12)}
