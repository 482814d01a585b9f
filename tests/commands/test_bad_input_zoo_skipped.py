"""The zoo of broken records of skipped samples: refused before anything is decided or committed."""

import json
import re

import pytest

from infogrowth.growth.ledger import read_growth


@pytest.fixture
def grow(feature_folder, infogrowth, tmp_path):
    """Writes files into a good features folder of 6 samples and runs `grow` on it."""
    folder = feature_folder("features")

    def run(name, content):
        (folder / name).write_bytes(content)
        return infogrowth(
            "grow", "--features", folder, "--growth", tmp_path / "growth",
            "--output", tmp_path / "out.json", "--device", "cpu",
        )  # fmt: skip

    return run


BAD_COUNTS = {
    "a word": {"a": "b"},
    "a half": {"a": 0.5},
    "less than nothing": {"a": -1},
    "true": {"a": True},
    "a list of reasons": ["a"],
    "a number": 3,
}


@pytest.mark.parametrize("name", BAD_COUNTS)
def test_skipped_counts_that_are_no_counts_are_refused(grow, tmp_path, name):
    status, printed = grow("features.json", json.dumps({"skipped": BAD_COUNTS[name]}).encode())
    assert status == 2
    assert (
        "features.json" in printed and '"skipped" must be' in printed and printed.count("\n") == 1
    )
    assert not (tmp_path / "growth").exists()


BAD_LINES = {
    "no UTF-8": (b'{"reason": "\xff"}\n', "line 1,.*utf-8"),
    "no JSON": (b'{"reason": "a"}\n{', "line 2,"),
    "no reason": (b'{"id": "a"}\n', "line 1,.*reason"),
    "a list": (b"[1]\n", "line 1,.*list"),
    "lists within lists": (b"[" * 100_000, "line 1,.*deeply"),
}


@pytest.mark.parametrize("name", BAD_LINES)
def test_a_broken_list_of_skipped_samples_is_refused(grow, tmp_path, name):
    content, expected = BAD_LINES[name]
    status, printed = grow("skipped.jsonl", content)
    assert status == 2
    assert re.search(rf"skipped\.jsonl, {expected}", printed) and printed.count("\n") == 1
    assert not (tmp_path / "growth").exists()


def test_good_records_of_skipped_samples_are_counted(grow, tmp_path):
    lines = b'{"id": "a", "reason": "no caption"}\n{"id": "b", "reason": "no caption"}\n'
    lines += b'{"reason": "\\ud800"}\n'  # half a surrogate pair, which could not be written again
    status, printed = grow("skipped.jsonl", lines)
    assert status == 0, printed
    assert read_growth(tmp_path / "growth").sources[0].skipped == {"no caption": 2, "\ufffd": 1}


def test_a_manifest_with_skipped_counts_of_words_is_damaged(grow, infogrowth, tmp_path):
    assert grow("skipped.jsonl", b"")[0] == 0
    path = tmp_path / "growth/manifest.json"
    manifest = json.loads(path.read_text())
    manifest["sources"][0]["skipped"] = {"a": "b"}
    path.write_text(json.dumps(manifest))
    status, printed = infogrowth("sweep", tmp_path / "growth")
    assert status == 2
    assert "manifest.json is damaged" in printed and printed.count("\n") == 1
