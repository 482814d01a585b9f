"""scripts/cc3m_lmdb_writer.py: every layout, bad samples, SIGKILL at any moment, bad arguments."""

import importlib.util
import json
import multiprocessing
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tarfile
import threading
from pathlib import Path

import lmdb
import pytest
from drawn_images import drawn, encoded, jpeg
from layouts import LAYOUTS, add_member, write_files, write_flat, write_parquet, write_webdataset
from tqdm import tqdm

import infogrowth.data.image_stores as image_stores
from infogrowth.annotations import load_annotations
from infogrowth.cli import run_script
from infogrowth.data.datasets import PairDataset
from infogrowth.data.image_stores import LmdbImages, LmdbWriter
from infogrowth.data.transforms import EvaluationTransform

SCRIPT = Path(__file__).parents[2] / "scripts" / "cc3m_lmdb_writer.py"


def load_script():
    spec = importlib.util.spec_from_file_location("cc3m_lmdb_writer", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


WRITER = load_script()


def write(*arguments: object) -> int:
    return run_script(WRITER.Config, WRITER.run, [*map(str, arguments), "--quiet"])


def stored(path: Path) -> dict[str, bytes]:
    with lmdb.open(str(path), readonly=True, lock=False) as env, env.begin() as transaction:
        return {key.decode(): value for key, value in transaction.cursor()}


def results(folder: Path, split: str = "train") -> tuple:
    """All that a run leaves behind, to the byte."""
    assert not list(folder.glob("*.tmp-*"))
    return (
        stored(folder / f"lmdb_{split}"),
        (folder / f"cc3m_{split}.json").read_bytes(),
        (folder / f"lmdb_{split}_skipped.jsonl").read_bytes(),
    )


def skipped(folder: Path, split: str = "train") -> dict[str, str]:
    lines = (folder / f"lmdb_{split}_skipped.jsonl").read_text().splitlines()
    return {row["id"]: row["reason"] for row in map(json.loads, lines)}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_train_and_val_of_every_layout_are_packed(tmp_path, pairs, layout, capsys):
    """Trap 1: keys without extension, annotations really written, readable by the training set."""
    train, val = dict(list(pairs.items())[:8]), dict(list(pairs.items())[8:])
    LAYOUTS[layout](tmp_path / "cc3m_train", train)
    write_flat(tmp_path / "cc3m_val", val)
    before = set((tmp_path / "cc3m_train").rglob("*"))
    assert write("--image_root", tmp_path) == 0
    for split, part in (("train", train), ("val", val)):
        images, annotations, losses = results(tmp_path, split)
        assert images == {key: data for key, (data, _) in part.items()}
        assert json.loads(annotations) == [
            {"image": key, "caption": caption} for key, (_, caption) in part.items()
        ]
        assert losses == b""
    assert set((tmp_path / "cc3m_train").rglob("*")) == before
    assert "8 samples, 8 packed, 0 skipped" in capsys.readouterr().out
    dataset = PairDataset(
        load_annotations(tmp_path / "cc3m_train.json"),
        tmp_path / "lmdb_train",
        EvaluationTransform(16),
    )
    assert [dataset[row]["replaced"] for row in range(8)] == [0] * 8


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_root_that_is_one_layout_is_the_training_set(tmp_path, pairs, layout):
    LAYOUTS[layout](tmp_path / "root", pairs)
    root_json = set((tmp_path / "root").glob("*.json"))
    assert write("--image_root", tmp_path / "root") == 0
    downloaded = layout in ("files", "webdataset", "parquet")
    folder = tmp_path / "root" / "packed" if downloaded else tmp_path / "root"
    first = results(folder)
    assert len(first[0]) == 12
    if downloaded:  # the downloader would stumble over another JSON file there
        assert set((tmp_path / "root").glob("*.json")) == root_json
    assert write("--image_root", tmp_path / "root") == 0  # its own results do not confuse it
    assert results(folder) == first


def test_results_may_go_elsewhere_but_not_into_the_downloaders_folder(tmp_path, pairs, capsys):
    write_webdataset(tmp_path / "root", pairs)
    assert write("--image_root", tmp_path / "root", "--output_root", tmp_path / "out" / "x") == 0
    assert len(results(tmp_path / "out" / "x")[0]) == 12
    assert write("--image_root", tmp_path / "root", "--output-root", tmp_path / "root") == 2
    assert "downloader" in capsys.readouterr().err


def bad_dataset(folder: Path) -> dict[str, str]:
    """A flat folder with every per-sample problem; returns the reason to expect by id."""
    folder.mkdir(parents=True)
    good = jpeg(100)

    def pair(name: str, data: bytes, caption: str | None = "words") -> None:
        (folder / name).write_bytes(data)
        if caption is not None:
            stem = name.rsplit(".", 1)[0]
            (folder / f"{stem}.json").write_text(json.dumps({"caption": caption}))

    for number in range(5):
        pair(f"good{number}.jpg", jpeg(number))
    pair("good5.png", encoded(drawn(5), "PNG"))
    pair("empty.jpg", b"")
    pair("truncated.jpg", good[: len(good) // 2])
    pair("html.jpg", b"<html>not found</html>")
    pair("giant.png", encoded(drawn(1).resize((400, 300)), "PNG"))
    pair("nocaption.jpg", good, None)
    pair("blank.jpg", good, "  ")
    pair("twice.jpg", jpeg(6))
    pair("twice.png", encoded(drawn(7), "PNG"))
    pair("badjson.jpg", good, None)
    (folder / "badjson.json").write_text("{")
    (folder / "orphan.json").write_text(json.dumps({"caption": "no image"}))
    return {
        "empty": "the image is empty",
        "truncated": "the image is truncated or corrupt",
        "html": "not an image in a format that is read: HTML",
        "giant": "the image has more than 100000 pixels",
        "nocaption": "the caption is missing or empty",
        "blank": "the caption is missing or empty",
        "twice": "the id occurred before: the first one is kept",
        "badjson": "the .json beside the image is not valid JSON",
        "orphan": "there is no image of this name",
    }


def test_bad_samples_are_skipped_recorded_and_counted(tmp_path, capsys):
    expected = bad_dataset(tmp_path / "cc3m_train")
    assert write("--image_root", tmp_path, "--max_pixels", 100_000) == 0
    images, annotations, _ = results(tmp_path)
    assert sorted(images) == [*(f"good{n}" for n in range(6)), "twice"]
    assert images["twice"] == jpeg(6)
    assert [a["image"] for a in json.loads(annotations)] == sorted(images)
    found = skipped(tmp_path)
    assert set(found) == set(expected)
    assert all(found[name].startswith(reason) for name, reason in expected.items())
    out = capsys.readouterr().out
    assert "16 samples, 7 packed, 9 skipped" in out
    assert "       2  the caption is missing or empty" in out


def test_failed_downloads_are_counted(tmp_path, pairs, capsys):
    failed = {"000000002": "failed_to_download", "000000009": "failed_to_resize"}
    write_parquet(tmp_path / "cc3m_train", pairs, failed)
    assert write("--image_root", tmp_path) == 0
    assert skipped(tmp_path) == {
        "000000002": "the download failed",
        "000000009": "the image could not be resized when it was downloaded",
    }
    assert "12 samples, 10 packed, 2 skipped" in capsys.readouterr().out


def test_names_too_long_for_a_file_are_skipped(tmp_path, jpegs):
    (tmp_path / "a.jpg").write_bytes(jpegs["000000000"])
    lines = [{"file_name": name, "text": "x"} for name in ("a.jpg", "b" * 600 + ".jpg")]
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    assert write("--image_root", tmp_path) == 0
    assert skipped(tmp_path) == {"b" * 600: "the file that the metadata names is missing"}


def test_ids_too_long_for_a_key_are_skipped(tmp_path, jpegs):
    """In a tar a name may be longer than LMDB's 511 bytes."""
    with tarfile.open(tmp_path / "0.tar", "w") as tar:
        for name in ("a", "b" * 600):
            add_member(tar, f"{name}.jpg", jpegs["000000000"])
            add_member(tar, f"{name}.txt", b"words")
    assert write("--image_root", tmp_path) == 0
    assert list(stored(tmp_path / "packed" / "lmdb_train")) == ["a"]
    assert skipped(tmp_path / "packed") == {"b" * 600: "the id is longer than 511 bytes"}


# --- killed at any moment -----------------------------------------------------------------------


def _run_and_die(arguments: list[object], moment: int | None, count) -> None:
    """In a child process: run, and be killed at the ``moment``-th function call."""
    image_stores._MAX_BATCH_COUNT = 5  # many commits for few images
    # The progress bar's lock is shared with the parent: a child killed under it would leave it
    # locked for all that follow.
    tqdm.set_lock(threading.RLock())
    calls = 0

    def on_call(frame, event, argument):
        nonlocal calls
        calls += 1
        if calls == moment:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - until the process ends
    sys.setprofile(on_call)
    status = write(*arguments)
    sys.setprofile(None)
    count.value = calls
    os._exit(status)


def run_until(arguments: list[object], moment: int | None = None) -> tuple[int, int]:
    """Exit status (-9 if it was killed) and the number of calls it made."""
    context = multiprocessing.get_context("fork")
    count = context.Value("q", 0)
    child = context.Process(target=_run_and_die, args=(arguments, moment, count))
    child.start()
    child.join()
    return child.exitcode, count.value


@pytest.fixture(scope="module")
def doubtful(tmp_path_factory):
    """Pairs, bad ones and duplicates, and what an uninterrupted run makes of them."""
    root = tmp_path_factory.mktemp("doubtful")
    bad_dataset(root / "cc3m_train")
    for number in range(60):
        (root / "cc3m_train" / f"more{number:03d}.jpg").write_bytes(jpeg(200 + number))
        (root / "cc3m_train" / f"more{number:03d}.txt").write_text(f"more {number}")
    # The first of the two is corrupt, so the second one counts.
    (root / "cc3m_train" / "later.jpg").write_bytes(jpeg(9)[:300])
    (root / "cc3m_train" / "later.png").write_bytes(encoded(drawn(9), "PNG"))
    (root / "cc3m_train" / "later.txt").write_text("the png is the good one")
    output = root / "uninterrupted"
    status, calls = run_until(["--image_root", root, "--output_root", output, "--workers", 2])
    assert status == 0
    found = results(output)
    assert found[0]["later"] == encoded(drawn(9), "PNG")
    return root, calls, found


@pytest.mark.parametrize("seed", range(12))
def test_a_run_killed_at_a_random_moment_continues_to_the_same_bytes(doubtful, tmp_path, seed):
    root, calls, expected = doubtful
    arguments = ["--image_root", root, "--output_root", tmp_path / "out", "--workers", 2]
    # Calls differ a little between runs (threads take turns), so the very end is left out.
    moment = random.Random(seed).randrange(1, int(calls * 0.97))
    assert run_until(arguments, moment)[0] == -signal.SIGKILL
    assert run_until(arguments)[0] == 0
    assert results(tmp_path / "out") == expected


def test_a_run_killed_again_and_again_gets_there(doubtful, tmp_path):
    root, calls, expected = doubtful
    arguments = ["--image_root", root, "--output_root", tmp_path / "out", "--workers", 1]
    kills = 0
    for attempt in range(1, 40):
        status, _ = run_until(arguments, moment=calls * attempt // 12)
        if status == 0:
            break
        assert status == -signal.SIGKILL
        kills += 1
    assert kills >= 3 and results(tmp_path / "out") == expected


def test_what_was_packed_is_not_decoded_again(tmp_path, pairs, capsys, monkeypatch):
    write_files(tmp_path / "cc3m_train", pairs)
    assert write("--image_root", tmp_path) == 0
    monkeypatch.setattr("infogrowth.commands.pack.decode_image", lambda *_: pytest.fail("decoded"))
    assert write("--image_root", tmp_path) == 0
    assert "12 packed (12" in capsys.readouterr().out


def test_a_dataset_that_has_grown_is_packed_further(tmp_path, pairs):
    write_flat(tmp_path / "cc3m_train", dict(list(pairs.items())[4:]))
    assert write("--image_root", tmp_path) == 0
    write_flat(tmp_path / "cc3m_train", pairs)
    assert write("--image_root", tmp_path) == 0
    images, annotations, _ = results(tmp_path)
    assert images == {key: data for key, (data, _) in pairs.items()}
    assert [a["image"] for a in json.loads(annotations)] == list(pairs)


# --- errors -------------------------------------------------------------------------------------


def test_an_lmdb_of_other_images_is_left_alone(tmp_path, pairs, capsys):
    write_flat(tmp_path / "cc3m_train", pairs)
    with LmdbWriter(tmp_path / "lmdb_train") as writer:
        writer.put("unexpected", b"x")
    assert write("--image_root", tmp_path) == 2
    assert "unexpected" in capsys.readouterr().err
    assert stored(tmp_path / "lmdb_train") == {"unexpected": b"x"}
    assert not (tmp_path / "cc3m_train.json").exists()


def test_an_image_that_was_encoded_anew_replaces_the_one_that_is_stored(tmp_path, pairs, capsys):
    write_flat(tmp_path / "cc3m_train", pairs)
    assert write("--image_root", tmp_path) == 0
    before = results(tmp_path)
    (tmp_path / "cc3m_train" / "000000003.jpg").write_bytes(jpeg(77))
    assert write("--image_root", tmp_path) == 0
    assert "(1 anew" in capsys.readouterr().out
    images, *others = results(tmp_path)
    assert images == {**before[0], "000000003": jpeg(77)} and tuple(others) == before[1:]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--image_root", "nowhere"], "nowhere"),
        ([], "image_root"),
        (["--image_root", "."], "no image–caption pairs"),
        (["--image_root", ".", "--workers", "0"], "at least 1"),
        (["--image_root", ".", "--workers", "many"], "workers"),
        (["--image_root", ".", "--max_pixels", "0"], "at least 1"),
        (["--image_root", ".", "--max_pixels", "big"], "max-pixels"),
    ],
)
def test_bad_arguments_give_one_sentence(tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    assert write(*arguments) == 2
    error = capsys.readouterr().err
    assert message in error and error.startswith("error: ") and error.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_a_bad_val_folder_is_found_before_train_is_packed(tmp_path, pairs, capsys):
    write_flat(tmp_path / "cc3m_train", pairs)
    (tmp_path / "cc3m_val").mkdir()
    assert write("--image_root", tmp_path) == 2
    assert "cc3m_val" in capsys.readouterr().err
    assert not (tmp_path / "lmdb_train").exists()


def test_a_dataset_without_one_good_sample_is_an_error(tmp_path, capsys):
    (tmp_path / "x.jpg").write_bytes(b"no image")
    (tmp_path / "x.txt").write_text("words")
    assert write("--image_root", tmp_path) == 2
    assert "no sample of" in capsys.readouterr().err
    assert skipped(tmp_path) == {"x": "not an image that can be read"}


def test_a_full_disk_keeps_what_was_packed_and_the_next_run_continues(tmp_path):
    """The whole program in a process of its own; a file size limit stands in for the full disk."""
    folder = tmp_path / "cc3m_train"
    folder.mkdir()
    for number in range(40):
        data = encoded(drawn(number, (320, 240)), "BMP")  # 230 kB each
        (folder / f"{number:03d}.bmp").write_bytes(data)
        (folder / f"{number:03d}.txt").write_text("words")
    command = [sys.executable, str(SCRIPT), "--image_root", str(tmp_path)]
    limit = 4 << 20
    full = subprocess.run(
        command,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
        capture_output=True,
        text=True,
    )
    assert full.returncode == 2, full.stderr
    assert "error: the LMDB" in full.stderr and "Traceback" not in full.stderr
    assert not (tmp_path / "cc3m_train.json").exists()
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "40 samples, 40 packed" in done.stdout
    assert "lmdb_train: 100%" in done.stderr  # the progress bar
    assert len(list(LmdbImages(tmp_path / "lmdb_train").keys())) == 40
    shutil.rmtree(tmp_path / "lmdb_train")
