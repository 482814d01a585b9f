"""The zoo of bad samples in a good source: recorded with the reason, counted; the rest grows."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from infogrowth.annotations import load_annotations
from infogrowth.growth.ledger import read_growth

ROWS = 6
BAD = 3  # the row that something is done to


def bad_row(value):
    """6 random rows, the fourth of them full of ``value``."""
    rows = np.random.default_rng(0).normal(size=(ROWS, 8)).astype(np.float32)
    rows[BAD] = value
    return rows


def one_bad_number(value):
    rows = bad_row(1.0)
    rows[BAD, 5] = value
    return rows


GOOD = bad_row(0.5)
IDS = [f"s{row}" for row in range(ROWS)]
CAPTIONS = [f"caption {row}" for row in range(ROWS)]


def changed(values, value):
    return [value if row == BAD else old for row, old in enumerate(values)]


# What is wrong with the fourth sample, and the reason that must be recorded.
BAD_SAMPLES = {
    "image feature of NaN": ({"image": bad_row(np.nan)}, "image feature is not finite"),
    "one NaN in the image feature": (
        {"image": one_bad_number(np.nan)},
        "image feature is not finite",
    ),
    "infinite image feature": ({"image": one_bad_number(np.inf)}, "image feature is not finite"),
    "image feature of zeros": ({"image": bad_row(0)}, "image feature is zero"),
    "text feature of NaN": ({"text": bad_row(np.nan)}, "text feature is not finite"),
    "infinite text feature": ({"text": one_bad_number(-np.inf)}, "text feature is not finite"),
    "text feature of zeros": ({"text": bad_row(0)}, "text feature is zero"),
    "overflown half precision": (
        {"image": bad_row(np.inf).astype(np.float16)},
        "image feature is not finite",
    ),
    "id that was there before": ({"ids": changed(IDS, "s0")}, "id is already in the dataset"),
    "no id": ({"ids": changed(IDS, None)}, "id is missing"),
    "empty id": ({"ids": changed(IDS, "")}, "id is missing"),
    "no caption": ({"captions": changed(CAPTIONS, None)}, "caption is missing"),
    "empty caption": ({"captions": changed(CAPTIONS, "")}, "caption is missing"),
    "swapped caption": ({"text": bad_row(-0.5)}, "alignment below min_align"),
}


@pytest.mark.parametrize("name", BAD_SAMPLES)
def test_a_bad_sample_is_dropped_with_its_reason_and_the_others_are_kept(
    feature_folder, infogrowth, tmp_path, name
):
    parts, reason = BAD_SAMPLES[name]
    parts = {"ids": IDS, "captions": CAPTIONS, "image": GOOD, "text": GOOD, **parts}
    folder = feature_folder("features", **parts)
    status, printed = infogrowth(
        "grow", "--features", folder, "--growth", tmp_path / "g", "--output", tmp_path / "o.json"
    )
    assert status == 0
    grown = read_growth(tmp_path / "g")
    record = grown.decisions().to_pylist()[BAD]
    assert (record["verdict"], record["reason"]) == ("dropped", reason)
    kept = [IDS[row] for row in range(ROWS) if row != BAD]
    assert [a["image"] for a in load_annotations(tmp_path / "o.json")] == kept
    assert grown.totals["reasons"] == {"aligned": 5, reason: 1}
    assert [line for line in printed.splitlines() if line.split("  ")[1:2] == [reason]]


BAD_RECAPTIONS = {
    "with no caption": ({"captions": [None]}, "recaption has no caption"),
    "of NaN": ({"text": np.full((1, 8), np.nan)}, "recaption feature is not finite"),
    "of zeros": ({"text": np.zeros((1, 8))}, "recaption feature is zero"),
    "that does not align": ({"text": -GOOD[BAD : BAD + 1]}, "alignment and recaption below"),
}


@pytest.mark.parametrize("name", BAD_RECAPTIONS)
def test_a_bad_recaption_is_reported_and_the_sample_stays_out(
    feature_folder, infogrowth, tmp_path, name
):
    parts, reason = BAD_RECAPTIONS[name]
    folder = feature_folder("features", image=GOOD, text=bad_row(-0.5))
    good = {"ids": [IDS[BAD]], "captions": ["better"], "image": None, "text": GOOD[[BAD]]}
    table = feature_folder("table", **{**good, **parts})
    status, _ = infogrowth(
        "grow", "--features", folder, "--recaptions", table, "--growth", tmp_path / "g",
        "--output", tmp_path / "o.json",
    )  # fmt: skip
    assert status == 0
    record = read_growth(tmp_path / "g").decisions().to_pylist()[BAD]
    assert record["verdict"] == "dropped"
    assert reason in record["reason"]


def test_a_recaption_table_without_rows_changes_nothing(feature_folder, infogrowth, tmp_path):
    table = feature_folder("table", image=None, text=np.zeros((6, 8), np.float32))
    np.save(table / "text_emb/text_emb_00.npy", np.zeros((0, 8), np.float16))
    empty = pa.table(
        {"image_path": pa.array([], pa.string()), "caption": pa.array([], pa.string())}
    )
    pq.write_table(empty, table / "metadata/metadata_00.parquet")
    status, _ = infogrowth(
        "grow", "--features", feature_folder("f", image=GOOD, text=GOOD), "--recaptions", table,
        "--growth", tmp_path / "g", "--output", tmp_path / "o.json",
    )  # fmt: skip
    assert status == 0
    assert len(load_annotations(tmp_path / "o.json")) == ROWS


def test_of_two_recaptions_for_one_sample_the_later_counts(feature_folder, infogrowth, tmp_path):
    folder = feature_folder("features", image=GOOD, text=bad_row(-0.5))
    table = feature_folder(
        "table",
        ids=[IDS[BAD]] * 2,
        captions=["early", "late"],
        image=None,
        text=GOOD[[BAD, BAD]],
    )
    status, _ = infogrowth(
        "grow", "--features", folder, "--recaptions", table, "--growth", tmp_path / "g",
        "--output", tmp_path / "o.json",
    )  # fmt: skip
    assert status == 0
    assert load_annotations(tmp_path / "o.json")[BAD]["caption"] == "late"


def test_bad_seeds_are_left_out_with_their_reason(feature_folder, infogrowth, tmp_path):
    seeds = feature_folder("seeds", image=bad_row(np.nan), text=GOOD)
    stream = feature_folder("stream", ids=[f"t{row}" for row in range(ROWS)], seed=9)
    status, _ = infogrowth(
        "grow", "--features", stream, "--seed-features", seeds, "--growth", tmp_path / "g",
        "--output", tmp_path / "o.json",
    )  # fmt: skip
    assert status == 0
    totals = read_growth(tmp_path / "g").totals
    assert totals["reasons"]["seed"] == 5
    assert totals["reasons"]["image feature is not finite"] == 1


def test_what_embed_skipped_is_counted_in_the_summary(feature_folder, infogrowth, tmp_path):
    folder = feature_folder("features")
    lines = ['{"id": "x", "reason": "image is truncated"}\n'] * 3
    (folder / "skipped.jsonl").write_text("".join(lines))
    status, printed = infogrowth(
        "grow", "--features", folder, "--growth", tmp_path / "g", "--output", tmp_path / "o.json"
    )
    assert status == 0
    assert "skipped before (no features)  3" in printed
    assert read_growth(tmp_path / "g").sources[0].skipped == {"image is truncated": 3}
