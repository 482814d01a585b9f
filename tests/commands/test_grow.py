"""`grow` from the shell's point of view: the golden selection, continuing, retries, refusals."""

import fcntl
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from infogrowth.annotations import load_annotations, save_annotations
from infogrowth.commands.grow import Config
from infogrowth.config import load_config
from infogrowth.growth.ledger import read_growth


def flags(selection, output="out.json", growth="growth", **more):
    """The golden run's arguments; ``more`` are further flags."""
    arguments = ["--growth", selection.home / growth, "--output", selection.home / output]
    for name, value in more.items():
        arguments += [f"--{name.replace('_', '-')}", value]
    return arguments


@pytest.mark.parametrize("batch_size", [1, 7, 64, 4096])
def test_the_golden_selection_at_any_batch_size(selection, infogrowth, batch_size):
    stop = 1600 if batch_size > 1 else 500  # one by one is slow; the prefix shows as much
    inputs = flags(
        selection,
        features=selection.folder("stream", range(100, stop)),
        seed_features=selection.folder("seeds", range(100)),
        recaptions=selection.recaptions(),
        batch_size=batch_size,
    )
    status, _ = infogrowth("grow", *inputs)
    assert status == 0
    output = selection.home / "out.json"
    if stop == 1600:
        selection.check_golden(output)
        return
    kept = [row for row in selection.arrays["kept_rows"] if row < stop]
    annotations = load_annotations(output)
    assert [a["image"] for a in annotations] == [selection.expected["ids"][row] for row in kept]
    expected = selection.arrays["gains_exact"][: len(kept)]
    np.testing.assert_allclose([a["gains"] for a in annotations], expected, rtol=0, atol=1e-6)


def test_what_a_run_killed_while_writing_its_result_left_is_cleared_away(selection, infogrowth):
    inputs = flags(selection, features=selection.folder("stream", range(100, 160)))
    mine, others = (selection.home / f"{name}.json.tmp-1-ab" for name in ("out", "other"))
    mine.write_text("[half")
    others.write_text("[half")
    assert infogrowth("grow", *inputs)[0] == 0
    assert not mine.exists() and others.exists()


def test_new_data_later_continues_the_same_dataset(selection, infogrowth):
    table = selection.recaptions()
    first = selection.folder("first", range(100, 700))
    second = selection.folder("second", range(700, 1600))
    seeds = selection.folder("seeds", range(100))
    common = flags(selection, recaptions=table)
    assert infogrowth("grow", *common, "--features", first, "--seed-features", seeds)[0] == 0
    assert infogrowth("grow", *common, "--features", second)[0] == 0
    selection.check_golden(selection.home / "out.json")
    folder = read_growth(selection.home / "growth")
    assert [source.kind for source in folder.sources] == ["seed", "stream", "stream"]
    assert folder.totals["pairs"] == 1600
    assert folder.totals["dataset"] == len(selection.expected["kept_ids"])


def test_seed_ids_take_rows_of_the_features_first(selection, infogrowth):
    # The seeds lie behind the stream: taken out by id, they come first all the same.
    everything = selection.home / "all"
    seeds, stream = range(100), range(100, 1600)
    order = [*stream, *seeds]
    from_golden = {name: selection.arrays[name][order] for name in ("image_feat", "text_feat")}
    write_all(selection, everything, order, from_golden)
    seed_file = selection.home / "seeds.json"
    seed_file.write_text(json.dumps([selection.expected["ids"][row] for row in seeds]))
    inputs = flags(
        selection, features=everything, seed_ids=seed_file, recaptions=selection.recaptions()
    )
    assert infogrowth("grow", *inputs)[0] == 0
    selection.check_golden(selection.home / "out.json")
    folder = read_growth(selection.home / "growth")
    assert folder.totals["pairs"] == 1600  # the seeds are not processed a second time
    status, printed = infogrowth("grow", *inputs)
    assert status == 0
    assert "nothing new" in printed


def write_all(selection, folder, order, arrays):
    from_rows = {
        name: [selection.expected[name][row] for row in order] for name in ("ids", "captions")
    }
    for name, key in (("img_emb", "image_feat"), ("text_emb", "text_feat")):
        (folder / name).mkdir(parents=True)
        np.save(folder / name / f"{name}_0.npy", arrays[key])
    (folder / "metadata").mkdir()
    frame = pd.DataFrame({"image_path": from_rows["ids"], "caption": from_rows["captions"]})
    frame.to_parquet(folder / "metadata" / "metadata_0.parquet")


def test_the_same_command_again_has_nothing_to_do(selection, infogrowth):
    inputs = flags(selection, features=selection.folder("stream", range(300)))
    assert infogrowth("grow", *inputs)[0] == 0
    before = (selection.home / "out.json").read_bytes()
    manifest = (selection.home / "growth/manifest.json").read_bytes()
    status, printed = infogrowth("grow", *inputs)
    assert status == 0
    assert "nothing new in" in printed
    assert (selection.home / "out.json").read_bytes() == before
    assert (selection.home / "growth/manifest.json").read_bytes() == manifest


def test_a_moved_features_folder_is_known_by_its_content(selection, infogrowth):
    stream = selection.folder("stream", range(300))
    assert infogrowth("grow", *flags(selection, features=stream))[0] == 0
    moved = stream.rename(selection.home / "elsewhere")
    status, printed = infogrowth("grow", *flags(selection, features=moved))
    assert status == 0
    assert "nothing new in" in printed


def test_added_shards_go_on_where_the_stream_was_left(selection, infogrowth):
    stream = selection.folder("stream", range(400), shard_rows=200)
    whole = selection.folder("whole", range(800), shard_rows=200)
    assert infogrowth("grow", *flags(selection, features=stream))[0] == 0
    for kind in ("img_emb", "text_emb", "metadata"):
        for number in (2, 3):
            (file,) = (whole / kind).glob(f"*{number:02d}.*")
            os.link(file, stream / kind / file.name)
    assert infogrowth("grow", *flags(selection, features=stream))[0] == 0
    fresh = flags(selection, "fresh.json", "fresh", features=whole)
    assert infogrowth("grow", *fresh)[0] == 0
    grown = (selection.home / "out.json").read_bytes()
    assert grown == (selection.home / "fresh.json").read_bytes()
    assert len(read_growth(selection.home / "growth").sources) == 1


def test_dropped_samples_join_later_with_a_recaption_table(selection, infogrowth):
    stream = selection.folder("stream", range(600))
    assert infogrowth("grow", *flags(selection, features=stream))[0] == 0
    folder = read_growth(selection.home / "growth")
    dropped = folder.totals["dropped"]
    plain = [a["image"] for a in folder.annotations()]

    retry = flags(selection, features=stream, recaptions=selection.recaptions())
    status, message = infogrowth("grow", *retry)
    assert status == 0
    folder = read_growth(selection.home / "growth")
    decisions = folder.decisions().to_pandas()
    processed_again = decisions[decisions["source"] == 1]
    # Independently: which golden rows below 600 are recaptioned in a run with the table?
    rows = [row for row in selection.arrays["kept_rows"] if row < 600]
    recaptioned = selection.arrays["recaptioned"][: len(rows)]
    joined = [
        selection.expected["ids"][row] for row, new in zip(rows, recaptioned, strict=True) if new
    ]
    assert [a["image"] for a in folder.annotations()] == plain + joined
    assert list(processed_again[processed_again["verdict"] == "recaptioned"]["id"]) == joined
    assert set(processed_again["id"]) <= set(selection.expected["recap_ids"])
    assert 0 < len(joined) < len(processed_again) <= dropped
    assert re.search(rf"^samples still out +{600 - len(plain + joined)}$", message, re.MULTILINE)
    assert (processed_again["source_row"].diff().dropna() > 0).all()  # in their old order

    status, message = infogrowth("grow", *retry)
    assert status == 0
    assert "nothing new in" in message
    assert read_growth(selection.home / "growth").totals == folder.totals


def test_a_grown_recaption_table_processes_what_is_pending_once_more(selection, infogrowth):
    stream = selection.folder("stream", range(600))
    small, full = selection.recaptions("small", 20), selection.recaptions("full")
    for table in (small, full, small, full):
        assert infogrowth("grow", *flags(selection, features=stream, recaptions=table))[0] == 0
    folder = read_growth(selection.home / "growth")
    kinds = [source.kind for source in folder.sources]
    assert kinds == ["stream", "retry"]
    ids = [a["image"] for a in folder.annotations()]
    assert len(ids) == len(set(ids))
    verdicts = folder.decisions(["id", "verdict"]).to_pandas()
    assert (verdicts["verdict"] == "recaptioned").sum() == folder.totals["recaptioned"]


def test_every_sample_has_a_decision_with_its_neighbors(selection, infogrowth):
    inputs = flags(selection, features=selection.folder("stream", range(300)), batch_size=50)
    assert infogrowth("grow", *inputs, "--output", selection.home / "all.parquet")[0] == 0
    frame = pd.read_parquet(selection.home / "all.parquet")
    assert list(frame["id"]) == selection.expected["ids"][:300]
    assert list(frame["row"]) == list(range(300))
    unit = selection.arrays["image_feat"].astype(np.float64)[:300]
    unit /= np.linalg.norm(unit, axis=1, keepdims=True)
    kept = np.flatnonzero(frame["verdict"] != "dropped")
    for row in (3, 150, 299):
        before = kept[kept < row]
        distances = 1 - unit[before] @ unit[row]
        nearest = before[np.argsort(distances, kind="stable")[:4]]
        assert list(frame["image_neighbors"][row]) == list(frame["id"][nearest])
        np.testing.assert_allclose(
            frame["image_distances"][row], np.sort(distances)[:4], rtol=0, atol=1e-6
        )
        np.testing.assert_allclose(
            frame["gain_image"][row], np.sort(distances)[:4].mean(), rtol=0, atol=1e-6
        )
    features = np.load(selection.home / "growth/kept/image_000000.npy")
    np.testing.assert_allclose(features, unit[kept], rtol=0, atol=1e-6)


def test_auto_min_align_comes_from_the_seeds_and_stays(selection, infogrowth):
    inputs = flags(
        selection,
        features=selection.folder("stream", range(100, 400)),
        seed_features=selection.folder("seeds", range(100)),
        min_align="auto",
    )
    assert infogrowth("grow", *inputs)[0] == 0
    settings = read_growth(selection.home / "growth").settings
    assert settings["min_align_rule"].startswith("auto")
    # The golden seeds align at 0.4 and more, swapped captions near 0.
    assert 0.1 < settings["min_align"] < 0.6
    more = flags(selection, features=selection.folder("more", range(400, 500)), min_align="auto")
    assert infogrowth("grow", *more)[0] == 0
    assert read_growth(selection.home / "growth").settings == settings


@pytest.fixture
def noisy(feature_folder, tmp_path):
    """A features folder of 150 seeds and 1,350 samples, every fourth with another's caption."""
    random = np.random.default_rng(3)
    image = random.normal(size=(1500, 16)).astype(np.float32)
    text = (image + 0.8 * random.normal(size=image.shape)).astype(np.float32)
    wrong = np.flatnonzero((np.arange(1500) >= 150) & (np.arange(1500) % 4 == 0))
    text[wrong] = text[np.roll(wrong, 1)]
    ids = [f"s{row:04d}" for row in range(1500)]
    folder = feature_folder("noisy", ids=ids, captions=ids, image=image, text=text)
    (tmp_path / "seeds.json").write_text(json.dumps(ids[:150]))
    return folder, tmp_path / "seeds.json", {ids[row] for row in wrong.tolist()}


def test_a_purity_is_reached_recorded_and_kept_by_later_runs(noisy, infogrowth, tmp_path):
    features, seeds, wrong = noisy
    common = ("--features", features, "--growth", tmp_path / "g", "--output", tmp_path / "o.json")
    first = (*common, "--seed-ids", seeds, "--min-align", "auto:0.98")
    status, printed = infogrowth("grow", *first)
    assert status == 0
    kept = [entry["image"] for entry in load_annotations(tmp_path / "o.json")][150:]
    share = sum(name in wrong for name in kept) / len(kept)
    assert share == pytest.approx(0.02, abs=0.015)
    estimate = read_growth(tmp_path / "g").settings["estimate"]
    low, high = estimate["noise_interval"]
    assert low <= len(wrong) / 1350 <= high and high - low < 0.1
    assert f"{100 * estimate['noise']:.1f} % of the stream" in printed
    assert "aim: 2 %" in printed
    recorded = read_growth(tmp_path / "g").settings
    for again in (first, common):  # asked for once more, and not asked for at all
        assert infogrowth("grow", *again)[0] == 0
        assert read_growth(tmp_path / "g").settings == recorded
    for other in ("auto:0.95", "auto", "0.4"):
        status, printed = infogrowth("grow", *common, "--min-align", other)
        assert status == 2 and "auto:0.98" in printed


@pytest.mark.parametrize("batch_size", [7, 1000])
def test_a_purity_depends_on_nothing_but_seeds_and_features(
    noisy, infogrowth, tmp_path, batch_size
):
    features, seeds, _ = noisy
    outputs = []
    for name, size in (("one", 8192), ("other", batch_size)):
        inputs = ("--features", features, "--growth", tmp_path / name, "--seed-ids", seeds)
        more = ("--min-align", "auto:0.98", "--min-recaption-align", "auto", "--batch-size", size)
        output = tmp_path / f"{name}.json"
        assert infogrowth("grow", *inputs, *more, "--output", output)[0] == 0
        outputs.append((output.read_bytes(), read_growth(tmp_path / name).settings))
    assert outputs[0] == outputs[1]


def test_a_noisier_source_later_is_reported(noisy, feature_folder, infogrowth, tmp_path):
    features, seeds, _ = noisy
    common = ("--growth", tmp_path / "g", "--output", tmp_path / "o.json")
    first = ("--features", features, "--seed-ids", seeds, "--min-align", "auto:0.98")
    assert infogrowth("grow", *common, *first)[0] == 0
    random = np.random.default_rng(4)
    image = random.normal(size=(6000, 16)).astype(np.float32)
    ids = [f"t{row:04d}" for row in range(6000)]
    text = np.roll(image + 0.8 * random.normal(size=image.shape).astype(np.float32), 1, axis=0)
    bad = feature_folder("bad", ids=ids, captions=ids, image=image, text=text)
    status, printed = infogrowth("grow", *common, "--features", bad)
    assert status == 0 and "noisier" in printed


def test_a_thresholds_seeds_and_stream_must_be_there(noisy, infogrowth, tmp_path):
    features, seeds, _ = noisy
    common = ("--features", features, "--growth", tmp_path / "g", "--output", tmp_path / "o.json")
    for flag in ("--min-align", "--min-recaption-align"):
        status, printed = infogrowth("grow", *common, flag, "auto")
        assert status == 2 and "clean starting set" in printed
    status, printed = infogrowth("grow", *common, "--seed-ids", seeds, "--min-align", "auto:98")
    assert status == 2 and "purity" in printed


def test_outputs_of_all_kinds(feature_folder, infogrowth, tmp_path):
    uids = [f"{number:032x}" for number in (7, 3, 2**64 + 1, 9, 5, 1)]
    features = feature_folder("features", ids=uids)
    outputs = [
        tmp_path / f"out{extension}" for extension in (".json", ".npy", ".jsonl", ".parquet")
    ]
    status, _ = infogrowth(
        "grow", "--features", features, "--growth", tmp_path / "g", "--output", *outputs,
        "--legacy-strings", "--uid-repeats", "3",
    )  # fmt: skip
    assert status == 0
    entries = json.loads(outputs[0].read_text())
    assert all(isinstance(gain, str) for entry in entries for gain in entry["gains"])
    annotations = load_annotations(outputs[0])
    save_annotations(tmp_path / "again.json", annotations, legacy_strings=True)
    assert (tmp_path / "again.json").read_bytes() == outputs[0].read_bytes()
    subset = np.load(outputs[1])
    assert subset.dtype == np.dtype("u8,u8")
    assert subset.tolist() == sorted(subset.tolist())
    as_text = {f"{high:016x}{low:016x}" for high, low in subset.tolist()}
    assert as_text == {a["image"] for a in annotations}
    assert len(subset) > len(as_text)  # gains as repeats
    lines = [json.loads(line) for line in outputs[2].read_text().splitlines()]
    assert [line["file_name"] for line in lines] == [f"{a['image']}.jpg" for a in annotations]
    assert [line["gain"] for line in lines] == [sum(a["gains"]) / 2 for a in annotations]
    assert len(pd.read_parquet(outputs[3])) == 6


def test_a_first_batch_of_which_nothing_is_kept(feature_folder, infogrowth, tmp_path):
    image = np.random.default_rng(0).normal(size=(6, 8)).astype(np.float32)
    text = np.where(np.arange(6)[:, None] < 4, -image, image)
    features = feature_folder("features", image=image, text=text)
    inputs = ("--features", features, "--growth", tmp_path / "g", "--batch-size", "2")
    assert infogrowth("grow", *inputs, "--output", tmp_path / "o.json")[0] == 0
    kept = load_annotations(tmp_path / "o.json")
    assert [a["image"] for a in kept] == ["s4", "s5"]
    assert kept[0]["gains"] == [1, 1]  # the first sample of an empty index


def test_a_dataset_begun_with_samples_without_captions_grows_on(
    feature_folder, infogrowth, tmp_path
):
    first, second = feature_folder("first", captions=[""] * 6), feature_folder("second")
    for features in (first, second):
        inputs = ("--features", features, "--growth", tmp_path / "g")
        assert infogrowth("grow", *inputs, "--output", tmp_path / "o.json")[0] == 0
    assert len(load_annotations(tmp_path / "o.json")) == 6
    folder = read_growth(tmp_path / "g")
    assert folder.totals["reasons"]["caption is missing"] == 6
    (record,) = folder.decisions().slice(0, 1).to_pylist()
    assert (record["verdict"], record["id"], record["caption"]) == ("dropped", "s0", "")
    assert record["alignment"] is None and record["gain_image"] is None
    assert record["image_neighbors"] == record["text_neighbors"] == []


def test_options_come_from_yaml_and_a_flag_wins(feature_folder, infogrowth, tmp_path):
    config = tmp_path / "grow.yaml"
    config.write_text(
        f"features: {feature_folder('features')}\ngrowth: {tmp_path / 'growth'}\n"
        f"output: {tmp_path / 'out.json'}\nmin_align: -1\nk: 2\n"
    )
    assert infogrowth("grow", "--config", config, "--k", "3", "--quiet") == (0, "")
    settings = read_growth(tmp_path / "growth").settings
    assert (settings["k"], settings["min_align"]) == (3, -1)
    assert len(load_annotations(tmp_path / "out.json")) == 6


def test_a_second_run_on_one_folder_is_refused_with_the_process_named(
    feature_folder, infogrowth, tmp_path
):
    arguments = ("--features", feature_folder("f"), "--output", tmp_path / "o.json")
    growth = tmp_path / "growth"
    assert infogrowth("grow", *arguments, "--growth", growth)[0] == 0
    with open(growth / "lock", "r+") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        lock.truncate(0)
        lock.write("4242\n")
        lock.flush()
        status, printed = infogrowth("grow", *arguments, "--growth", growth)
    assert status == 2
    assert "4242" in printed


@pytest.mark.parametrize(
    ("change", "word"),
    [
        (["--k", "5"], "k 4.* 5"),
        (["--min-align", "0.3"], "min_align 0.4.* 0.3"),
        (["--min-align", "auto"], "min_align 0.4.* auto"),
        (["--modality", "image"], "modality pair.* image"),
    ],
)
def test_a_changed_setting_is_refused_and_named(feature_folder, infogrowth, tmp_path, change, word):
    arguments = ["--features", feature_folder("f"), "--output", tmp_path / "o.json"]
    arguments += ["--growth", tmp_path / "growth"]
    assert infogrowth("grow", *arguments)[0] == 0
    before = (tmp_path / "growth/manifest.json").read_bytes()
    status, message = infogrowth("grow", *arguments, *change)
    assert status == 2
    assert re.search(word, message)
    assert (tmp_path / "growth/manifest.json").read_bytes() == before


def test_a_changed_encoder_or_dimension_is_refused_and_named(feature_folder, infogrowth, tmp_path):
    def grow(folder: Path) -> tuple[int, str]:
        return infogrowth(
            "grow",
            "--features",
            folder,
            "--growth",
            tmp_path / "g",
            "--output",
            tmp_path / "o.json",
        )

    first = describe(feature_folder("first"), "tiny", "aa11")
    assert grow(first)[0] == 0
    other = describe(feature_folder("other", seed=1), "big", "bb22")
    status, printed = grow(other)
    assert status == 2
    assert re.search("encoder .*tiny.* not .*big", printed)
    assert grow(feature_folder("unknown", seed=2))[0] == 0  # no encoder is no difference
    wide = np.random.default_rng(0).normal(size=(6, 16))
    status, printed = grow(describe(feature_folder("wide", image=wide, text=wide), "tiny", "aa11"))
    assert status == 2
    assert re.search("dimension .*8.*16", printed)


def describe(folder: Path, name: str, fingerprint: str) -> Path:
    encoder = {"name": name, "fingerprint": fingerprint, "dimension": 8}
    (folder / "features.json").write_text(json.dumps({"encoder": encoder, "finished": True}))
    return folder


def test_other_seeds_for_a_begun_dataset_are_refused(feature_folder, infogrowth, tmp_path):
    common = ("--growth", tmp_path / "g", "--output", tmp_path / "o.json")
    features, seeds = feature_folder("f"), feature_folder("s", seed=5)
    assert infogrowth("grow", *common, "--features", features)[0] == 0
    status, printed = infogrowth("grow", *common, "--features", features, "--seed-features", seeds)
    assert status == 2
    assert "seeds" in printed


def test_images_with_class_labels_grow_in_the_image_space_alone(infogrowth, tmp_path):
    random = np.random.default_rng(3)
    centers = np.eye(3, 8)
    classes = np.arange(60) % 3
    labels = [f"class {number}" for number in classes]
    labels[40] = "class 0" if classes[40] else "class 1"  # a wrong label among its neighbors
    image = centers[classes] + 0.05 * random.normal(size=(60, 8))
    np.savez(
        tmp_path / "f.npz",
        ids=np.array([f"i{row}" for row in range(60)]),
        labels=np.array(labels),
        image=image.astype(np.float32),
    )
    arguments = ("--features", tmp_path / "f.npz", "--growth", tmp_path / "g")
    outputs = ("--output", tmp_path / "o.json", "--modality", "image")
    assert infogrowth("grow", *arguments, *outputs)[0] == 0
    folder = read_growth(tmp_path / "g")
    record = folder.decisions().to_pylist()[40]
    assert (record["verdict"], record["reason"]) == (
        "dropped",
        "label disagrees with its neighbors",
    )
    assert record["gain_text"] is None
    annotations = load_annotations(tmp_path / "o.json")
    assert len(annotations) == 59
    assert annotations[5]["caption"] == labels[5]
    assert all(a["gains"][0] == a["gains"][1] for a in annotations)
    assert folder.spaces == ("image",)
    more = np.load(tmp_path / "f.npz")
    ids = np.array([f"j{row}" for row in range(60)])
    np.savez(tmp_path / "more.npz", ids=ids, labels=more["labels"], image=more["image"])
    arguments = ("--features", tmp_path / "more.npz", "--growth", tmp_path / "g")
    assert infogrowth("grow", *arguments, *outputs)[0] == 0
    continued = read_growth(tmp_path / "g").decisions().to_pylist()[60]
    assert continued["image_neighbors"][0] == "i0"
    assert abs(continued["image_distances"][0]) < 1e-6


def test_two_ranks_write_the_same_bytes_as_one(selection, infogrowth):
    """Under the launcher rank 0 alone writes, and prints its summary once."""
    inputs = {
        "features": selection.folder("stream", range(100, 500), shard_rows=130),
        "seed_features": selection.folder("seeds", range(31)),
        "recaptions": selection.recaptions(),
        "batch_size": 70,
        "commit_rows": 150,
    }
    assert infogrowth("grow", *flags(selection, **inputs), "--quiet")[0] == 0
    arguments = [str(a) for a in flags(selection, "ranks.json", "ranks", **inputs)]
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    launched = subprocess.run(
        [sys.executable, *launcher, "-m", "infogrowth", "grow", *arguments, "--device", "cpu"],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert launched.returncode == 0, launched.stderr
    assert launched.stdout.count("pairs processed") == 1
    one, two = (selection.home / name for name in ("out.json", "ranks.json"))
    assert one.read_bytes() == two.read_bytes()
    ours, theirs = (read_growth(selection.home / name) for name in ("growth", "ranks"))
    assert ours.decisions().equals(theirs.decisions())
    np.testing.assert_array_equal(ours.kept_features("text"), theirs.kept_features("text"))


@pytest.mark.parametrize("name", ["grow_sample", "grow_cc3m"])
def test_the_shipped_configs_are_accepted(repository, name):
    config = load_config(Config, repository / f"scripts/configs/{name}.yaml")
    assert config.k == 4
    assert config.output[0].endswith(".json")
