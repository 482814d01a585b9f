"""Captions against the paper's own preprocessing, string by string."""

import json
from pathlib import Path

import pytest

from infogrowth.data.text import pre_caption

ROWS = json.loads(
    (Path(__file__).parents[1] / "golden" / "schedules_pre_caption.json").read_text("utf-8")
)


def test_the_fixture_is_all_there():
    assert len(ROWS) == 68


@pytest.mark.parametrize("row", ROWS, ids=[f"{n}" for n in range(len(ROWS))])
def test_captions_are_cleaned_as_in_the_papers_code(row):
    assert pre_caption(row["input"], 30) == row["max_words_30"]
    assert pre_caption(row["input"], 5) == row["max_words_5"]
    assert pre_caption(row["input"]) == row["default_50"]
