import json

import pytest

from infogrowth.commands.compare import compare
from infogrowth.report.dataset import open_annotations, open_growth


def opened(path, *samples):
    path.write_text(
        json.dumps([{"image": i, "caption": c, "gains": list(g)} for i, c, g in samples])
    )
    return open_annotations(path)


def test_overlap_and_gains_of_a_case_made_by_hand(tmp_path):
    a = opened(
        tmp_path / "a.json",
        ("1.jpg", "one", (0.2, 0.4)),
        ("2.jpg", "two", (0.4, 0.4)),
        ("3.jpg", "three", (0.9, 0.7)),
        ("4.jpg", "four", (0.1, 0.1)),
    )
    b = opened(
        tmp_path / "b.json",
        ("2", "two, in other words", (0.2, 0.4)),
        ("1", "one", (0.2, 0.4)),
        ("9", "nine", (0.5, 0.7)),
    )
    found = compare(a, b)
    assert (found["both"]["count"], found["only_a"]["count"], found["only_b"]["count"]) == (2, 2, 1)
    assert found["overlap"] == pytest.approx(2 / 5)
    assert found["other_caption"] == 1
    assert found["only_a"]["most_novel"] == ["3.jpg", "4.jpg"]
    assert found["only_a"]["gain_image"] == pytest.approx(0.5)
    assert found["only_b"]["gain_text"] == pytest.approx(0.7)
    assert found["gain_difference"] == pytest.approx((0 + 0.1) / 2)


def test_a_dataset_compared_with_itself_is_the_same(made):
    grown = open_growth(made.growth)
    found = compare(grown, grown)
    assert found["overlap"] == 1.0
    assert (found["only_a"]["count"], found["only_b"]["count"], found["other_caption"]) == (0, 0, 0)
    assert found["gain_correlation"] == pytest.approx(1.0)
    assert found["only_a"]["gain_image"] is None


def test_dropped_samples_are_no_part_of_a_growth_folder(made):
    found = compare(open_growth(made.growth), open_growth(made.growth))
    assert found["count_a"] == 160 - len(made.ids("dropped"))


def test_the_list_of_novel_samples_is_as_long_as_asked_for(tmp_path):
    a = opened(tmp_path / "a.json", *((f"{i}", "c", (i / 10, i / 10)) for i in range(1, 9)))
    b = opened(tmp_path / "b.json", ("x", "c", (0.1, 0.1)))
    assert compare(a, b, limit=3)["only_a"]["most_novel"] == ["8", "7", "6"]
    assert compare(a, b, limit=0)["only_a"]["most_novel"] == []
