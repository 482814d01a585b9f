"""`grow --clean-by`: the normalised cosine and columns of score tables in place of the cosine."""

import json

import numpy as np
import pandas as pd
import pytest

from infogrowth import load_annotations
from infogrowth.growth.cleaning import NegClip, reference_path
from infogrowth.growth.ledger import read_growth
from infogrowth.rows import unit_rows


def grow(infogrowth, growth, *arguments):
    output = growth.with_suffix(".json")
    status, printed = infogrowth("grow", "--growth", growth, "--output", output, *arguments)
    return status, printed, output


def test_negclip_decides_and_does_not_depend_on_batches_or_stops(selection, infogrowth, tmp_path):
    seeds, stream = selection.folder("seeds", range(100)), selection.folder("all", range(100, 1600))
    given = ("--features", stream, "--seed-features", seeds, "--recaptions", selection.recaptions())
    by = ("--clean-by", "negclip", "--min-align", "auto")
    results = []
    for name, more in (("one", ()), ("two", ("--batch-size", 37, "--commit-rows", 100))):
        status, printed, output = grow(infogrowth, tmp_path / name, *given, *by, *more)
        assert status == 0, printed
        results.append(output.read_bytes())
    assert results[0] == results[1]
    folder = read_growth(tmp_path / "one")
    assert folder.settings["clean_by"]["score"] == "negclip"
    reference = NegClip.load(reference_path(tmp_path / "one"))
    decisions = folder.decisions().to_pandas().iloc[100:]
    image, text = (
        unit_rows(selection.arrays[name][100:])[0] for name in ("image_feat", "text_feat")
    )
    np.testing.assert_array_equal(decisions.original_alignment, reference(image, text))
    low = decisions.original_alignment.astype(np.float32) < np.float32(folder.settings["min_align"])
    assert (decisions.verdict[~low & (decisions.reason != "id is already in the dataset")]
            == "kept").all()  # fmt: skip
    assert not (decisions.verdict[low] == "kept").any()
    assert (decisions.verdict == "recaptioned").any()
    status, printed, _ = grow(infogrowth, tmp_path / "one", *given, *by)
    assert status == 0
    assert "nothing new" in printed
    assert "estimate" not in printed  # of cosines, which these alignments are not
    status, printed, _ = grow(infogrowth, tmp_path / "one", *given, "--min-align", "auto")
    assert status == 2
    assert "clean_by" in printed


def test_a_column_of_a_table_decides_and_its_gaps_are_reported(selection, infogrowth, tmp_path):
    features = selection.folder("all", range(200))
    ids = selection.expected["ids"][:200]
    scores = {name: row / 200 for row, name in enumerate(ids)}
    del scores[ids[150]]
    table = pd.DataFrame({"id": list(scores), "itm": list(scores.values())})
    table.to_parquet(tmp_path / "s.parquet")
    given = ("--features", features, "--clean-by", "itm", "--scores", tmp_path / "s.parquet")
    status, printed, output = grow(infogrowth, tmp_path / "g", *given, "--min-align", 0.5)
    assert status == 0, printed
    kept = [entry["image"] for entry in load_annotations(output)]
    assert kept == list(dict.fromkeys(name for name in ids if scores.get(name, 0) >= 0.5))
    decisions = read_growth(tmp_path / "g").decisions().to_pandas()
    assert decisions.reason[150] == "score is missing"
    assert "score is missing" in printed


def test_recaptions_are_judged_by_their_own_column(selection, infogrowth, tmp_path):
    features, recaptions = selection.folder("all", range(100, 400)), selection.recaptions()
    own = ("--features", features, "--recaptions", recaptions)
    assert infogrowth("score", *own, "--output", tmp_path / "scores")[0] == 0
    by_cosine = grow(infogrowth, tmp_path / "a", *own)
    by_table = grow(
        infogrowth, tmp_path / "b", *own, "--clean-by", "cosine_again", "--min-align", 0.4,
        "--scores", renamed(tmp_path),
    )  # fmt: skip
    assert by_cosine[0] == by_table[0] == 0
    assert json.loads(by_cosine[2].read_text()) == json.loads(by_table[2].read_text())
    assert "recaptioned" in by_table[1]


def renamed(folder):
    """The cosines as if they were another score."""
    table = pd.read_parquet(folder / "scores")
    names = {name: name.replace("cosine", "cosine_again") for name in table.columns}
    table.rename(columns=names).to_parquet(folder / "again.parquet")
    return folder / "again.parquet"


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["--clean-by", "itm"], "--scores"),
        (["--clean-by", "itm", "--scores", "s.parquet"], "columns id and itm"),
        (["--clean-by", "t", "--scores", "s.parquet", "--min-align", "auto"], "numbers"),
        (["--clean-by", "t", "--scores", "s.parquet", "--recaptions", "f"], "recaption_t"),
        (["--clean-by", "t", "--scores", "missing.parquet"], "missing.parquet"),
    ],
)
def test_what_cannot_clean_is_refused(
    feature_folder, infogrowth, tmp_path, monkeypatch, arguments, word
):
    monkeypatch.chdir(tmp_path)
    feature_folder("f")
    pd.DataFrame({"id": ["s0"], "t": [1.0]}).to_parquet("s.parquet")
    status, printed, output = grow(infogrowth, tmp_path / "g", "--features", "f", *arguments)
    assert status == 2
    assert word in printed
    assert not output.exists()


def test_a_dataset_that_refuses_another_measure_gets_no_reference(selection, infogrowth, tmp_path):
    given = ("--features", selection.folder("all", range(50)))
    assert grow(infogrowth, tmp_path / "one", *given)[0] == 0
    assert grow(infogrowth, tmp_path / "one", *given, "--clean-by", "negclip")[0] == 2
    assert not reference_path(tmp_path / "one").exists()
