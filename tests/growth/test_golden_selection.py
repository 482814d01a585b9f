"""The paper's own code chose these samples: ours must choose the same, whatever the batch size."""

import json
from pathlib import Path

import numpy as np
import pytest

from infogrowth.growth.engine import InfoGrowth, Recaption
from infogrowth.neighbors import index, scan

GOLDEN = Path(__file__).parents[1] / "golden"
ARRAYS = np.load(GOLDEN / "selection_seed0.npz")
STORY = json.loads((GOLDEN / "selection_seed0.json").read_text())
SEEDS = STORY["n_seed"]
ROWS = len(STORY["ids"])
RECAPTIONS = {
    name: Recaption(caption, feature)
    for name, caption, feature in zip(
        STORY["recap_ids"], STORY["recap_captions"], ARRAYS["recap_text_feat"], strict=True
    )
}


def rows(start, stop):
    part = slice(start, stop)
    arrays = ARRAYS["image_feat"][part], ARRAYS["text_feat"][part]
    return STORY["ids"][part], STORY["captions"][part], *arrays


def seeded():
    growth = InfoGrowth(k=4, min_align=0.4, device="cpu")
    return growth, [growth.seed(*rows(0, SEEDS))]


def grow(growth, start, stop, batch_size, recaptions):
    steps = range(start, stop, batch_size)
    return [growth.process(*rows(at, min(at + batch_size, stop)), recaptions) for at in steps]


def captions_of(growth):
    return [entry["caption"] for entry in growth.annotations()]


def joined(decisions, column):
    return np.concatenate([column(part) for part in decisions])


def assert_golden(growth, decisions, with_recaptions):
    prefix = "" if with_recaptions else "nr_"
    assert growth.kept_ids == STORY[f"{prefix}kept_ids"]
    np.testing.assert_allclose(growth.kept_gains, ARRAYS[f"{prefix}gains_exact"], atol=1e-6, rtol=0)
    kept = np.flatnonzero(joined(decisions, lambda part: part.kept))
    np.testing.assert_array_equal(kept, ARRAYS[f"{prefix}kept_rows"])
    gains = joined(decisions, lambda part: part.gains)
    np.testing.assert_array_equal(gains[kept], growth.kept_gains)
    if with_recaptions:
        assert captions_of(growth) == STORY["final_captions"]
        verdicts = joined(decisions, lambda part: np.array(part.verdicts))[kept]
        np.testing.assert_array_equal(verdicts == "recaptioned", ARRAYS["recaptioned"])
        alignment = joined(decisions, lambda part: part.alignment)
        np.testing.assert_allclose(alignment[kept], ARRAYS["final_align"], atol=1e-6)
        for column, space in enumerate(("image", "text")):
            nearest = joined(decisions, lambda part, space=space: part.neighbors[space].positions)
            np.testing.assert_array_equal(nearest[kept], ARRAYS["nn_exact"][:, column])
    else:
        captions = dict(zip(STORY["ids"], STORY["captions"], strict=True))
        assert captions_of(growth) == [captions[name] for name in growth.kept_ids]


@pytest.mark.parametrize("batch_size", [1, 7, 64, 4096])
def test_golden_selection_at_any_batch_size(batch_size):
    growth, seeds = seeded()
    stream = grow(growth, SEEDS, ROWS, batch_size, RECAPTIONS)
    if batch_size == 1:
        assert stream[0][0].id == STORY["ids"][SEEDS]
    assert_golden(growth, seeds + stream, with_recaptions=True)


@pytest.mark.parametrize("batch_size", [64, 4096])
def test_golden_selection_without_a_recaption_table(batch_size):
    growth, seeds = seeded()
    stream = grow(growth, SEEDS, ROWS, batch_size, None)
    assert_golden(growth, seeds + stream, with_recaptions=False)


def test_golden_selection_in_two_runs_over_a_saved_dataset():
    first, decisions = seeded()
    decisions += grow(first, SEEDS, 777, 64, RECAPTIONS)
    saved = json.loads(json.dumps([first.settings, first.kept_ids, captions_of(first)]))
    gains = first.kept_gains
    features = [first.kept_features(space) for space in ("image", "text")]
    second = InfoGrowth.restore(*saved, gains, *features, device="cpu")
    decisions += grow(second, 777, ROWS, 100, RECAPTIONS)
    assert second.settings == first.settings
    assert_golden(second, decisions, with_recaptions=True)


def test_golden_alignments_are_those_of_the_original():
    growth, seeds = seeded()
    decisions = [*seeds, growth.process(*rows(SEEDS, ROWS))]
    alignment = joined(decisions, lambda part: part.original_alignment)
    np.testing.assert_allclose(alignment, ARRAYS["align_f32"], atol=1e-6)


def test_planted_copies_of_kept_samples_have_a_neighbor_at_no_distance():
    growth, _ = seeded()
    decisions = growth.process(*rows(SEEDS, ROWS))
    kept = set(growth.kept_ids)
    copies = 0
    for row in range(SEEDS, ROWS):
        original = ARRAYS["dup_of"][row]
        if STORY["dup_kind"][row] == "both" and STORY["ids"][original] in kept:
            assert decisions[row - SEEDS].image_neighbors[0][1] < 1e-3
            copies += 1
    assert copies > 10


@pytest.mark.parametrize("crowd", [256, -1000])
def test_small_cells_and_float64_scores_choose_the_same(monkeypatch, crowd):
    """As with many thousands of samples, or where codes cannot tell them apart."""
    monkeypatch.setitem(index.RUN, "cpu", 64)
    monkeypatch.setattr(index, "MEMBERS", 4)
    monkeypatch.setattr(scan, "CROWD", crowd)
    growth = InfoGrowth(k=4, min_align=0.4, index="exact", device="cpu")
    decisions = [growth.seed(*rows(0, SEEDS)), *grow(growth, SEEDS, ROWS, 64, RECAPTIONS)]
    assert_golden(growth, decisions, with_recaptions=True)
