"""Results in parquet: read as the JSON is, column by column."""

import pickle

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from infogrowth import GainSampler, UserError, gains_array, load_annotations
from infogrowth.cli import main


@pytest.fixture(scope="module")
def results(golden, tmp_path_factory):
    """The golden selection grown, as JSON, as a table of decisions, and as a selected table."""
    folder = tmp_path_factory.mktemp("results")
    arrays = np.load(golden / "selection_seed0.npz")
    np.savez(
        folder / "features.npz",
        ids=[f"{n:04d}" for n in range(300)],
        captions=[f"caption {n}" for n in range(300)],
        image=arrays["image_feat"][:300],
        text=arrays["text_feat"][:300],
    )
    names = {kind: str(folder / f"result.{kind}") for kind in ("json", "parquet")}
    status = main(
        ["grow", "--features", str(folder / "features.npz"), "--growth", str(folder / "growth"),
         "--output", *names.values(), "--quiet"]
    )  # fmt: skip
    chosen = str(folder / "selected.parquet")
    arguments = ["--growth", str(folder / "growth"), "--where", "true", "--output", chosen]
    assert status == main(["select", *arguments, "--quiet"]) == 0
    return [*names.values(), chosen]


def test_a_result_is_the_same_in_parquet(results):
    as_json, *tables = map(load_annotations, results)
    assert 100 < len(as_json) < 300
    for table in tables:
        assert list(table) == as_json
        assert table[:2] == as_json[:2]
        assert table[-1] == as_json[-1]
        np.testing.assert_array_equal(gains_array(table), gains_array(as_json))
        again = pickle.loads(pickle.dumps(table))
        assert list(again) == as_json
        assert len(pickle.dumps(table)) < 1000
        drawn = [list(GainSampler(gains_array(a), seed=1)) for a in (table, as_json)]
        assert drawn[0] == drawn[1]


@pytest.mark.parametrize(
    ("columns", "word"),
    [
        ({"caption": ["c"]}, "columns image"),
        ({"image": ["a"]}, "columns image"),
        ({"image": ["a", None], "caption": ["b", "c"]}, "sample 1"),
        ({"image": ["a"], "caption": ["b"], "gain_image": [np.nan], "gain_text": [1.0]}, "finite"),
        ({"image": ["a"], "caption": ["b"], "gain_image": [-1.0], "gain_text": [1.0]}, "negative"),
        ({"image": ["a"], "caption": ["b"], "gain_image": ["much"]}, r"t\.parquet .*much"),
    ],
)
def test_tables_that_are_no_results_are_refused(tmp_path, columns, word):
    pq.write_table(pa.table(columns), tmp_path / "t.parquet")
    with pytest.raises(UserError, match=word):
        load_annotations(tmp_path / "t.parquet")


def test_a_table_without_gains_is_a_plain_annotation_file(tmp_path):
    pq.write_table(pa.table({"image": ["a"], "caption": [["b", "c"]]}), tmp_path / "t.parquet")
    annotations = load_annotations(tmp_path / "t.parquet")
    assert list(annotations) == [{"image": "a", "caption": ["b", "c"]}]
    with pytest.raises(UserError, match="no gains"):
        gains_array(annotations)
    (tmp_path / "bad.parquet").write_bytes(b"PAR1")
    with pytest.raises(UserError, match=r"bad\.parquet"):
        load_annotations(tmp_path / "bad.parquet")


def test_numbers_as_ids_and_gains_as_text_are_read_as_in_a_json(tmp_path):
    columns = {"image": [802], "caption": ["b"], "gain_image": ["0.5"], "gain_text": ["0.25"]}
    pq.write_table(pa.table(columns), tmp_path / "t.parquet")
    assert list(load_annotations(tmp_path / "t.parquet")) == [
        {"image": "802", "caption": "b", "gains": [0.5, 0.25]}
    ]
