import numpy as np
import pytest

from infogrowth.cli import main
from infogrowth.commands.sweep import sweep
from infogrowth.errors import UserError
from infogrowth.growth.sampling import select_top
from infogrowth.report.dataset import open_growth


@pytest.fixture(scope="module")
def grown(made):
    return open_growth(made.growth)


@pytest.mark.parametrize("threshold", [-0.3, 0.0, 0.1, 0.2, 0.35, 0.4])
def test_a_lower_threshold_keeps_what_growing_again_with_it_keeps(
    grown, other_threshold, threshold
):
    row = next(r for r in sweep(grown, [threshold])["thresholds"] if r["threshold"] == threshold)
    assert row["exact"]
    assert (row["kept"], row["recaptioned"]) == other_threshold(threshold)
    assert row["kept"] + row["dropped"] == 160


@pytest.mark.parametrize("threshold", [0.5, 0.7, 0.8, 0.9])
def test_a_higher_threshold_gives_a_range_that_holds_the_truth(grown, other_threshold, threshold):
    row = next(r for r in sweep(grown, [threshold])["thresholds"] if r["threshold"] == threshold)
    kept, _ = other_threshold(threshold)
    assert row["kept"] <= kept <= row["kept_at_most"]
    assert not row["exact"]


def test_without_recaptions_a_higher_threshold_is_exact(tmp_path, write_folder):
    alignments = [0.41, 0.5, 0.6, 0.2]
    write_folder(tmp_path / "g", *plain(alignments))
    found = sweep(open_growth(tmp_path / "g"), [0.5, 0.55])
    assert [(r["threshold"], r["kept"], r["exact"]) for r in found["thresholds"]] == [
        (0.4, 3, True),
        (0.5, 2, True),
        (0.55, 1, True),
    ]
    assert [r["in_force"] for r in found["thresholds"]] == [True, False, False]
    assert "no recaptions" in " ".join(found["notes"])


def test_a_refused_recaption_makes_a_lower_threshold_a_range(tmp_path, write_folder):
    rows, image, text = plain([0.5, 0.1, 0.2])
    rows[1]["reason"] = "alignment and recaption below min_align"
    write_folder(tmp_path / "g", rows, image, text)
    found = sweep(open_growth(tmp_path / "g"), [0.15])
    assert (found["thresholds"][0]["kept"], found["thresholds"][0]["kept_at_most"]) == (2, 3)


def test_an_id_that_came_twice_is_kept_once_whatever_the_threshold(tmp_path, write_folder):
    rows, image, text = plain([0.45, 0.7])
    rows[1].update(id=rows[0]["id"], verdict="dropped", reason="id is already in the dataset")
    write_folder(tmp_path / "g", rows, image[:1], text[:1])
    found = sweep(open_growth(tmp_path / "g"), [0.1, 0.6, 0.8])
    assert [r["kept"] for r in found["thresholds"]] == [1, 1, 1, 0]


def test_alignment_is_compared_as_the_engine_compares_it(tmp_path, write_folder):
    write_folder(tmp_path / "g", *plain([float(np.float32(0.7)), 0.5]))
    found = sweep(open_growth(tmp_path / "g"), [0.7])
    assert (
        found["thresholds"][-1]["kept"] == 1
    )  # float32(0.7) is under 0.7 in float64, equal in float32


def test_seeds_stay_whatever_the_threshold(grown):
    assert sweep(grown, [2.0])["thresholds"][-1]["kept"] == 10


def test_tops_agree_with_the_static_selection(grown):
    gains = grown.gains[grown.kept]
    row = sweep(grown, tops=[20])["tops"][0]
    chosen = gains[select_top(gains, 20)].mean(axis=1)
    assert row["min_gain"] == pytest.approx(chosen.min())
    assert row["mean_gain"] == pytest.approx(chosen.mean())
    assert sweep(grown)["tops"][-1]["information"] == pytest.approx(1.0)


@pytest.mark.parametrize("top", [0, -1, 10_000])
def test_a_top_beyond_the_kept_samples_is_refused(grown, top):
    with pytest.raises(UserError, match="top"):
        sweep(grown, tops=[top])


def plain(alignments):
    """Rows of samples without recaptions, cleaned at 0.4."""
    rows = [
        {
            "row": number,
            "source": 1,
            "source_row": number,
            "id": f"s{number}",
            "verdict": "kept" if value >= 0.4 else "dropped",
            "reason": "aligned" if value >= 0.4 else "alignment below min_align",
            "alignment": value,
            "original_alignment": value,
            "gain_image": 0.5,
            "gain_text": 0.5,
            "image_neighbors": [],
            "image_distances": [],
            "text_neighbors": [],
            "text_distances": [],
            "caption": "words",
            "original_caption": "words",
        }
        for number, value in enumerate(alignments)
    ]
    kept = sum(value >= 0.4 for value in alignments)
    return rows, np.eye(kept, 4), np.eye(kept, 4)


@pytest.mark.parametrize("value", ["nan", "inf", "1.5"])
def test_a_threshold_that_is_no_cosine_is_refused(made, capsys, value):
    assert main(["sweep", str(made.growth), "--min-align", "0.3", value]) == 2
    assert "--min-align" in capsys.readouterr().err
