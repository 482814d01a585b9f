"""`select`: the top N or a random choice by gain, in the old order, with all extra keys."""

import json

import numpy as np
import pyarrow.parquet as pq
import pytest

from infogrowth.annotations import gains_array, load_annotations


@pytest.fixture
def grown(golden, tmp_path):
    """The golden annotations (gains as strings, as in the paper's files), with an extra key."""
    annotations = json.loads((golden / "sampling_annotations.json").read_text())
    for number, entry in enumerate(annotations):
        entry["source"] = f"page {number}"
    path = tmp_path / "grown.json"
    path.write_text(json.dumps(annotations))
    return path


def test_top_takes_the_highest_gains_in_their_old_order(grown, infogrowth, tmp_path):
    output = tmp_path / "top.json"
    status, printed = infogrowth(
        "select", "--annotations", grown, "--output", output, "--top", "25"
    )
    assert status == 0
    assert "selected 25 of 200 samples" in printed
    everything, chosen = load_annotations(grown), load_annotations(output)
    mean = gains_array(everything).mean(axis=1)
    best = sorted(np.argsort(-mean, kind="stable")[:25])
    assert chosen == [everything[row] for row in best]
    assert chosen[0]["source"].startswith("page ")


def test_bernoulli_is_seeded_and_follows_the_gain(grown, golden, infogrowth, tmp_path):
    arrays = np.load(golden / "sampling_n200.npz")
    position = {entry["image"]: row for row, entry in enumerate(load_annotations(grown))}
    counts = np.zeros(200)
    runs = 200
    for seed in range(runs):
        output = tmp_path / f"{seed}.json"
        arguments = ("--annotations", grown, "--output", output, "--bernoulli", "--seed", seed)
        assert infogrowth("select", *arguments, "--quiet")[0] == 0
        chosen = [position[entry["image"]] for entry in json.loads(output.read_text())]
        assert chosen == sorted(chosen)
        counts[chosen] += 1
    # p_prune is the chance the original code gives; 200 draws are within 5 standard errors.
    chance = arrays["p_prune"]
    error = np.sqrt(np.maximum(chance * (1 - chance), 1e-12) / runs)
    assert (np.abs(counts / runs - chance) <= 5 * error + 1e-9).all()
    again = tmp_path / "again.json"
    arguments = ("--annotations", grown, "--output", again, "--bernoulli", "--seed", "3")
    assert infogrowth("select", *arguments)[0] == 0
    assert again.read_bytes() == (tmp_path / "3.json").read_bytes()


def test_uid_repeats_follow_the_gain(infogrowth, tmp_path):
    gains = [0.0, 0.1, 0.5, 1.0]
    annotations = [
        {"image": f"{row:032x}", "caption": "c", "gains": [gain, gain]}
        for row, gain in enumerate(gains)
    ]
    (tmp_path / "in.json").write_text(json.dumps(annotations))
    status, _ = infogrowth(
        "select", "--annotations", tmp_path / "in.json", "--output", tmp_path / "uids.npy",
        "--top", "4", "--uid-repeats", "5",
    )  # fmt: skip
    assert status == 0
    uids = np.load(tmp_path / "uids.npy")
    # gain / 0.99-quantile (0.985), clipped: 0, 0.1015, 0.5076, 1 -> 1 + round(4 g)
    assert np.bincount([low for _, low in uids.tolist()]).tolist() == [1, 1, 3, 5]
    assert uids.dtype == np.dtype("u8,u8")


def annotation_file(path, entries):
    path.write_text(json.dumps([{"image": "a", "caption": "c", **entry} for entry in entries]))
    return path


def test_a_table_of_single_and_several_captions_holds_lists(infogrowth, tmp_path):
    entries = [{"caption": "one", "gains": [1, 1]}, {"caption": ["two", "three"], "gains": [1, 1]}]
    status, _ = infogrowth(
        "select", "--annotations", annotation_file(tmp_path / "in.json", entries),
        "--output", tmp_path / "out.parquet", "--top", "2",
    )  # fmt: skip
    assert status == 0
    captions = pq.read_table(tmp_path / "out.parquet")["caption"].to_pylist()
    assert captions == [["one"], ["two", "three"]]


def test_the_top_of_gains_that_are_all_zero_is_the_first_rows(infogrowth, tmp_path):
    entries = [{"image": f"{row:032x}", "gains": [0, 0]} for row in range(3)]
    source = annotation_file(tmp_path / "in.json", entries)
    outputs = (tmp_path / "out.json", tmp_path / "out.npy")
    arguments = ("--annotations", source, "--top", "2", "--uid-repeats", "3", "--output", *outputs)
    assert infogrowth("select", *arguments)[0] == 0
    assert [entry["image"][-1] for entry in load_annotations(outputs[0])] == ["0", "1"]
    assert [low for _, low in np.load(outputs[1]).tolist()] == [0, 1]  # no gain, no repeats
    status, printed = infogrowth("select", "--annotations", source, "--bernoulli", *arguments[4:])
    assert status == 2
    assert "zero" in printed


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "either"),
        (["--top", "5", "--bernoulli"], "either"),
        (["--top", "201"], "201 of 200"),
        (["--top", "0"], "0 of 200"),
        (["--top", "many"], "--top must be a whole number"),
    ],
)
def test_what_cannot_be_selected_is_refused(grown, infogrowth, tmp_path, arguments, words):
    output = tmp_path / "out.json"
    status, message = infogrowth("select", "--annotations", grown, "--output", output, *arguments)
    assert status == 2
    assert words in message
    assert not output.exists()


@pytest.mark.parametrize("verb", ["select", "grow"])
def test_an_empty_list_of_outputs_is_refused(infogrowth, tmp_path, verb):
    required = {"select": "annotations: in.json\n", "grow": "features: f\ngrowth: g\n"}
    (tmp_path / "run.yaml").write_text(required[verb] + "output: []\n")
    status, printed = infogrowth(verb, "--config", tmp_path / "run.yaml")
    assert status == 2
    assert printed == "error: output is empty: give --output at least one file\n"


def test_one_file_under_two_names_is_an_output_given_twice(
    grown, infogrowth, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "link").symlink_to(tmp_path)
    for other in ("./y.json", tmp_path / "y.json", "link/y.json"):
        outputs = ("--output", "y.json", other)
        status, printed = infogrowth("select", "--annotations", grown, *outputs, "--top", "5")
        assert status == 2
        assert printed == f"error: --output {other} is given twice\n"
