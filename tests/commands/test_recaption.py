"""`infogrowth recaption`: which samples it picks, what it writes, and that `grow` takes it."""

import io
import json
import signal

import lmdb
import numpy as np
import pytest
from PIL import Image

from infogrowth.blip.config import preset
from infogrowth.blip.pretrain import BlipPretrain
from infogrowth.blip.pretrained import save_folder
from infogrowth.blip.text import load_tokenizer
from infogrowth.cli import main
from infogrowth.data.features import open_features
from infogrowth.encoders.loading import load_captioner, load_encoder
from infogrowth.growth.engine import InfoGrowth
from infogrowth.growth.ledger import read_growth
from infogrowth.randomness import generator

PAIRS = 24
WORDS = ["a", "the", "red", "green", "blue", "cat", "dog", "boat", "on", "sea", "tree", "two"]
SHORT = ["--device", "cpu", "--quiet"]
GENERATION = ["--beams", "2", "--max-tokens", "6", "--batch-size", "3", "--shard-size", "4"]


def _jpeg(number):
    random = generator(number, "recaption test picture")
    colors = Image.fromarray(random.integers(0, 256, (4, 5, 3), dtype=np.uint8))
    buffer = io.BytesIO()
    colors.resize((50 + number, 60 - number), Image.Resampling.BICUBIC).save(buffer, "JPEG")
    return buffer.getvalue()


def _caption(number):
    return " ".join(generator(number, "recaption test caption").choice(WORDS, 2 + number % 5))


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A random BLIP with both encoders and the decoder, in a folder of ours."""
    folder = tmp_path_factory.mktemp("model")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
    (folder / "words.txt").write_text("".join(f"{word}\n" for word in words))
    tokenizer = load_tokenizer(folder / "words.txt")
    config = preset("tiny", image_size=32, vision_depth=2, text_depth=2).with_tokenizer(tokenizer)
    blip = BlipPretrain(config, queue_size=8, seed=3)
    for parameter in blip.parameters():  # features that differ from image to image
        if parameter.dim() > 1:
            parameter.data.mul_(6)
    # A random decoder would often end, or give a special token, before it gave a word.
    unsaid = [*range(5), len(tokenizer) - 2, len(tokenizer) - 1]
    blip.text_decoder.cls.predictions.bias.data[unsaid] = -1e4
    save_folder(blip, folder, tokenizer)
    return folder


@pytest.fixture(scope="module")
def work(model, tmp_path_factory):
    """A folder with an LMDB, its annotations, and the features of both."""
    folder = tmp_path_factory.mktemp("work")
    with lmdb.open(str(folder / "lmdb"), map_size=1 << 24) as env, env.begin(write=True) as t:
        for number in range(PAIRS):
            t.put(f"{number:03d}".encode(), _jpeg(number))
    entries = [{"image": f"{n:03d}.jpg", "caption": _caption(n)} for n in range(PAIRS)]
    (folder / "pairs.json").write_text(json.dumps(entries))
    status = main(
        ["embed", "--lmdb", str(folder / "lmdb"), "--annotations", str(folder / "pairs.json"),
         "--encoder", str(model), "--output", str(folder / "features"), *SHORT]
    )  # fmt: skip
    assert status == 0
    return folder


@pytest.fixture(scope="module")
def alignments(work):
    """Alignment of every sample by brute force in float64, from the files as they are."""
    image, text = (
        np.load(work / "features" / f"{space}_emb" / f"{space}_emb_0.npy").astype(np.float64)
        for space in ("img", "text")
    )
    image /= np.linalg.norm(image, axis=1, keepdims=True)
    text /= np.linalg.norm(text, axis=1, keepdims=True)
    return (image * text).sum(axis=1)


@pytest.fixture(scope="module")
def threshold(alignments):
    """A number with about half of the samples under it, and none near it."""
    ordered = np.sort(alignments)
    middle = PAIRS // 2
    return float((ordered[middle - 1] + ordered[middle]) / 2)


@pytest.fixture(scope="module")
def recaptioned(work, model, threshold, tmp_path_factory):
    output = tmp_path_factory.mktemp("recaptioned") / "table"
    assert main(_before(work, model, threshold, output)) == 0
    return output


def _before(work, model, threshold, output, *more):
    return ["recaption", "--features", str(work / "features"), "--min-align", str(threshold),
            "--captioner", str(model), "--output", str(output),
            *SHORT, *GENERATION, *more]  # fmt: skip


def _files(folder):
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def _table(folder, extra=()):
    return next(open_features(folder, ("text",), extra=extra).batches(1000))


def _low(alignments, threshold):
    return [f"{n:03d}.jpg" for n in np.flatnonzero(alignments < threshold)]


def test_samples_under_min_align_get_the_captioners_captions(
    recaptioned, alignments, threshold, model
):
    batch = _table(recaptioned, ("original_caption", "original_alignment"))
    assert batch.ids == _low(alignments, threshold)
    captioner = load_captioner(str(model), beams=2, max_tokens=6)
    images = [Image.open(io.BytesIO(_jpeg(int(i[:3])))).convert("RGB") for i in batch.ids]
    expected = captioner.caption([captioner.preprocess(image) for image in images])
    assert batch.captions == expected
    assert all(expected)
    assert batch.extra["original_caption"] == [_caption(int(i[:3])) for i in batch.ids]
    low = alignments[[int(i[:3]) for i in batch.ids]]
    np.testing.assert_allclose(batch.extra["original_alignment"], low, atol=1e-6)


def test_the_table_holds_text_features_of_the_same_encoder_and_no_images(recaptioned, work, model):
    assert not (recaptioned / "img_emb").exists()
    batch = _table(recaptioned)
    expected = load_encoder(str(model)).encode_texts(batch.captions).numpy()
    np.testing.assert_allclose(batch.text, expected, atol=5e-4)
    features = json.loads((work / "features" / "features.json").read_text())
    description = json.loads((recaptioned / "features.json").read_text())
    assert description["encoder"] == features["encoder"]
    assert description["kind"] == "recaptions"
    assert description["captioner"]["name"] == str(model)
    assert description["finished"] is True


def test_auto_is_the_threshold_that_grow_finds_with_the_same_seeds(
    work, model, tmp_path, alignments
):
    seeds = [f"{n:03d}.jpg" for n in range(0, PAIRS, 3)]
    (tmp_path / "seeds.json").write_text(json.dumps(seeds))
    arguments = ["--min-align", "auto", "--seed-ids", str(tmp_path / "seeds.json")]
    assert main([*_before(work, model, 0, tmp_path / "table"), *arguments]) == 0
    features = next(open_features(work / "features").batches(1000))
    rows = slice(0, PAIRS, 3)
    growth = InfoGrowth(min_align="auto", device="cpu")
    growth.seed(features.ids[rows], features.captions[rows], features.image[rows],
                features.text[rows])  # fmt: skip
    description = json.loads((tmp_path / "table" / "features.json").read_text())
    assert description["min_align"] == growth.settings["min_align"]
    low = _low(alignments, description["min_align"])
    assert _table(tmp_path / "table").ids == [sample for sample in low if sample not in seeds]


def test_after_growing_the_dropped_samples_are_recaptioned(
    work, model, threshold, tmp_path, recaptioned
):
    grown = tmp_path / "growth"
    grow = ["grow", "--features", str(work / "features"), "--growth", str(grown),
            "--min-align", str(threshold), "--output", str(tmp_path / "grown.json"),
            *SHORT]  # fmt: skip
    assert main(grow) == 0
    after = ["recaption", "--growth", str(grown), "--captioner", str(model),
             "--output", str(tmp_path / "table"), *SHORT, *GENERATION]  # fmt: skip
    assert main(after) == 0
    before, then = _table(recaptioned), _table(tmp_path / "table")
    assert then.ids == before.ids
    assert then.captions == before.captions
    np.testing.assert_array_equal(then.text, before.text)


def test_grow_takes_an_imported_table_and_processes_the_samples_again(
    work, model, threshold, tmp_path, alignments
):
    grown = tmp_path / "growth"
    grow = ["grow", "--features", str(work / "features"), "--growth", str(grown),
            "--min-align", str(threshold), "--output", str(tmp_path / "grown.json"),
            *SHORT]  # fmt: skip
    assert main(grow) == 0
    batch = next(open_features(work / "features").batches(1000))
    image, text = (rows / np.linalg.norm(rows, axis=1, keepdims=True) for rows in
                   (batch.image.astype(np.float64), batch.text.astype(np.float64)))  # fmt: skip
    cosines = image @ text.T
    # Each dropped sample is given the caption of the dataset that fits its image best.
    low = np.flatnonzero(alignments < threshold)
    best = cosines[low].argmax(axis=1)
    entries = [{"image": f"{n:03d}", "caption": _caption(b)}
               for n, b in zip(low.tolist(), best.tolist(), strict=True)]  # fmt: skip
    entries.append({"image": "unknown", "caption": "nobody asked for it"})
    (tmp_path / "captions.json").write_text(json.dumps(entries))
    imported = ["recaption", "--growth", str(grown), "--captions", str(tmp_path / "captions.json"),
                "--output", str(tmp_path / "table"), *SHORT]  # fmt: skip
    assert main(imported) == 0
    table = _table(tmp_path / "table")
    assert table.ids == [f"{n:03d}.jpg" for n in low]
    assert table.captions == [_caption(b) for b in best.tolist()]
    assert main([*grow, "--recaptions", str(tmp_path / "table")]) == 0
    joined = {
        row["id"]: row["caption"]
        for row in read_growth(grown).decisions(["id", "verdict", "caption"]).to_pylist()
        if row["verdict"] == "recaptioned"
    }
    fitting = cosines[low, best] >= threshold
    assert fitting.any()
    assert joined == {
        f"{n:03d}.jpg": _caption(b)
        for n, b, fits in zip(low.tolist(), best.tolist(), fitting, strict=True) if fits
    }  # fmt: skip


@pytest.mark.parametrize("kind", ["json", "txt"])
def test_the_nearest_caption_of_a_list_is_found_and_its_captioner_recorded(
    work, model, threshold, tmp_path, alignments, kind
):
    candidates = [_caption(number) for number in range(0, PAIRS, 2)]
    path = tmp_path / f"list.{kind}"
    entries = [{"image": str(n), "caption": text} for n, text in enumerate(candidates)]
    path.write_text(json.dumps(entries) if kind == "json" else "\n".join([*candidates, "", " "]))
    seeds = [f"{n:03d}.jpg" for n in range(0, PAIRS, 3)]
    (tmp_path / "seeds.json").write_text(json.dumps(seeds))
    arguments = ["recaption", "--features", str(work / "features"), "--min-align", str(threshold),
                 "--captioner", f"nearest:{path}", "--output", str(tmp_path / "table"),
                 "--seed-ids", str(tmp_path / "seeds.json"), *SHORT]  # fmt: skip
    assert main(arguments) == 0
    batch = next(open_features(work / "features").batches(1000))
    image = batch.image / np.linalg.norm(batch.image, axis=1, keepdims=True)
    lists = load_encoder(str(model)).encode_texts(candidates).numpy()
    best = (image.astype(np.float64) @ lists.T).argmax(axis=1)
    table = _table(tmp_path / "table")
    assert len(table) > 3
    for sample, caption in zip(table.ids, table.captions, strict=True):
        assert caption == candidates[best[batch.ids.index(sample)]]
    check = json.loads((tmp_path / "table" / "features.json").read_text())["seed_check"]
    rows = [batch.ids.index(name) for name in seeds]
    own = alignments[rows]
    better = (image[rows].astype(np.float64) @ lists.T).max(axis=1) > own + 1e-6
    assert check == {
        "seeds": len(seeds), "captioned": len(seeds), "better_than_true": int(better.sum())
    }  # fmt: skip
    grow = ["grow", "--features", str(work / "features"), "--growth", str(tmp_path / "g"),
            "--min-align", str(threshold), "--recaptions", str(tmp_path / "table"),
            "--output", str(tmp_path / "grown.json"), *SHORT]  # fmt: skip
    assert main(grow) == 0
    decisions = read_growth(tmp_path / "g").decisions().to_pandas()
    taken = decisions[decisions.verdict == "recaptioned"]
    assert len(taken) and taken.captioner.eq(f"nearest:{path}").all()
    assert taken.recaption_rule.str.contains("min_align").all()


def test_an_image_that_is_undecided_between_two_captions_gets_none(work, model, tmp_path):
    captions = [_caption(0), _caption(1)]
    (tmp_path / "list.txt").write_text("\n".join(captions))
    arguments = [*_before(work, model, 0, tmp_path / "table", "--all")]
    arguments[arguments.index("--captioner") + 1] = f"nearest:{tmp_path / 'list.txt'}"
    assert main([*arguments, "--min-margin", "0.02"]) == 0
    batch = next(open_features(work / "features").batches(1000))
    lists = load_encoder(str(model)).encode_texts(captions).numpy()
    products = batch.image / np.linalg.norm(batch.image, axis=1, keepdims=True) @ lists.T
    decided = np.abs(products[:, 0] - products[:, 1]) >= 0.02
    assert 0 < decided.sum() < PAIRS
    assert _table(tmp_path / "table").ids == [batch.ids[n] for n in np.flatnonzero(decided)]


@pytest.mark.parametrize(
    ("name", "content"), [("no.json", None), ("a.json", "{}"), ("b.txt", " "), ("c.txt", "\xff")]
)
def test_a_list_without_captions_is_refused(work, model, tmp_path, capsys, name, content):
    if content is not None:
        (tmp_path / name).write_bytes(content.encode("latin-1"))
    arguments = [*_before(work, model, 0, tmp_path / "table", "--all")]
    arguments[arguments.index("--captioner") + 1] = f"nearest:{tmp_path / name}"
    assert main(arguments) == 2
    assert "list of captions" in capsys.readouterr().err


def test_all_recaptions_every_sample(work, model, tmp_path):
    assert main(_before(work, model, 0, tmp_path / "table", "--all")) == 0
    assert len(_table(tmp_path / "table")) == PAIRS


def test_no_sample_under_min_align_is_an_empty_table_that_grow_takes(work, model, tmp_path):
    assert main(_before(work, model, -1, tmp_path / "table")) == 0
    assert len(open_features(tmp_path / "table", ("text",)).shards) == 1
    assert open_features(tmp_path / "table", ("text",)).rows == 0
    grow = ["grow", "--features", str(work / "features"), "--growth", str(tmp_path / "growth"),
            "--min-align", "-1", "--output", str(tmp_path / "grown.json"),
            "--recaptions", str(tmp_path / "table"), *SHORT]  # fmt: skip
    assert main(grow) == 0
    assert len(json.loads((tmp_path / "grown.json").read_text())) == PAIRS


def test_a_file_of_captions_alone_is_embedded_whole(model, tmp_path):
    entries = [
        {"image": "b.jpg", "caption": "a boat on the sea"},
        {"image": "a.jpg", "caption": ""},
        {"image": "c", "caption": ["two trees"]},
        {"image": "b", "caption": "given twice"},
    ]
    (tmp_path / "captions.json").write_text(json.dumps(entries))
    arguments = ["recaption", "--captions", str(tmp_path / "captions.json"), "--encoder",
                 str(model), "--output", str(tmp_path / "table"), *SHORT]  # fmt: skip
    assert main(arguments) == 0
    batch = _table(tmp_path / "table")
    assert batch.ids == ["b.jpg", "c"]
    assert batch.captions == ["a boat on the sea", "two trees"]
    skipped = json.loads((tmp_path / "table" / "skipped.jsonl").read_text())
    assert skipped == {"id": "a.jpg", "reason": "the caption is missing or empty"}


def test_an_image_that_is_gone_is_skipped_and_recorded(work, model, tmp_path, threshold):
    with lmdb.open(str(tmp_path / "lmdb"), map_size=1 << 24) as env, env.begin(write=True) as t:
        for number in range(1, PAIRS):
            t.put(f"{number:03d}".encode(), _jpeg(number) if number != 2 else b"<html>")
    more = ["--lmdb", str(tmp_path / "lmdb"), "--all"]
    assert main(_before(work, model, threshold, tmp_path / "table", *more)) == 0
    assert _table(tmp_path / "table").ids == [f"{n:03d}.jpg" for n in (1, *range(3, PAIRS))]
    lines = (tmp_path / "table" / "skipped.jsonl").read_text().splitlines()
    assert {e["id"]: e["reason"] for e in map(json.loads, lines)} == {
        "000.jpg": "the image is missing", "002.jpg": "not an image in a format that is read",
    }  # fmt: skip


def test_killed_it_goes_on_and_ends_with_the_same_bytes(
    work, model, threshold, recaptioned, tmp_path, forked
):
    arguments = _before(work, model, threshold, tmp_path / "table")
    for step in (8, 17, 19):
        answer = forked(arguments, kill_at_step=step)
        assert answer["status"] == -signal.SIGKILL, answer["printed"]
    answer = forked(arguments)
    assert answer["status"] == 0, answer["printed"]
    assert _files(tmp_path / "table") == _files(recaptioned)


def test_another_captioner_or_choice_of_samples_is_refused(
    work, model, threshold, recaptioned, capsys
):
    before = _files(recaptioned)
    assert main([*_before(work, model, threshold, recaptioned), "--beams", "4"]) == 2
    assert "captioner" in capsys.readouterr().err
    assert main(_before(work, model, threshold + 0.5, recaptioned)) == 2
    assert "samples" in capsys.readouterr().err
    assert _files(recaptioned) == before


def test_another_encoder_than_that_of_the_images_is_refused(
    work, model, threshold, tmp_path, capsys
):
    from infogrowth.blip.pretrained import load_blip

    blip, tokenizer, _ = load_blip(model, BlipPretrain)
    blip.text_proj.bias.data.add_(0.1)
    save_folder(blip, tmp_path / "other", tokenizer)
    more = ["--encoder", str(tmp_path / "other")]
    assert main(_before(work, model, threshold, tmp_path / "table", *more)) == 2
    assert "space" in capsys.readouterr().err
    assert not (tmp_path / "table").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--captions"),
        (["--features", "F", "--growth", "G"], "both"),
        (["--growth", "G", "--all"], "--all"),
        (["--features", "F", "--min-align", "auto"], "seeds"),
        (["--features", "F", "--beams", "0"], "--beams"),
        (["--features", "/nowhere"], "/nowhere"),
        (["--growth", "/nowhere"], "/nowhere"),
        (["--captions", "/nowhere.json"], "/nowhere.json"),
        (["--features", "F", "--min-align", "high"], "min_align"),
    ],
)
def test_wrong_options_are_one_sentence(arguments, message, tmp_path, capsys):
    assert main(["recaption", "--output", str(tmp_path / "table"), *SHORT, *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_captions_without_an_encoder_ask_for_one(tmp_path, capsys):
    (tmp_path / "captions.json").write_text('[{"image": "a", "caption": "a boat"}]')
    arguments = ["--captions", str(tmp_path / "captions.json")]
    assert main(["recaption", "--output", str(tmp_path / "table"), *SHORT, *arguments]) == 2
    assert "--encoder" in capsys.readouterr().err
