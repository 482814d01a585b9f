"""train/*.py as a user runs them: files in, files out, killed, on two ranks, and wrong."""

import dataclasses
import io
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image, ImageDraw

from infogrowth.annotations import save_annotations
from infogrowth.blip import model as blip_model
from infogrowth.blip import momentum, vision, weights
from infogrowth.blip.config import _PRESETS
from infogrowth.blip.model import BlipDual
from infogrowth.blip.pretrained import load_blip
from infogrowth.blip.retrieval import BlipRetrieval
from infogrowth.blip.text import tokenize
from infogrowth.cli import run_script
from infogrowth.config import load_config
from infogrowth.data.datasets import RetrievalEvaluation
from infogrowth.data.image_stores import LmdbWriter
from infogrowth.data.transforms import EvaluationTransform
from infogrowth.errors import UserError
from infogrowth.evaluation.retrieval import recall_table
from infogrowth.training.checkpoints import latest, load_checkpoint
from train.pretrain_gain import PretrainConfig, pretrain
from train.train_retrieval import RetrievalConfig, train_or_evaluate

COLOURS = ("red", "green", "blue", "yellow", "black", "white")
SHAPES = ("circle", "square", "line")


def drawing(number):
    """A coloured shape as PNG bytes, and what it is called."""
    colour, shape = COLOURS[number % 6], SHAPES[number // 6 % 3]
    image = Image.new("RGB", (40, 40), "grey")
    draw = ImageDraw.Draw(image)
    box = (6 + number % 5, 8, 30, 32 - number % 3)
    {"circle": draw.ellipse, "square": draw.rectangle, "line": draw.line}[shape](box, fill=colour)
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue(), f"a {colour} {shape}"


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Drawings in an LMDB and in a folder, annotations with gains, a vocabulary."""
    root = tmp_path_factory.mktemp("world")
    (root / "images").mkdir()
    annotations, retrieval = [], []
    with LmdbWriter(root / "lmdb") as writer:
        for number in range(18):
            data, caption = drawing(number)
            writer.put(f"{number:04d}", data)
            (root / "images" / f"{number:04d}.png").write_bytes(data)
            gains = [0.1 + number / 18, 0.5]
            annotations.append({"image": f"x/{number:04d}.jpg", "caption": caption, "gains": gains})
            retrieval.append({"image": f"{number:04d}.png", "caption": [caption, caption[2:]]})
    save_annotations(root / "grown.json", annotations)
    (root / "val.json").write_text(json.dumps(retrieval))
    pairs = [
        {"image": entry["image"], "caption": text, "image_id": entry["image"]}
        for entry in retrieval
        for text in entry["caption"]
    ]
    (root / "train.json").write_text(json.dumps(pairs))
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", *COLOURS, *SHAPES]
    (root / "vocab.txt").write_text("\n".join(words) + "\n")
    return root


def options(world, output, **changes):
    """A pretraining of seconds."""
    return {
        "annotations": str(world / "grown.json"), "images": str(world / "lmdb"),
        "vocabulary": str(world / "vocab.txt"), "output_dir": str(output), "vit": "tiny",
        "vision_stem": "patch",  # what a BatchNorm sees depends on the number of ranks
        "image_size": 16, "vision_init": "random", "text_init": "random", "max_length": 8,
        "batch_size": 4, "queue_size": 10, "max_epoch": 3, "warmup_steps": 2, "num_workers": 0,
        "log_every": 1, "checkpoint_every": 2, "device": "cpu", "tensorboard": False, **changes,
    }  # fmt: skip


def flags(values):
    """The options as command line flags, in the spelling of BLIP's scripts."""
    given = []
    for key, value in values.items():
        if isinstance(value, bool):
            given.append(f"--{key}" if value else f"--no-{key}")
        else:
            given += [f"--{key}", str(value)]
    return given


def environment():
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}


def program(repository, name, values, launcher=()):
    command = [sys.executable, *launcher, str(repository / "train" / name), *flags(values)]
    return subprocess.run(command, capture_output=True, text=True, env=environment())


def assert_same_weights(one, other, tolerance=0.0):
    one, other = load_checkpoint(one), load_checkpoint(other)
    assert one["progress"] == other["progress"] or tolerance
    for name, value in one["model"].items():
        assert torch.allclose(value, other["model"][name], rtol=0, atol=tolerance), name


@pytest.fixture(scope="module")
def uninterrupted(world, tmp_path_factory):
    """A whole run in this process."""
    output = tmp_path_factory.mktemp("uninterrupted") / "run"
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    assert pretrain(PretrainConfig(**options(world, output))) == 0
    torch.set_num_threads(threads)
    return output


def test_killed_with_sigkill_it_resumes_to_the_same_bits(
    read_log, repository, world, tmp_path, uninterrupted
):
    output = tmp_path / "killed"
    command = [sys.executable, str(repository / "train" / "pretrain_gain.py")]
    command += flags(options(world, output))
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment()) as process:
        for line in process.stderr:  # blocks until the program has logged its third step
            if " step 3 " in line:
                process.send_signal(signal.SIGKILL)
                break
        process.wait()
    assert process.returncode == -signal.SIGKILL
    stopped_at = load_checkpoint(latest(output / "checkpoints"))["progress"]["step"]
    assert stopped_at < read_log(uninterrupted)[-1]["step"]
    done = program(repository, "pretrain_gain.py", options(world, output))
    assert done.returncode == 0, done.stderr
    assert f"step {stopped_at}" in done.stderr and "resumed" in done.stderr
    newest = [latest(path / "checkpoints") for path in (output, uninterrupted)]
    assert_same_weights(*newest)
    assert read_log(output) == read_log(uninterrupted)
    for name in ("model.safetensors", "config.json", "vocab.txt"):
        assert (output / "model" / name).read_bytes() == (
            uninterrupted / "model" / name
        ).read_bytes()


def test_two_ranks_train_on_what_one_process_trains_on(read_log, repository, world, tmp_path):
    """Batches of 2 on each of 2 ranks hold the rows of one process's batch of 4.

    Contrastive candidates and matching negatives come from a rank's own rows, as in BLIP, so those
    losses differ. The language loss (all captions are three words), the rate and the queue do not.
    """
    common = {"text_dropout": 0.0, "max_steps": 1, "sampler": "uniform"}
    values = options(world, tmp_path / "two", batch_size=2, num_workers=1, **common)
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")
    done = program(repository, "pretrain_gain.py", values, launcher)
    assert done.returncode == 0, done.stderr
    pretrain(PretrainConfig(**options(world, tmp_path / "one", batch_size=4, **common)))
    two, one = (read_log(tmp_path / name) for name in ("two", "one"))
    assert len(two) == len(one) == 1  # one line, although two ranks ran
    for key in ("epoch", "step", "samples_seen", "lr"):
        assert two[0][key] == one[0][key]
    assert two[0]["loss_lm"] == pytest.approx(one[0]["loss_lm"], rel=1e-5)
    both, alone = (
        load_checkpoint(latest(tmp_path / name / "checkpoints"))["model"] for name in ("two", "one")
    )
    assert both["queue_ptr"] == alone["queue_ptr"] == 4
    ranks_first = [0, 2, 1, 3]  # rank 0 takes positions 0 and 2
    for queue in ("image_queue", "text_queue"):
        assert torch.allclose(both[queue][:, :4], alone[queue][:, ranks_first], atol=1e-6)
    assert json.loads((tmp_path / "two" / "versions.json").read_text())["world_size"] == 2


def test_the_run_leaves_config_versions_and_a_model_that_loads(uninterrupted, world):
    versions = json.loads((uninterrupted / "versions.json").read_text())
    assert versions["torch"] == torch.__version__ and versions["world_size"] == 1
    again = load_config(PretrainConfig, uninterrupted / "config.yaml")
    assert again == PretrainConfig(**options(world, uninterrupted))
    model, tokenizer, report = load_blip(uninterrupted / "model", BlipDual)
    assert not report.missing and len(tokenizer) == 17
    checkpoint = latest(uninterrupted / "checkpoints")
    same, _, _ = load_blip(checkpoint, BlipDual)
    assert torch.equal(model.itm_head.weight, same.itm_head.weight)


def test_validation_is_logged_and_changes_nothing_of_the_training(
    read_log, world, tmp_path, uninterrupted
):
    values = options(
        world, tmp_path / "validated", validate_every=4, val_annotations=str(world / "val.json"),
        val_images=str(world / "images"),
    )  # fmt: skip
    pretrain(PretrainConfig(**{**values, "max_steps": 6}))
    pretrain(PretrainConfig(**values))  # resumed between two validations
    assert_same_weights(
        *(latest(p / "checkpoints") for p in (tmp_path / "validated", uninterrupted))
    )
    records = read_log(tmp_path / "validated")
    assert [r for r in records if r["kind"] != "val"] == read_log(uninterrupted)
    validations = [r for r in records if r["kind"] == "val"]
    last = read_log(uninterrupted)[-1]["step"]
    assert [r["step"] for r in validations] == sorted({*range(4, last + 1, 4), 6, last})
    # Only the cosines count: no text was matched with an image.
    model, tokenizer, _ = load_blip(tmp_path / "validated" / "model", BlipDual)
    images = RetrievalEvaluation(world / "val.json", str(world / "images"), EvaluationTransform(16))
    features = torch.stack([images[i]["image"] for i in range(18)])
    with torch.no_grad():
        cosine = model.encode_image(features)[1] @ (
            model.encode_text(*tokenize(tokenizer, images.texts, 8))[1].T
        )
    expected = recall_table(cosine.numpy(), cosine.T.numpy(), images.img2txt, images.txt2img)
    assert {key: validations[-1][key] for key in expected} == expected


def test_a_finished_run_started_again_does_nothing(uninterrupted, world):
    before = (uninterrupted / "log.jsonl").read_bytes()
    assert pretrain(PretrainConfig(**options(world, uninterrupted))) == 0
    assert (uninterrupted / "log.jsonl").read_bytes() == before


def test_compile_reaches_every_transformer(read_log, world, tmp_path, monkeypatch):
    """What torch.compile makes of them is torch's: the compiler itself takes a minute here."""
    compiled = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda module, **_: compiled.append(module))
    first = []
    for name, compile in (("compiled", True), ("plain", False)):
        values = options(world, tmp_path / name, compile=compile, max_steps=1, text_dropout=0.0)
        pretrain(PretrainConfig(**values))
        first.append(read_log(tmp_path / name)[0]["loss"])
    assert len(compiled) == 5  # image, text, their momentum encoders, decoder
    assert first[0] == pytest.approx(first[1], rel=1e-5)


def test_gradient_checkpointing_changes_memory_not_numbers(
    read_log, world, tmp_path, uninterrupted
):
    values = options(world, tmp_path / "ckpt", vit_grad_ckpt=True, vit_ckpt_layer=2, max_steps=2)
    pretrain(PretrainConfig(**values))
    plain, saving = (read_log(p)[:2] for p in (uninterrupted, tmp_path / "ckpt"))
    for one, other in zip(plain, saving, strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-5)


@pytest.fixture(scope="module")
def retrieval_options(world, uninterrupted):
    return {
        "images": str(world / "images"), "pretrained": str(uninterrupted / "model"),
        "val_annotations": str(world / "val.json"), "max_length": 8, "k_test": 100,
        "queue_size": 8, "batch_size_train": 6, "batch_size_test": 5, "num_workers": 0,
        "device": "cpu", "tensorboard": False, "log_every": 1, "init_lr": 1e-3,
    }  # fmt: skip


def test_fine_tuning_lowers_the_loss_keeps_the_best_epoch_and_resumes(
    read_log, world, tmp_path, retrieval_options, capsys
):
    def run(name, **changes):
        values = {**retrieval_options, "train_annotations": [str(world / "train.json")]}
        values |= {"output_dir": str(tmp_path / name), "max_epoch": 5, **changes}
        assert train_or_evaluate(RetrievalConfig(**values)) == 0
        return tmp_path / name

    whole = run("whole")
    run("parts", max_steps=8)
    parts = run("parts")
    assert_same_weights(*(latest(p / "checkpoints") for p in (parts, whole)))
    for name in ("best.json", "best.txt", "best_model/model.safetensors"):
        assert (parts / name).read_bytes() == (whole / name).read_bytes()
    epochs = [r for r in read_log(whole) if r["kind"] == "epoch"]
    means = [r["recall"]["val"]["r_mean"] for r in epochs]
    best = json.loads((whole / "best.json").read_text())
    assert best["val"]["r_mean"] == max(means)
    assert epochs[-1]["loss"] < epochs[0]["loss"]
    assert "val (chance)" in capsys.readouterr().out


def test_evaluation_prints_and_saves_the_recall_table(tmp_path, retrieval_options, capsys):
    def evaluate(name, **changes):
        values = {**retrieval_options, "output_dir": tmp_path / name, "evaluate": True, **changes}
        assert run_script(RetrievalConfig, train_or_evaluate, flags(values)) == 0
        return json.loads((tmp_path / name / "evaluation.json").read_text())["val"]

    table = evaluate("folder")
    printed = capsys.readouterr().out
    assert (tmp_path / "folder" / "evaluation.txt").read_text() == printed
    assert f"{table['txt_r5']:.2f}" in printed and "val (chance)" in printed
    run = Path(retrieval_options["pretrained"]).parent
    checkpoint = latest(run / "checkpoints")
    assert evaluate("checkpoint", pretrained=checkpoint) == table
    assert evaluate("karpathy", k_test=3) != table


def test_evaluation_reads_the_checkpoint_once_and_builds_no_momentum_encoder(
    tmp_path, retrieval_options, monkeypatch
):
    opened, built = [], []
    read, build = weights.safe_open, vision.build_vision

    def opening(path, *rest):
        opened.append(path)
        return read(path, *rest)

    monkeypatch.setattr(weights, "safe_open", opening)
    monkeypatch.setattr(
        blip_model, "build_vision", lambda *a, **k: built.append("vision") or build(*a, **k)
    )
    monkeypatch.setattr(momentum.MomentumBlip, "__init__", lambda *_: built.append("queues"))
    values = {**retrieval_options, "evaluate": True, "output_dir": str(tmp_path)}
    assert train_or_evaluate(RetrievalConfig(**values)) == 0
    assert len(opened) == 1 and built == ["vision"]


def test_an_official_checkpoint_is_evaluated(tmp_path, retrieval_options, world, monkeypatch):
    """A .pth with nothing but official names, as published; its preset must be named."""
    model, _, _ = load_blip(retrieval_options["pretrained"], BlipDual)
    monkeypatch.setitem(_PRESETS, "tiny", dataclasses.asdict(model.config))
    official = BlipRetrieval(model.config, queue_size=8)
    official.load_state_dict(model.state_dict(), strict=False)
    torch.save({"model": official.state_dict()}, tmp_path / "model_base_retrieval_coco.pth")
    tables = []
    for name, pretrained in (
        ("pth", tmp_path / "model_base_retrieval_coco.pth"),
        ("folder", retrieval_options["pretrained"]),
    ):
        values = {**retrieval_options, "pretrained": str(pretrained), "evaluate": True}
        values |= {"vit": "tiny", "image_size": 16, "vocabulary": str(world / "vocab.txt")}
        assert train_or_evaluate(RetrievalConfig(**values, output_dir=str(tmp_path / name))) == 0
        tables.append((tmp_path / name / "evaluation.json").read_text())
    assert tables[0] == tables[1]


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"annotations": "absent.json"}, "absent.json"),
        ({"images": "absent"}, "absent"),
        ({"resume": "absent.pth"}, "absent.pth"),
        ({"pretrained": "absent.pth"}, "absent.pth"),
        ({"vocabulary": "absent.txt"}, "absent.txt"),
        ({"vision_init": "auto"}, "published"),
    ],
)
def test_what_is_missing_is_one_clear_sentence(world, tmp_path, change, word):
    with pytest.raises(UserError, match=word) as caught:
        pretrain(PretrainConfig(**options(world, tmp_path / "x", **change)))
    assert "\n" not in str(caught.value)


def test_weights_that_need_a_network_are_one_clear_sentence(world, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(UserError) as caught:
        pretrain(PretrainConfig(**options(world, tmp_path / "x", text_init="bert-base-uncased")))
    assert "\n" not in str(caught.value) and "bert-base-uncased" in str(caught.value)


def test_a_key_that_is_not_in_the_lmdb_is_named_and_the_exit_status_is_2(world, tmp_path, capsys):
    entries = json.loads((world / "grown.json").read_text())
    entries[7]["image"] = "train/unknown_image.jpg"
    (tmp_path / "bad.json").write_text(json.dumps(entries))
    values = options(
        world, tmp_path / "x", annotations=tmp_path / "bad.json", sampler="uniform", num_workers=1
    )
    assert run_script(PretrainConfig, pretrain, flags(values)) == 2
    printed = capsys.readouterr().err
    assert "Traceback" not in printed
    last = printed.strip().splitlines()[-1]
    assert last.startswith("error: ") and "unknown_image" in last and "lmdb" in last


def test_annotations_without_gains_need_the_uniform_sampler(world, tmp_path):
    entries = json.loads((world / "grown.json").read_text())
    plain = [{k: v for k, v in entry.items() if k != "gains"} for entry in entries]
    (tmp_path / "plain.json").write_text(json.dumps(plain))
    values = options(world, tmp_path / "x", annotations=str(tmp_path / "plain.json"), max_steps=1)
    with pytest.raises(UserError, match="gains"):
        pretrain(PretrainConfig(**values))
    assert pretrain(PretrainConfig(**{**values, "sampler": "uniform"})) == 0


def test_evaluation_without_a_set_or_a_checkpoint_is_refused(tmp_path, retrieval_options):
    values = {**retrieval_options, "output_dir": str(tmp_path), "evaluate": True}
    with pytest.raises(UserError, match="--pretrained"):
        train_or_evaluate(RetrievalConfig(**{**values, "pretrained": None}))
    with pytest.raises(UserError, match="val_annotations"):
        train_or_evaluate(RetrievalConfig(**{**values, "val_annotations": None}))
