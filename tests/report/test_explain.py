import pytest

from infogrowth.annotations import save_annotations
from infogrowth.commands.explain import as_text, explain, image_strip
from infogrowth.errors import UserError
from infogrowth.report.dataset import open_annotations, open_growth
from infogrowth.report.galleries import Thumbnails


@pytest.fixture(scope="module")
def grown(made):
    return open_growth(made.growth)


def one(grown, sample_id):
    (found,) = explain(grown, sample_id)
    return found


def row_of(made, sample_id):
    return next(row for row in made.rows if row["id"] == sample_id)


def test_a_recaptioned_sample_names_both_captions_and_alignments(made, grown):
    sample_id = made.ids("recaptioned")[0]
    row, text = row_of(made, sample_id), as_text(one(grown, sample_id))
    assert row["caption"] in text
    assert row["original_caption"] in text
    assert f"{row['original_alignment']:.3f} → {row['alignment']:.3f}".replace("-", "−") in text
    assert "kept with the new caption" in text


def test_a_new_caption_names_who_wrote_it_and_what_let_it_in(made, grown):
    found = one(grown, made.ids("recaptioned")[0])
    assert "captioner" not in as_text(found)  # folders of earlier versions did not record it
    record = {"captioner": "nearest:list.json", "recaption_alignment": 0.7125}
    taken = {**found, **record, "recaption_rule": "auto 0.62"}
    assert "by nearest:list.json, alignment 0.713, taken by auto 0.62" in as_text(taken)
    assert "alignment 0.713, not taken" in as_text({**found, **record})


def test_a_dropped_sample_names_the_threshold_it_missed(made, grown):
    found = one(grown, made.ids("dropped")[0])
    assert f"{found['alignment']:.3f}".replace("-", "−") + " is under 0.4" in found["why"]
    assert found["visits"] is None
    assert found["gain_rank"] is None
    assert found["gain_image"] is not None


def test_a_seed_is_called_trusted(grown):
    assert "never filtered" in one(grown, "000003")["why"]


def test_neighbors_come_nearest_first_with_the_captions_they_are_known_by(made, grown):
    found, row = one(grown, "000090"), row_of(made, "000090")
    assert [n["id"] for n in found["image_neighbors"]] == row["image_neighbors"]
    assert [n["distance"] for n in found["text_neighbors"]] == row["text_distances"]
    for near in found["image_neighbors"]:
        assert near["caption"] == row_of(made, near["id"])["caption"]


def test_the_id_is_found_with_its_extension_too(grown):
    assert one(grown, "cc3m_train/000090.jpg")["id"] == "000090"


def test_an_unknown_id_names_the_nearest_ones(grown):
    with pytest.raises(UserError, match="did you mean '000"):
        explain(grown, "00009x")


def test_gain_rank_counts_the_kept_samples_that_are_less_novel(made, grown):
    gains = {
        row["id"]: row["gain_image"] + row["gain_text"]
        for row in made.rows
        if row["verdict"] != "dropped"
    }
    below = sum(value < gains["000090"] for value in gains.values())
    assert one(grown, "000090")["gain_rank"] == pytest.approx(100 * below / len(gains))


def test_terminal_text_holds_no_control_characters(tmp_path, write_folder, made, grown):
    rows = [{**row, "caption": "\x1b[31mred\x07‮"} for row in made.rows[:1]]
    write_folder(
        tmp_path / "g", rows, grown.kept_features("image")[:1], grown.kept_features("text")[:1]
    )
    text = as_text(one(open_growth(tmp_path / "g"), "000000"))
    assert "\x1b" not in text
    assert "\x07" not in text
    assert "‮" not in text


def test_the_strip_shows_the_sample_and_its_neighbors(made, grown):
    found = one(grown, "000090")
    strip = image_strip(found, Thumbnails(made.lmdb), side=100)
    assert strip.width == 16 + 5 * (100 + 16)
    own = Thumbnails(made.lmdb).image("000090", 100)
    middle = strip.getpixel((16 + 50, 16 + 50))
    assert middle == own.getpixel((50, own.height // 2))


def test_the_strip_says_where_an_image_is_missing(grown):
    strip = image_strip(one(grown, "000090"), Thumbnails(None))
    assert strip.getpixel((20, 20)) == (0xEE, 0xF0, 0xF4)


@pytest.mark.parametrize("asked", ["x/b.jpg", "x/b", "x/b.png", "b"])
def test_a_sample_in_a_folder_is_found_without_its_extension(tmp_path, asked):
    names = ["x/a.jpg", "x/b.jpg"]
    samples = [{"image": name, "caption": "c", "gains": [0.5, 0.25]} for name in names]
    save_annotations(tmp_path / "grown.json", samples)
    assert one(open_annotations(tmp_path / "grown.json"), asked)["id"] == "x/b.jpg"
