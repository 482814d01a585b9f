"""Fixtures of the data tests; the images themselves are drawn in drawn_images.py."""

import pytest
from drawn_images import jpeg


@pytest.fixture(scope="session")
def jpegs() -> dict[str, bytes]:
    """Twelve JPEGs by key."""
    return {f"{number:09d}": jpeg(number) for number in range(12)}


@pytest.fixture(scope="session")
def pairs(jpegs: dict[str, bytes]) -> dict[str, tuple[bytes, str]]:
    """The same with a caption each."""
    return {key: (data, f"image number {int(key)}") for key, data in jpegs.items()}
