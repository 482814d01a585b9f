import json

import numpy as np
import pytest

from infogrowth.errors import UserError
from infogrowth.report.dataset import open_annotations, open_growth


def row(number, verdict="kept", source=0, source_row=None, **more):
    return {
        "row": number,
        "source": source,
        "source_row": number if source_row is None else source_row,
        "id": f"s{number}",
        "verdict": verdict,
        "reason": "aligned" if verdict == "kept" else "alignment below min_align",
        "alignment": 0.6,
        "original_alignment": 0.6,
        "gain_image": 0.5,
        "gain_text": 0.7,
        "image_neighbors": [],
        "image_distances": [],
        "text_neighbors": [],
        "text_distances": [],
        "caption": "words",
        "original_caption": "words",
        **more,
    }


def features(count):
    return np.eye(count, 8, dtype=np.float32)


def test_columns_come_in_stream_order_with_their_neighbors(made):
    grown = open_growth(made.growth)
    for column in ("id", "verdict", "alignment", "original_caption"):
        assert grown.rows[column].tolist() == [r[column] for r in made.rows]
    assert grown.gains[:, 0].tolist() == [r["gain_image"] for r in made.rows]
    near = grown.near(50, "text")
    assert [neighbor["id"] for neighbor in near] == made.rows[50]["text_neighbors"]
    assert [neighbor["distance"] for neighbor in near] == made.rows[50]["text_distances"]
    assert grown.rows.source.iloc[0] == "seeds from seeds"
    assert grown.rows.source.iloc[-1] == "a$b_{1}"


def test_absent_numbers_are_nan_and_absent_texts_empty(tmp_path, write_folder):
    absent = dict.fromkeys(("alignment", "original_alignment", "gain_image", "gain_text"))
    rows = [row(0), row(1, "dropped", **absent, caption=None, original_caption=None)]
    write_folder(tmp_path / "g", rows, features(1), features(1))
    grown = open_growth(tmp_path / "g")
    assert np.isnan(grown.rows.alignment[1])
    assert np.isnan(grown.rows.gain[1])
    assert grown.rows.caption.tolist() == ["words", ""]


def test_a_sample_that_was_processed_again_counts_once_by_its_last_decision(tmp_path, write_folder):
    rows = [
        row(0),
        row(1, "dropped"),
        row(2),
        row(3, "recaptioned", source=2, source_row=1, id="s1"),
        row(4, "dropped", source=2, source_row=7),
    ]
    write_folder(tmp_path / "g", rows, features(3), features(3))
    manifest = json.loads((tmp_path / "g/manifest.json").read_text())
    manifest["sources"].append({"kind": "retry", "features": "features/a", "retries": 0})
    (tmp_path / "g/manifest.json").write_text(json.dumps(manifest))
    grown = open_growth(tmp_path / "g")
    assert grown.rows.id.tolist() == ["s0", "s2", "s1", "s4"]
    assert grown.rows.verdict.tolist() == ["kept", "kept", "recaptioned", "dropped"]
    assert grown.rows.source[2] == "processed again from a"


def test_skipped_samples_of_features_that_were_read_twice_count_once(tmp_path, write_folder):
    write_folder(tmp_path / "g", [row(0)], features(1), features(1), skipped={"no caption": 3})
    manifest = json.loads((tmp_path / "g/manifest.json").read_text())
    manifest["sources"].append(manifest["sources"][1])
    manifest["sources"].append({**manifest["sources"][1], "features": "elsewhere"})
    (tmp_path / "g/manifest.json").write_text(json.dumps(manifest))
    assert open_growth(tmp_path / "g").skipped == {"no caption": 6}


def test_labeled_images_have_their_one_gain_in_both_columns(tmp_path, write_folder):
    rows = [row(0, gain_text=None)]
    write_folder(tmp_path / "g", rows, features(1), features(1))
    settings = json.loads((tmp_path / "g/growth.json").read_text())
    (tmp_path / "g/growth.json").write_text(json.dumps({**settings, "modality": "image"}))
    grown = open_growth(tmp_path / "g")
    assert grown.gains.tolist() == [[0.5, 0.5]]
    assert not grown.has_text


def test_a_result_json_has_kept_samples_and_gains_only(tmp_path):
    path = tmp_path / "grown.json"
    path.write_text(
        json.dumps(
            [
                {"image": "a.jpg", "caption": ["one", "two"], "gains": ["0.5", "1.0"]},
                {"image": "b.jpg", "caption": "three", "gains": [0.1, 0.3]},
            ]
        )
    )
    grown = open_annotations(path)
    assert grown.rows.caption.tolist() == ["one / two", "three"]
    assert grown.rows.gain.tolist() == [0.75, 0.2]
    assert grown.kept.all()
    assert grown.near(0, "image") == []


def test_an_empty_result_json_is_refused(tmp_path):
    path = tmp_path / "grown.json"
    path.write_text("[]")
    with pytest.raises(UserError, match="no samples"):
        open_annotations(path)


def test_an_id_that_came_twice_is_known_by_the_caption_that_was_kept(tmp_path, write_folder):
    rows = [
        row(0, caption="kept words"),
        row(1, "dropped", id="s0", caption="other words"),
    ]
    write_folder(tmp_path / "g", rows, features(1), features(1))
    assert open_growth(tmp_path / "g").known_captions == {"s0": "kept words"}
