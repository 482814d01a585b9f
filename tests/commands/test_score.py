"""`score`: cosine, normalised cosine and matching head by id, for `select` and `grow`."""

import json
import tarfile

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from infogrowth import UserError, load_annotations
from infogrowth.commands import score as command
from infogrowth.data.features import open_features
from infogrowth.growth.cleaning import NegClip, draw_reference
from infogrowth.rows import row_products, unit_rows


def pairs(rows, width=8, seed=0):
    random = np.random.default_rng(seed)
    image = random.normal(size=(rows, width))
    return unit_rows(image)[0], unit_rows(image + random.normal(size=(rows, width)))[0]


def test_the_normalised_cosine_is_the_negated_clip_loss_of_a_batch():
    """Where the reference is the batch itself: torch's own cross entropy, both ways."""
    image, text = pairs(50)
    for temperature in (0.01, 0.07, 0.5):
        logits = torch.from_numpy(image).double() @ torch.from_numpy(text).double().T / temperature
        targets = torch.arange(50)
        losses = [
            torch.nn.functional.cross_entropy(matrix, targets, reduction="none")
            for matrix in (logits, logits.T)
        ]
        expected = -temperature * (losses[0] + losses[1]) / 2
        found = NegClip(image, text, temperature)(image, text)
        np.testing.assert_allclose(found, expected.numpy(), atol=2e-6)


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 700), st.integers(1, 40), st.integers(0, 99))
def test_a_pairs_score_does_not_depend_on_what_is_scored_with_it(rows, step, seed):
    image, text = pairs(rows, seed=seed)
    score = NegClip(*pairs(30, seed=seed + 1000))
    whole = score(image, text)
    order = np.random.default_rng(seed).permutation(rows)
    np.testing.assert_array_equal(score(image[order], text[order]), whole[order])
    parts = [score(image[s : s + step], text[s : s + step]) for s in range(0, rows, step)]
    np.testing.assert_array_equal(np.concatenate(parts), whole)


def test_a_reference_comes_back_from_its_file(tmp_path, feature_folder):
    features = open_features(feature_folder("features", rows=60))
    drawn = draw_reference(features, rows=20)
    assert len(drawn.image) == 20
    again = draw_reference(features, rows=20)
    assert drawn.digest() == again.digest() != draw_reference(features, rows=21).digest()
    drawn.save(tmp_path / "reference.npz")
    assert NegClip.load(tmp_path / "reference.npz").digest() == drawn.digest()
    (tmp_path / "bad.npz").write_bytes(b"PK\x03\x04")
    for name in ("bad.npz", "missing.npz"):
        with pytest.raises(UserError, match=name):
            NegClip.load(tmp_path / name)


def test_scores_are_written_by_id_and_selected_by(selection, infogrowth, tmp_path, monkeypatch):
    monkeypatch.setattr(command, "PART_ROWS", 600)
    features, recaptions = selection.folder("all", range(1600)), selection.recaptions()
    output = tmp_path / "scores"
    arguments = ("--features", features, "--recaptions", recaptions, "--output", output)
    assert infogrowth("score", *arguments)[0] == 0
    table = pd.read_parquet(output)
    assert table.id.tolist() == selection.expected["ids"]
    assert len(list(output.glob("*.parquet"))) == 3
    image, text = (unit_rows(selection.arrays[name])[0] for name in ("image_feat", "text_feat"))
    np.testing.assert_array_equal(table.cosine, row_products(image, text))
    reference = draw_reference(open_features(features))
    np.testing.assert_array_equal(table.negclip, reference(image, text))
    scored = table.dropna(subset="recaption_cosine")
    expected = selection.expected
    assert set(scored.id) == set(expected["recap_ids"]) & set(expected["ids"])
    row = scored.index[0]
    number = max(n for n, i in enumerate(expected["recap_ids"]) if i == scored.id[row])
    other = unit_rows(selection.arrays["recap_text_feat"][number : number + 1])[0]
    assert scored.recaption_cosine[row] == row_products(image[row : row + 1], other)[0]
    before = {path.name: path.read_bytes() for path in output.iterdir()}
    (output / "00001.parquet").unlink()
    assert infogrowth("score", *arguments)[0] == 0
    assert {path.name: path.read_bytes() for path in output.iterdir()} == before
    status, printed = infogrowth("score", *arguments, "--temperature", 0.01)
    assert status == 2
    assert "other negclip" in printed
    growth, chosen = tmp_path / "growth", tmp_path / "chosen.json"
    grow = ("grow", "--features", features, "--growth", growth, "--output", tmp_path / "g.json")
    assert infogrowth(*grow, "--min-align", -1)[0] == 0
    bound = float(table.negclip.median())
    where = ("--scores", output, "--where", f"negclip >= {bound!r}")
    assert infogrowth("select", "--growth", growth, *where, "--output", chosen)[0] == 0
    kept = {entry["image"] for entry in load_annotations(tmp_path / "g.json")}
    expected = [i for i in table.id[table.negclip >= bound] if i in kept]
    assert [entry["image"] for entry in load_annotations(chosen)] == list(dict.fromkeys(expected))


def test_the_matching_head_scores_images_with_captions(repository, infogrowth, tmp_path):
    with tarfile.open(sorted((repository / "processed_data/sample").glob("*.tar"))[0]) as tar:
        members = [member for member in tar if not member.name.endswith(".json")][:24]
        tar.extractall(tmp_path / "images", members, filter="data")
    features, output = tmp_path / "features", tmp_path / "scores"
    source = ("--source", tmp_path / "images", "--output", features, "--workers", 0)
    assert infogrowth("embed", *source)[0] == 0
    next(path for path in (tmp_path / "images").iterdir() if path.suffix != ".txt").unlink()
    arguments = ("--features", features, "--by", "itm", "--output", output)
    assert infogrowth("score", *arguments, "--batch-size", 5)[0] == 0
    table = pd.read_parquet(output)
    assert table.itm.notna().sum() == len(table) - 1  # one image is gone since it was embedded
    assert table.itm.dropna().between(0, 1).all()
    # One pair through the model by itself.
    from PIL import Image

    from infogrowth.encoders.loading import load_matcher

    matcher = load_matcher("tiny")
    batch = next(open_features(features).batches(100))
    row = int(table.itm.notna().to_numpy().argmax())
    path = next(p for p in (tmp_path / "images").glob(f"{batch.ids[row]}.*") if p.suffix != ".txt")
    from infogrowth.data.images import decode_image

    assert isinstance(decode_image(path.read_bytes()), Image.Image)
    image = matcher.preprocess(decode_image(path.read_bytes()))[None]
    alone = matcher.match(image, matcher.tokenize([batch.captions[row]]))
    assert table.itm[row] == pytest.approx(float(alone[0]), abs=1e-5)


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["--by", "cosin"], "did you mean 'cosine'"),
        (["--by", "itm"], "--matcher"),
        (["--temperature", "0"], "temperature"),
        (["--reference-rows", "0"], "--reference-rows"),
        (["--growth", "nowhere"], "reference.npz"),
    ],
)
def test_what_cannot_be_scored_is_refused(feature_folder, infogrowth, tmp_path, arguments, word):
    folder = feature_folder("features")
    given = ("--features", folder, "--output", tmp_path / "scores")
    status, printed = infogrowth("score", *given, *arguments)
    assert status == 2
    assert word in printed
    (tmp_path / "other").mkdir()
    (tmp_path / "other/file.json").write_text(json.dumps([]))
    status, printed = infogrowth("score", "--features", folder, "--output", tmp_path / "other")
    assert status == 2
    assert "not empty" in printed
