"""The experiment of docs/claim.md: its parts, and the whole command on some real icons."""

import base64
import gzip
import hashlib
import io
import json
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import yaml

from infogrowth.growth import thresholds

CURVES = {"full": [(400, 10.0)], "grown_two_phase": [(100, 10.0), (200, 20.0)]}
SCRIPTS = Path(__file__).parents[2] / "scripts"


@pytest.fixture(scope="module")
def parts():
    """The modules beside the program, as it sees them."""
    sys.path.insert(0, str(SCRIPTS))
    try:
        from claim_parts import arms, figures, icons
    finally:
        sys.path.remove(str(SCRIPTS))
    return {"arms": arms, "figures": figures, "icons": icons}


@pytest.fixture(scope="module")
def archive(tmp_path_factory):
    """A package in the form of @iconify/json, with its hash."""
    folder = tmp_path_factory.mktemp("claim")
    sets = json.loads(gzip.decompress((Path(__file__).parent / "icons.json.gz").read_bytes()))
    path = folder / "packages" / "iconify-json-0.0.1.tgz"
    path.parent.mkdir()
    with tarfile.open(path, "w:gz") as tar:
        for name, content in sets.items():
            data = json.dumps(content).encode()
            member = tarfile.TarInfo(f"package/json/{name}.json")
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    digest = base64.b64encode(hashlib.sha512(path.read_bytes()).digest()).decode()
    return folder, digest


def run_claim(folder, digest, *options):
    command = [
        *(sys.executable, SCRIPTS / "claim.py", "--config", SCRIPTS / "configs/claim.yaml"),
        *(
            "--packages",
            folder / "packages",
            "--output",
            folder / "work",
            "--results",
            folder / "results.jsonl",
            "--page",
            folder,
        ),
        *("--package_version", "0.0.1", "--package_sha512", digest),
        *("--source_sets", "tabler", "hugeicons", "boxicons", "mynaui", "reicon"),
        *("--pretraining_sets", "iconmind", "keyline-icons", "--seed_sets", "heroicons"),
        *("--test_sets", "lucide", "iconoir", "--test_names", 20, "--portions", 2),
        *("--encoder_epochs", 1, "--batch_size", 32, "--validate_every", 64),
        *("--full_samples", 128, "--samples", 64, "--static_size", 60, "--min_align", "auto"),
        *(
            "--arms",
            "full",
            "semdedup",
            "grown_two_phase",
            "grown_by_right",
            "oracle",
            "--seeds",
            0,
            *options,
        ),
    ]
    words = [str(word) for word in command]
    return subprocess.run(words, capture_output=True, text=True, check=False)


def test_the_whole_experiment_runs_in_two_places_and_goes_on_where_it_was(archive):
    """Drawn, scored and grown here; trained where no package is, two arms at a time."""
    folder, digest = archive
    sent = folder / "sent"
    for options in (("--travel", sent), ("--output", sent, "--packages", sent, "--jobs", 2)):
        done = run_claim(folder, digest, *options)
        assert done.returncode == 0, done.stderr
    records = [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]
    evaluated = pd.DataFrame([r for r in records if r["kind"] == "val"])
    assert evaluated.groupby("arm").step.apply(list).to_dict() == {
        "full": [2, 4],
        "semdedup": [2],
        "grown_two_phase": [2],
        "grown_by_right": [2],
        "oracle": [2],
    }
    assert evaluated.r_mean.between(0, 100).all()
    made = {r["arm"]: r for r in records if r["kind"] == "arm"}
    counts = next(r for r in records if r["kind"] == "parts")
    assert made["full"]["pairs"] == counts["source"]
    noise = next(r for r in records if r["kind"] == "noise")
    assert made["full"]["wrong"] == pytest.approx(noise["wrong_captions"] / counts["source"])
    assert 0.25 < made["full"]["wrong"] < 0.31
    assert made["oracle"]["wrong"] == 0
    assert made["semdedup"]["pairs"] == min(60, made["grown_two_phase"]["pairs"])
    portions = [r for r in records if r["kind"] == "portion"]
    assert sum(r["pairs"] for r in portions) == counts["source"]
    assert sum(r["kept"] for r in portions) == made["grown_two_phase"]["pairs"]
    assert (folder / "claim.png").stat().st_size > 10_000
    assert "two-phase" in (folder / "claim_tables.md").read_text()

    varied = ("--swapped", 0, "--k", 2, "--arms", "grown_two_phase")
    done = run_claim(folder, digest, *varied)
    assert done.returncode == 0, done.stderr
    assert "lmdb_source:" not in done.stderr  # nothing is drawn again
    records = [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]
    grown = [r for r in records if r["kind"] == "arm" and r["arm"] == "grown_two_phase"]
    assert [(r["swapped"], r["k"]) for r in grown] == [(0.3, 4), (0.0, 2)]
    assert "NaN" not in (folder / "results.jsonl").read_text()  # not JSON
    assert "| 0% | auto | 2 | all |" in (folder / "claim_tables.md").read_text()

    before = [r for r in records if r["kind"] != "cost"]
    (folder / "claim.png").unlink()
    assert run_claim(folder, digest, "--figures_only").returncode == 0
    after = [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]
    assert [r for r in after if r["kind"] != "cost"] == before
    assert (folder / "claim.png").exists()


def test_an_altered_package_is_refused(archive):
    folder, _ = archive
    done = run_claim(folder, "AAAA", "--output", folder / "another")
    assert done.returncode == 2
    assert "iconify-json-0.0.1.tgz" in done.stderr and "Traceback" not in done.stderr


def test_a_folder_made_with_other_options_is_left_alone(archive):
    folder, digest = archive
    done = run_claim(folder, digest, "--test_names", 10)
    assert done.returncode == 2
    assert "test_names" in done.stderr and "Traceback" not in done.stderr


def test_names_lose_what_tells_only_their_style(parts):
    caption = parts["icons"].caption
    assert caption("arrow-left-circle-outline") == "arrow left circle"
    assert caption("add-comment-outline-rounded", ["outline-rounded"]) == "add comment"
    assert caption("apps-shield-20-regular", ["20-regular"]) == "apps shield"
    assert caption("bag3-filled") == "bag"
    assert caption("24-filled") == ""


def test_swapped_captions_share_no_word_with_the_own_one(parts):
    icons = parts["icons"]
    names = ["arrow left", "arrow right", "home", "star", "sun", "moon", "cloud rain", "cloud"]
    own = {f"set/{n}": names[n % 8] for n in range(400)}
    swapped = icons.swap_captions(own, 0.3, seed=0)
    assert 0.25 * 400 < len(swapped) <= 0.3 * 400
    assert all(not set(text.split()) & set(own[name].split()) for name, text in swapped.items())
    assert swapped == icons.swap_captions(own, 0.3, seed=0)
    assert swapped != icons.swap_captions(own, 0.3, seed=1)


def test_semdedup_keeps_one_of_each_group_of_copies(parts):
    arms = parts["arms"]
    rng = np.random.default_rng(0)
    distinct = rng.normal(size=(20, 16))
    images = np.repeat(distinct, 3, axis=0) + 1e-3 * rng.normal(size=(60, 16))
    images = (images / np.linalg.norm(images, axis=1, keepdims=True)).astype(np.float32)
    pairs = [{"image": f"{row}", "caption": f"thing {row // 3}"} for row in range(60)]
    scored = arms.Scored(pairs, np.ones(60), images, {}, 0.5, np.ones(60), np.zeros(60, bool))
    chosen = arms.ARMS["semdedup"].choose(scored, 20, 0)
    assert sorted(row // 3 for row in chosen) == list(range(20))


def test_samples_to_a_recall_are_read_off_the_curve(parts):
    curve = pd.DataFrame({"samples_seen": [100, 200, 300], "r_mean": [10.0, 20.0, 15.0]})
    reach = parts["figures"].samples_to_reach
    assert reach(curve, 15) == 150
    assert reach(curve, 5) == 50
    assert reach(curve, 20) == 200
    assert reach(curve, 21) == float("inf")


def test_the_speed_up_compares_equal_recalls(parts):
    rows = [
        {"arm": arm, "seed": seed, "evaluation": at, "samples_seen": seen, "r_mean": value}
        for seed in (0, 1)
        for arm, curve in {
            "full": [(400, 10.0)],
            "grown_two_phase": [(100, 10.0), (200, 20.0)],
        }.items()
        for at, (seen, value) in enumerate(curve)
    ]
    ratio, low, high = parts["figures"].speed_up(pd.DataFrame(rows), "grown_two_phase")
    assert (ratio, low, high) == (4.0, 4.0, 4.0)


def test_the_configuration_names_no_set_twice():
    config = yaml.safe_load((SCRIPTS / "configs/claim.yaml").read_text())
    sets = [name for key, names in config.items() if key.endswith("_sets") for name in names]
    assert len(sets) == len(set(sets)) > 50


def test_the_probability_that_a_caption_is_right_is_that_of_the_mixture(parts):
    """Half of the stream is wrong with alignments in 0..1, the other half right in 0.5..1.5."""
    rng = np.random.default_rng(0)
    wrong, right = rng.uniform(0, 1, 20_000), rng.uniform(0.5, 1.5, 10_000)
    stream = np.sort(np.concatenate([wrong[:10_000], right]))
    estimate = thresholds.StreamEstimate(0.5, (0.5, 0.5), np.sort(wrong[10_000:]), stream, 10_000)
    asked = np.array([0.0, 0.3, 0.75, 1.2, 1.5])
    found = parts["arms"].right_given_alignment(asked, estimate)
    assert found == pytest.approx([0, 0, 0.5, 1, 1], abs=0.06)
