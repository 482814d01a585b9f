"""`infogrowth embed --source`: every layout of downloaded pairs gives the same features."""

import io
import json
import tarfile

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from drawn_images import jpeg
from layouts import LAYOUTS, add_member, write_webdataset
from PIL import Image

from infogrowth.blip.config import preset
from infogrowth.blip.pretrain import BlipPretrain
from infogrowth.blip.pretrained import save_folder
from infogrowth.blip.text import load_tokenizer
from infogrowth.cli import main
from infogrowth.data.features import open_features
from infogrowth.encoders.loading import load_encoder

WORDS = ["a", "the", "red", "green", "blue", "cat", "dog", "boat", "on", "sea"]
SHORT = ["--device", "cpu", "--quiet"]


PAIRS = {
    f"{number:09d}": (jpeg(number), f"{WORDS[number]} {WORDS[number - 1]}") for number in range(9)
}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
    (folder / "words.txt").write_text("".join(f"{word}\n" for word in words))
    tokenizer = load_tokenizer(folder / "words.txt")
    config = preset("tiny", image_size=32, vision_depth=1, text_depth=1).with_tokenizer(tokenizer)
    save_folder(BlipPretrain(config, queue_size=8), folder, tokenizer)
    return folder


def _tar(path, pairs):
    with tarfile.open(path, "w") as archive:
        for key, (data, caption) in pairs.items():
            add_member(archive, f"{key}.txt", caption.encode())
            add_member(archive, f"{key}.jpg", data)


def write_tars(folder):
    write_webdataset(folder, PAIRS)
    for path in folder.iterdir():
        if path.suffix != ".tar":
            path.unlink()


def _embed(source, model, output):
    return main(
        ["embed", "--source", str(source), "--encoder", str(model), "--output", str(output), *SHORT]
    )


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_gives_the_features_of_its_pairs(layout, model, tmp_path):
    LAYOUTS[layout](tmp_path / "source", PAIRS)
    assert _embed(tmp_path / "source", model, tmp_path / "features") == 0
    batch = next(open_features(tmp_path / "features").batches(100))
    assert batch.ids == list(PAIRS)
    assert batch.captions == [caption for _, caption in PAIRS.values()]
    encoder = load_encoder(str(model))
    for row, (data, caption) in enumerate(PAIRS.values()):
        image = encoder.preprocess(Image.open(io.BytesIO(data)).convert("RGB"))
        expected = encoder.encode_images(image[None])[0].numpy()
        np.testing.assert_allclose(batch.image[row], expected, atol=5e-4)
        np.testing.assert_allclose(
            batch.text[row], encoder.encode_texts([caption])[0].numpy(), atol=5e-4
        )


def test_a_source_that_grew_costs_only_what_is_new_unless_a_shard_changed(model, tmp_path, capsys):
    source = tmp_path / "source"
    write_tars(source)
    later = source / "00001.tar"
    later.rename(tmp_path / "later.tar")
    assert _embed(source, model, tmp_path / "features") == 0
    first = (tmp_path / "features" / "img_emb" / "img_emb_0.npy").read_bytes()
    (tmp_path / "later.tar").rename(later)
    assert _embed(source, model, tmp_path / "features") == 0
    batch = next(open_features(tmp_path / "features").batches(100))
    assert batch.ids == list(PAIRS)
    assert (tmp_path / "features" / "img_emb" / "img_emb_0.npy").read_bytes() == first
    assert _embed(source, model, tmp_path / "whole") == 0
    whole = next(open_features(tmp_path / "whole").batches(100))
    np.testing.assert_allclose(batch.image, whole.image, atol=5e-3)
    _tar(later, {key: (jpeg(50), "a cat" * 9000) for key in list(PAIRS)[6:]})
    assert _embed(source, model, tmp_path / "features") == 2
    assert "00001.tar" in capsys.readouterr().err


def test_a_tar_that_breaks_off_is_survived_and_counted(model, tmp_path):
    source = tmp_path / "source"
    write_tars(source)
    _tar(source / "00001.tar", {key: PAIRS[key] for key in reversed(list(PAIRS)[6:])})
    with tarfile.open(source / "00001.tar") as archive:
        break_at = archive.getmember("000000006.jpg").offset_data + 100
    whole = (source / "00001.tar").read_bytes()
    (source / "00001.tar").write_bytes(whole[:break_at])
    assert _embed(source, model, tmp_path / "features") == 0
    ids = next(open_features(tmp_path / "features").batches(100)).ids
    assert ids == [key for key in PAIRS if key != "000000006"]
    description = json.loads((tmp_path / "features" / "features.json").read_text())
    assert description["layout"] == "webdataset"
    assert description["pairs"] == len(ids)
    assert description["skipped"] == {
        "00001.tar breaks off in this sample": 1, "the tar is damaged or breaks off": 1,
    }  # fmt: skip


def test_failed_downloads_and_bad_images_are_counted(model, tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    data, caption = PAIRS["000000000"]
    _tar(
        source / "00000.tar",
        {"000000000": (data, caption), "000000001": (data[:200], "the boat"),
         "000000003": (data, " ")},
    )  # fmt: skip
    rows = {
        "key": ["000000000", "000000001", "000000002", "000000003"],
        "status": ["success", "success", "failed_to_download", "success"],
        "error_message": [None, None, "404", None],
    }
    pq.write_table(pa.table(rows), source / "00000.parquet")
    assert _embed(source, model, tmp_path / "features") == 0
    assert next(open_features(tmp_path / "features").batches(100)).ids == ["000000000"]
    lines = (tmp_path / "features" / "skipped.jsonl").read_text().splitlines()
    skipped = {entry["id"]: entry["reason"] for entry in map(json.loads, lines)}
    assert skipped["000000001"] == "the image is truncated or corrupt"
    assert skipped["000000002"] == "the download failed"
    assert skipped["000000003"] == "the caption is missing or empty"


@pytest.mark.parametrize("layout", ["webdataset", "imagefolder below train"])
def test_recaption_finds_the_images_of_a_source(layout, model, tmp_path):
    source = tmp_path / "source"
    LAYOUTS[layout](source, PAIRS)
    assert _embed(source, model, tmp_path / "features") == 0
    arguments = ["recaption", "--features", str(tmp_path / "features"), "--all", "--captioner",
                 str(model), "--output", str(tmp_path / "table"), "--beams", "1",
                 "--max-tokens", "4", *SHORT]  # fmt: skip
    assert main(arguments) == 0
    description = json.loads((tmp_path / "table" / "features.json").read_text())
    assert description["rows"] == 9
    assert set(description["skipped"]) <= {"the captioner gave no words"}
