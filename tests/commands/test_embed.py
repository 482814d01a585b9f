"""`infogrowth embed`: what it writes, what it skips, and that nothing but the input decides it."""

import io
import json
import os
import shutil
import signal
import socket
import subprocess
import sys

import lmdb
import numpy as np
import pytest
import torch
from PIL import Image

from infogrowth.blip.config import preset
from infogrowth.blip.model import BlipDual
from infogrowth.blip.pretrained import save_folder
from infogrowth.blip.text import load_tokenizer
from infogrowth.cli import main
from infogrowth.data.features import open_features
from infogrowth.data.images import decode_image
from infogrowth.encoders.loading import load_encoder
from infogrowth.errors import UserError
from infogrowth.randomness import generator

PAIRS = 23
WORDS = ["a", "the", "red", "green", "blue", "cat", "dog", "boat", "on", "sea"]


def _jpeg(number: int) -> bytes:
    random = generator(number, "embed test picture")
    colors = random.integers(0, 256, (4, 5, 3), dtype=np.uint8)
    size = (40 + number, 30 + 2 * number)
    buffer = io.BytesIO()
    Image.fromarray(colors).resize(size, Image.Resampling.BICUBIC).save(buffer, "JPEG")
    return buffer.getvalue()


def _caption(number: int) -> str:
    return " ".join(generator(number, "embed test caption").choice(WORDS, 2 + number % 5))


def _make_encoder(folder, seed=0):
    folder.mkdir()
    vocabulary = folder / "words.txt"
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
    vocabulary.write_text("".join(f"{word}\n" for word in words))
    tokenizer = load_tokenizer(vocabulary)
    config = preset("tiny", image_size=32, vision_depth=2, text_depth=2, embed_dim=64)
    config = config.with_tokenizer(tokenizer)
    model = BlipDual(config, seed=seed)
    for parameter in model.parameters():  # features that differ from image to image
        if parameter.dim() > 1:
            parameter.data.mul_(5)
    save_folder(model, folder, tokenizer)
    return folder


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    return _make_encoder(tmp_path_factory.mktemp("model") / "blip")


def _write_lmdb(path, images):
    with lmdb.open(str(path), map_size=1 << 24) as environment, environment.begin(write=True) as t:
        for name, data in images.items():
            t.put(name.encode(), data)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    """An LMDB of 23 images and their annotation JSON."""
    folder = tmp_path_factory.mktemp("dataset")
    _write_lmdb(folder / "lmdb", {f"{n:09d}": _jpeg(n) for n in range(PAIRS)})
    entries = [{"image": f"{n:09d}.jpg", "caption": _caption(n)} for n in range(PAIRS)]
    (folder / "pairs.json").write_text(json.dumps(entries))
    return folder


def _arguments(dataset, encoder, output, *more):
    return ["embed", "--lmdb", str(dataset / "lmdb"), "--annotations", str(dataset / "pairs.json"),
            "--encoder", str(encoder), "--output", str(output), "--device", "cpu",
            "--shard-size", "5", "--batch-size", "2", "--quiet", *more]  # fmt: skip


@pytest.fixture(scope="module")
def embedded(dataset, encoder, tmp_path_factory):
    output = tmp_path_factory.mktemp("embedded") / "features"
    assert main(_arguments(dataset, encoder, output)) == 0
    return output


def _files(folder):
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def _read(folder):
    return next(open_features(folder).batches(10_000))


def test_features_are_those_of_the_encoder_in_annotation_order(embedded, encoder):
    model, batch = load_encoder(str(encoder)), _read(embedded)
    assert batch.ids == [f"{n:09d}.jpg" for n in range(PAIRS)]
    assert batch.captions == [_caption(n) for n in range(PAIRS)]
    for n in range(PAIRS):
        opened = Image.open(io.BytesIO(_jpeg(n))).convert("RGB")
        image = model.encode_images(model.preprocess(opened)[None])[0].numpy()
        text = model.encode_texts([_caption(n)])[0].numpy()
        np.testing.assert_allclose(batch.image[n], image, atol=5e-4)
        np.testing.assert_allclose(batch.text[n], text, atol=5e-4)
    # The features must differ between images, or the comparison above means little.
    assert (batch.image @ batch.image.T)[0, 1:].max() < 0.999


def test_shards_are_float16_unit_rows_in_the_clip_retrieval_layout(embedded):
    shards = sorted(path.name for path in (embedded / "img_emb").iterdir())
    assert shards == [f"img_emb_{i}.npy" for i in range(5)]
    rows = np.load(embedded / "text_emb" / "text_emb_4.npy")
    assert rows.dtype == np.float16
    assert rows.shape == (3, 64)
    np.testing.assert_allclose(np.linalg.norm(rows.astype(np.float32), axis=1), 1, atol=1e-3)


def test_features_json_records_where_they_come_from(embedded, encoder, dataset):
    description = json.loads((embedded / "features.json").read_text())
    assert description["finished"] is True
    assert description["pairs"] == PAIRS
    assert description["skipped"] == {}
    assert description["shards"] == 5
    assert description["images"] == str(dataset / "lmdb")
    assert description["annotations"] == str(dataset / "pairs.json")
    fingerprint = load_encoder(str(encoder)).fingerprint
    assert description["encoder"] == {
        "name": str(encoder), "fingerprint": fingerprint, "dimension": 64,
    }  # fmt: skip


@pytest.mark.parametrize("more", [("--workers", "2"), ("--config", "embed.yaml")])
def test_workers_and_a_config_file_change_no_byte(more, dataset, encoder, embedded, tmp_path):
    (tmp_path / "embed.yaml").write_text("workers: 1\nencoder: nonsense\n")
    more = [str(tmp_path / part) if part.endswith(".yaml") else part for part in more]
    assert main(_arguments(dataset, encoder, tmp_path / "features", *more)) == 0
    assert _files(tmp_path / "features") == _files(embedded)


def test_the_number_of_threads_changes_no_byte(dataset, encoder, embedded, tmp_path):
    threads = torch.get_num_threads()
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            assert main(_arguments(dataset, encoder, tmp_path / str(count))) == 0
            assert torch.get_num_threads() == count
            assert _files(tmp_path / str(count)) == _files(embedded)
    finally:
        torch.set_num_threads(threads)


def test_two_ranks_write_the_same_bytes_as_one(dataset, encoder, embedded, tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
               "-m", "infogrowth",
               *_arguments(dataset, encoder, tmp_path / "features")]  # fmt: skip
    ran = subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.count("written:") == 1
    assert _files(tmp_path / "features") == _files(embedded)


def test_parts_of_independent_jobs_make_the_same_bytes(
    dataset, encoder, embedded, tmp_path, capsys
):
    arguments = _arguments(dataset, encoder, tmp_path / "features")
    assert main([*arguments, "--part", "2/2"]) == 0
    assert "part" in capsys.readouterr().out
    with pytest.raises(UserError, match="finished"):
        open_features(tmp_path / "features")
    assert main([*arguments, "--part", "1/2"]) == 0
    assert "written:" in capsys.readouterr().out
    assert _files(tmp_path / "features") == _files(embedded)


def test_nodes_that_share_no_disk_are_refused_before_any_work(dataset, encoder, tmp_path):
    """Two ranks whose relative --output lies in different folders, as on two nodes' own disks."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    common = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port,
              "OMP_NUM_THREADS": "1"}  # fmt: skip
    processes = []
    for rank in ("0", "1"):
        (tmp_path / rank).mkdir()
        processes.append(
            subprocess.Popen(
                [sys.executable, "-m", "infogrowth", *_arguments(dataset, encoder, "features")],
                cwd=tmp_path / rank,
                stderr=subprocess.PIPE,
                text=True,
                env={**os.environ, **common, "RANK": rank, "LOCAL_RANK": rank},
            )
        )
    errors = [process.communicate(timeout=120)[1] for process in processes]
    assert processes[0].returncode == 2 and processes[1].returncode in (1, 2)
    assert "rank 1" in errors[0]
    assert not list(tmp_path.glob("*/features/img_emb/*"))


def test_killed_again_and_again_it_ends_with_the_same_bytes(
    dataset, encoder, embedded, tmp_path, forked
):
    output = tmp_path / "features"
    # Steps are fsyncs and renames: 3 for the description (once), then 15 for a shard's five files,
    # the last of which marks it as finished. A run may die early, late, or within the last file.
    for step in (1, 3, 11, 17, 18, 20):
        answer = forked(_arguments(dataset, encoder, output), kill_at_step=step)
        assert answer["status"] == -signal.SIGKILL, answer["printed"]
    assert json.loads((output / "features.json").read_text())["finished"] is False
    done = len(list((output / "finished").iterdir()))
    assert 0 < done < 5
    first = (output / "img_emb" / "img_emb_0.npy").stat().st_mtime_ns
    answer = forked(_arguments(dataset, encoder, output))
    assert answer["status"] == 0, answer["printed"]
    assert _files(output) == _files(embedded)
    assert (output / "img_emb" / "img_emb_0.npy").stat().st_mtime_ns == first


def test_a_finished_folder_is_left_alone(dataset, encoder, embedded, tmp_path, capsys):
    shutil.copytree(embedded, tmp_path / "features")
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "features").rglob("*")}
    assert main(_arguments(dataset, encoder, tmp_path / "features")) == 0
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "features").rglob("*")} == before
    assert "pairs/s" not in capsys.readouterr().out


def test_a_shard_that_was_deleted_is_made_again(dataset, encoder, embedded, tmp_path):
    shutil.copytree(embedded, tmp_path / "features")
    (tmp_path / "features" / "text_emb" / "text_emb_2.npy").unlink()
    assert main(_arguments(dataset, encoder, tmp_path / "features")) == 0
    assert _files(tmp_path / "features") == _files(embedded)


def test_a_folder_of_another_encoder_is_refused_by_name(
    dataset, encoder, embedded, tmp_path, capsys
):
    other = _make_encoder(tmp_path / "other", seed=1)
    before = _files(embedded)
    assert main(_arguments(dataset, other, embedded)) == 2
    error = capsys.readouterr().err
    assert str(encoder) in error and str(other) in error
    assert _files(embedded) == before


def test_a_folder_of_other_annotations_or_another_split_is_refused(
    dataset, encoder, embedded, tmp_path, capsys
):
    entries = json.loads((dataset / "pairs.json").read_text())
    entries[3]["caption"] = "something else"
    (tmp_path / "pairs.json").write_text(json.dumps(entries))
    changed = ["--annotations", str(tmp_path / "pairs.json")]
    assert main([*_arguments(dataset, encoder, embedded), *changed]) == 2
    assert "annotation" in capsys.readouterr().err
    assert main([*_arguments(dataset, encoder, embedded), "--shard-size", "6"]) == 2
    assert "shard size" in capsys.readouterr().err


@pytest.mark.parametrize("lost", [None, 1], ids=["finished", "interrupted"])
def test_annotations_that_grew_cost_only_what_is_new(dataset, encoder, tmp_path, monkeypatch, lost):
    """The old samples keep their shards, the new ones come after, in the order of the file."""
    entries = json.loads((dataset / "pairs.json").read_text())
    (tmp_path / "pairs.json").write_text(json.dumps(entries[::2]))
    changed = ["--annotations", str(tmp_path / "pairs.json")]
    features = tmp_path / "features"
    assert main([*_arguments(dataset, encoder, features), *changed]) == 0
    if lost is not None:  # as if it had been killed before this shard
        (features / "finished" / f"{lost}.json").unlink()
        description = json.loads((features / "features.json").read_text())
        (features / "features.json").write_text(json.dumps(description | {"finished": False}))
    kept = [n for n in range(0, PAIRS, 2) if lost is None or n // 2 // 5 != lost]
    (tmp_path / "pairs.json").write_text(json.dumps(entries))
    decoded = []
    monkeypatch.setattr(
        "infogrowth.encoders.dataset.decode_image",
        lambda data: decoded.append(data) or decode_image(data),
    )
    arguments = [*_arguments(dataset, encoder, features), *changed]
    assert main(arguments) == 0
    assert len(decoded) == PAIRS - len(kept)
    before = _files(features)
    batch = _read(features)
    assert sorted(batch.ids) == [f"{n:09d}.jpg" for n in range(PAIRS)]
    whole = {name: row for row, name in enumerate(batch.ids)}
    model = load_encoder(str(encoder))
    for n in (0, 7, 8, 22):
        row = whole[f"{n:09d}.jpg"]
        assert batch.captions[row] == _caption(n)
        text = model.encode_texts([_caption(n)])[0].numpy()
        np.testing.assert_allclose(batch.text[row], text, atol=5e-4)
    assert main(arguments) == 0  # nothing left to do
    assert _files(features) == before
    assert len(decoded) == PAIRS - len(kept)


def test_a_sample_that_is_gone_is_no_growth(dataset, encoder, tmp_path, capsys):
    entries = json.loads((dataset / "pairs.json").read_text())
    (tmp_path / "pairs.json").write_text(json.dumps(entries[:9]))
    changed = ["--annotations", str(tmp_path / "pairs.json")]
    assert main([*_arguments(dataset, encoder, tmp_path / "features"), *changed]) == 0
    before = _files(tmp_path / "features")
    (tmp_path / "pairs.json").write_text(json.dumps(entries[1:]))
    assert main([*_arguments(dataset, encoder, tmp_path / "features"), *changed]) == 2
    assert "'000000000.jpg'" in capsys.readouterr().err
    assert _files(tmp_path / "features") == before


def test_bad_samples_are_skipped_recorded_and_counted(encoder, tmp_path, capsys):
    truncated = _jpeg(2)[: len(_jpeg(2)) // 2]
    giant = io.BytesIO()
    Image.new("1", (20_000, 10_000)).save(giant, "PNG")
    images = {
        "000": _jpeg(0), "001": _jpeg(1), "002": truncated, "003": b"<html>", "004": _jpeg(4),
        "005": _jpeg(5), "007": giant.getvalue(), "008": _jpeg(8), "009": b"",
    }  # fmt: skip
    _write_lmdb(tmp_path / "lmdb", images)
    entries = [
        {"image": "000.jpg", "caption": "a cat"},
        {"image": "001", "caption": ["", "the dog", "a boat"]},
        {"image": "002.jpg", "caption": "a cat"},
        {"image": "003.jpg", "caption": "a cat"},
        {"image": "004.jpg", "caption": "  "},
        {"image": "005.jpg"},
        {"image": "006.jpg", "caption": "not in the LMDB"},
        {"image": "007.jpg", "caption": "a cat"},
        {"image": "008.jpg", "caption": "the sea", "gains": ["0.5", "0.5"]},
        {"image": "009.jpg", "caption": "a cat"},
        {"caption": "no id"},
        "not an object",
    ]
    (tmp_path / "pairs.json").write_text(json.dumps(entries))
    assert main(_arguments(tmp_path, encoder, tmp_path / "features")) == 0
    batch = _read(tmp_path / "features")
    assert batch.ids == ["000.jpg", "001", "008.jpg"]
    assert batch.captions == ["a cat", "the dog", "the sea"]
    lines = (tmp_path / "features" / "skipped.jsonl").read_text().splitlines()
    skipped = {entry["id"]: entry["reason"] for entry in map(json.loads, lines)}
    assert list(skipped) == ["002.jpg", "003.jpg", "004.jpg", "005.jpg", "006.jpg", "007.jpg",
                             "009.jpg", "entry 10", "entry 11"]  # fmt: skip
    assert skipped["004.jpg"] == skipped["005.jpg"] == "the caption is missing or empty"
    assert skipped["006.jpg"] == "the image is missing"
    assert skipped["entry 10"] == "the entry has no image id"
    description = json.loads((tmp_path / "features" / "features.json").read_text())
    assert description["pairs"] == 3
    assert sum(description["skipped"].values()) == 9
    assert description["skipped"]["the caption is missing or empty"] == 2
    assert "the caption is missing or empty" in capsys.readouterr().out


def test_a_dataset_in_which_every_sample_is_bad_still_ends(encoder, tmp_path):
    _write_lmdb(tmp_path / "lmdb", {"000": b"nothing"})
    (tmp_path / "pairs.json").write_text(json.dumps([{"image": "000", "caption": "a cat"}]))
    assert main(_arguments(tmp_path, encoder, tmp_path / "features")) == 0
    assert np.load(tmp_path / "features" / "img_emb" / "img_emb_0.npy").shape == (0, 64)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{}", "list"),
        ("[]", "samples"),
        ('[{"image": "x",]', "JSON"),
    ],
)
def test_a_broken_annotation_file_is_one_sentence(
    content, message, dataset, encoder, tmp_path, capsys
):
    (tmp_path / "pairs.json").write_text(content)
    arguments = _arguments(dataset, encoder, tmp_path / "features")
    assert main([*arguments, "--annotations", str(tmp_path / "pairs.json")]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert str(tmp_path / "pairs.json") in error
    assert not (tmp_path / "features").exists()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--lmdb", "/nowhere/lmdb"], "/nowhere/lmdb"),
        (["--annotations", "/nowhere/pairs.json"], "/nowhere/pairs.json"),
        (["--encoder", "/nowhere/model"], "/nowhere/model"),
        (["--source", "/nowhere"], "--lmdb"),
        (["--batch-size", "0"], "--batch-size"),
        (["--workers", "-1"], "--workers"),
        (["--part", "4/3"], "--part"),
        (["--device", "tpu"], "device"),
    ],
)
def test_wrong_options_are_one_sentence(more, message, dataset, encoder, tmp_path, capsys):
    assert main([*_arguments(dataset, encoder, tmp_path / "features"), *more]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.startswith("error: ")
    assert error.count("\n") == 1


def test_an_output_that_holds_something_else_is_not_touched(dataset, encoder, tmp_path, capsys):
    (tmp_path / "features" / "img_emb").mkdir(parents=True)
    assert main(_arguments(dataset, encoder, tmp_path / "features")) == 2
    assert "something else" in capsys.readouterr().err


def test_help_does_not_wait_for_torch():
    check = (
        "import sys; from infogrowth.cli import main\n"
        "try: main(['embed', '--help'])\n"
        "except SystemExit: sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", check], capture_output=True).returncode == 0
