from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest

from infogrowth.report.dataset import (
    GrowthTable,
    by_source,
    duplicate_groups,
    expected_visits,
    growth_curve,
    headline,
    open_growth,
    ranks_in_percent,
    reason_counts,
    source_starts,
)

GOLDEN = Path(__file__).parents[1] / "golden"


def dataset(verdicts, gains=None, sources=None, neighbors=None, reasons=None, skipped=None):
    """A dataset of which only what matters is given; ids are "0", "1", …"""
    count = len(verdicts)
    table = None
    if neighbors is not None:
        table = pa.table(
            {
                "image_neighbors": pa.array([[n for n, _ in row] for row in neighbors]),
                "image_distances": pa.array(
                    [[d for _, d in row] for row in neighbors], pa.list_(pa.float64())
                ),
            }
        )
    rows = pd.DataFrame(
        {
            "id": [str(row) for row in range(count)],
            "caption": "",
            "verdict": verdicts,
            "reason": reasons or "",
            "source": sources or "s",
            "alignment": np.nan,
            "original_alignment": np.nan,
        }
    )
    rows[["gain_image", "gain_text"]] = 0.5 if gains is None else gains
    return GrowthTable("made", rows, neighbors=table, skipped=skipped or {})


def test_headline_counts_what_was_decided(made):
    head = headline(open_growth(made.growth))
    verdicts = [row["verdict"] for row in made.rows]
    assert (head["seen"], head["seeds"], head["skipped"]) == (160, 10, 4)
    assert head["dropped"] == verdicts.count("dropped") > 0
    assert head["recaptioned"] == verdicts.count("recaptioned") > 0
    assert head["kept"] == 160 - head["dropped"]
    kept = [row["gain_text"] for row in made.rows if row["verdict"] != "dropped"]
    assert head["gain_text"] == pytest.approx(sum(kept) / len(kept))


def test_growth_curve_adds_up_and_averages_each_block_over_its_kept_samples():
    verdicts = ["kept", "dropped", "kept", "recaptioned", "kept", "kept", "dropped"]
    gains = [[1, 0.8], [9, 9], [0.5, 0.6], [0.3, 0.4], [0.2, 0.2], [0.1, 0.3], [9, 9]]
    grown = dataset(verdicts, gains, sources=["a"] * 3 + ["b"] * 4)
    curve = growth_curve(grown, blocks=3)
    assert curve.seen.tolist() == [5, 7]  # a block has at least five samples
    assert curve.kept.tolist() == [3, 4]
    assert curve.recaptioned.tolist() == [1, 1]
    assert curve.dropped.tolist() == [1, 2]
    assert curve.gain_image.tolist() == pytest.approx([(1 + 0.5 + 0.3 + 0.2) / 4, 0.1])
    assert curve.gain_text.tolist() == pytest.approx([(0.8 + 0.6 + 0.4 + 0.2) / 4, 0.3])
    assert source_starts(grown) == [(0, "a"), (3, "b")]


def test_a_block_without_kept_samples_has_no_mean_gain():
    curve = growth_curve(dataset(["kept"] * 5 + ["dropped"] * 5), blocks=2)
    assert curve.gain_image[0] == 0.5
    assert np.isnan(curve.gain_image[1])


def test_expected_visits_agree_with_the_counted_draws_of_the_reference_samplers():
    golden = np.load(GOLDEN / "sampling_n200.npz")
    visits = expected_visits(golden["gains_raw"])
    # 4000 epochs were counted: three standard errors of a count near 2 are under 0.05
    counted = golden["v1_mean_visits_per_epoch_4000"]
    assert np.abs(visits.proportional - counted).max() < 0.06
    both = (golden["v2_even_epoch_freq_2000"] + golden["v2_odd_epoch_freq_2000"]) / 2
    assert np.abs(visits.two_phase - both).max() < 0.04
    assert visits.uniform.tolist() == [1.0] * 200
    lengths = visits.sum()
    assert lengths.proportional == pytest.approx(200)
    assert lengths.even == pytest.approx(golden["p_prune"].sum())
    assert lengths.odd == pytest.approx(golden["p_reverse"].sum())


def test_visits_of_samples_without_any_gain_are_zero_rather_than_divided_by_zero():
    visits = expected_visits(np.zeros((4, 2)))
    assert visits.proportional.tolist() == [0] * 4
    assert visits.two_phase.tolist() == [0.5] * 4


def groups_of(found):
    return [group["rows"] for group in found["groups"]]


def test_near_duplicates_hang_together_through_chains_of_close_pairs():
    neighbors = [
        [],
        [("0", 0.01)],
        [("1", 0.02), ("0", 0.4)],
        [("2", 0.3)],
        [("3", 0.05)],
        [("0", 0.0)],  # dropped: belongs to no group
        [("9", 0.0)],  # a neighbor that is not in the set
    ]
    verdicts = ["kept", "kept", "recaptioned", "kept", "kept", "dropped", "kept"]
    found = duplicate_groups(dataset(verdicts, neighbors=neighbors), distance=0.05)
    assert groups_of(found) == [[0, 1, 2], [3, 4]]
    assert "2e-02" in found["groups"][0]["why"] or "0.02" in found["groups"][0]["why"]
    assert groups_of(duplicate_groups(dataset(verdicts, neighbors=neighbors), 0.005)) == []


@pytest.mark.parametrize("scale", [1.0, 0.1, 0.001])
def test_what_counts_as_near_duplicate_follows_the_encoder(scale):
    """An encoder whose features lie ten times closer together finds the same groups."""
    nearest = [None, 0.3, 0.28, 0.01, 0.35, 0.31, 0.0, 0.29, 0.02, 0.33]
    neighbors = [[] if d is None else [("0", scale * d)] for d in nearest]
    found = duplicate_groups(dataset(["kept"] * 10, neighbors=neighbors))
    assert groups_of(found) == [[0, 3, 6, 8]]
    assert found["usual"] == pytest.approx(0.29 * scale)


def test_the_same_image_under_other_ids_is_called_so():
    neighbors = [[], [("0", 2e-8)], [("1", 0.4)], [("2", 0.5)]]
    found = duplicate_groups(dataset(["kept"] * 4, neighbors=neighbors))
    assert groups_of(found) == [[0, 1]]
    assert "same image" in found["groups"][0]["why"]


def test_duplicate_groups_agree_with_all_pairs_of_the_features(made):
    grown = open_growth(made.growth)
    features = grown.kept_features("image").astype(np.float64)
    close = 1 - features @ features.T <= 0.05
    rows = np.flatnonzero(grown.kept)
    reach = close
    for _ in range(8):  # transitive closure
        reach = (reach.astype(int) @ reach.astype(int)) > 0
    expected = {tuple(rows[np.flatnonzero(line)].tolist()) for line in reach if line.sum() > 1}
    assert (
        {tuple(group) for group in groups_of(duplicate_groups(grown, 0.05, 99))}
        == expected
        != set()
    )


def test_reasons_count_dropped_and_skipped_samples_together():
    grown = dataset(
        ["kept", "dropped", "dropped", "dropped"],
        reasons=["aligned", "noise", "noise", "no caption"],
        skipped={"no caption": 2, "not an image": 1},
    )
    assert reason_counts(grown) == [("no caption", 3), ("noise", 2), ("not an image", 1)]


def test_each_source_gets_what_it_brought():
    grown = dataset(
        ["kept", "dropped", "kept", "dropped"],
        gains=[[0.2, 0.4], [9, 9], [0.6, 0.8], [9, 9]],
        sources=["a", "a", "a", "b"],
    )
    first, second = by_source(grown).itertuples()
    assert (first.source, first.seen, first.kept) == ("a", 3, 2)
    assert first.gain == pytest.approx(0.5)
    assert (second.seen, second.kept) == (1, 0)
    assert np.isnan(second.gain)


def test_ranks_are_the_share_of_smaller_values():
    ranks = ranks_in_percent(pd.Series([3.0, 1.0, np.nan, 2.0, 2.0]))
    assert ranks[[0, 1, 3, 4]].tolist() == [75, 0, 25, 25]
    assert np.isnan(ranks[2])
