"""The zoo of bad options, outputs, growth folders and annotation files."""

import json
import re
from pathlib import Path

import numpy as np
import pytest

from infogrowth.growth.ledger import read_growth


@pytest.fixture
def grow(feature_folder, infogrowth, tmp_path):
    """Runs `grow` on 6 good samples with further arguments (a later one wins)."""
    features = feature_folder("features")

    def run(*more):
        return infogrowth(
            "grow", "--features", features, "--growth", tmp_path / "growth",
            "--output", tmp_path / "out.json", *more,
        )  # fmt: skip

    return run


def refused(answer, pattern):
    status, message = answer
    assert status == 2
    assert message.startswith("error: ")
    assert message.count("\n") == 1
    assert re.search(pattern, message)


BAD_OPTIONS = {
    "k of zero": (["--k", "0"], "k .*1"),
    "k that is no number": (["--k", "four"], "--k .*whole number"),
    "k of a half": (["--k", "2.5"], "--k .*whole number"),
    "batch of zero": (["--batch-size", "0"], "--batch-size .*1"),
    "commit of zero": (["--commit-rows", "0"], "--commit-rows .*1"),
    "min_align of words": (["--min-align", "some"], "min_align .*number"),
    "min_align of NaN": (["--min-align", "nan"], "min_align"),
    "min_align above one": (["--min-align", "40"], "min_align"),
    "unknown index": (["--index", "exakt"], "--index .*'exact'"),
    "unknown device": (["--device", "tpu"], "--device .*auto, cpu, cuda"),
    "unknown modality": (["--modality", "video"], "--modality .*pair, image"),
    "output of an unknown kind": (
        ["--output", "out.csv"],
        r"out\.csv .*\.json, \.jsonl, \.npy, \.parquet",
    ),
    "the same output twice": (["--output", "a.json", "a.json"], r"a\.json .*twice"),
    "auto without seeds": (
        ["--min-align", "auto"],
        "min_align auto .*--seed-features or --seed-ids",
    ),
    "no such config": (["--config", "no.yaml"], r"no\.yaml"),
    "no such recaptions": (["--recaptions", "no"], "exist"),
    "no such seeds": (["--seed-features", "no"], "exist"),
    "no such seed list": (["--seed-ids", "no.json"], r"no\.json"),
    "seeds given twice": (
        ["--seed-features", "a", "--seed-ids", "b"],
        "--seed-features or --seed-ids",
    ),
    "recaptions for labels": (
        ["--modality", "image", "--recaptions", "r"],
        "--modality image .*--recaptions",
    ),
    "auto for labels": (["--modality", "image", "--min-align", "auto"], "--modality image .*auto"),
}


@pytest.mark.parametrize("name", BAD_OPTIONS)
def test_a_bad_option_is_refused_before_any_work(grow, tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    arguments, pattern = BAD_OPTIONS[name]
    refused(grow(*arguments), pattern)
    assert not (tmp_path / "growth/manifest.json").exists()
    assert not (tmp_path / "out.json").exists()


BAD_CONFIGS = {
    "an unknown key": ("min_algin: 0.4\n", "'min_algin' .*'min_align'"),
    "a value that does not fit": ("k: many\n", "key 'k' .*whole number"),
    "a key given twice": ("k: 4\nk: 5\n", "'k' .*twice"),
    "no YAML": ("k: [4\n", "YAML"),
    "a list": ("- k\n", "key: value"),
}


@pytest.mark.parametrize("name", BAD_CONFIGS)
def test_a_bad_config_file_is_refused(grow, tmp_path, name):
    content, pattern = BAD_CONFIGS[name]
    (tmp_path / "grow.yaml").write_text(content)
    refused(grow("--config", tmp_path / "grow.yaml"), pattern)


def test_a_missing_required_option_is_named(infogrowth):
    refused(infogrowth("grow", "--features", "f"), "--growth")


BAD_SEED_LISTS = {
    "no JSON": ("[", "seed list .*JSON"),
    "no list": ('{"a": 1}', "list"),
    "an empty list": ("[]", "list"),
    "a list of lists": ("[[1], [2]]", "list"),
    "numbers, which are ids of other samples": ("[1, 2.0]", "none .*seed"),
    "ids of other samples": ('["x", "y"]', "none .*seed"),
}


@pytest.mark.parametrize("name", BAD_SEED_LISTS)
def test_a_bad_seed_list_is_refused(grow, tmp_path, name):
    content, pattern = BAD_SEED_LISTS[name]
    (tmp_path / "seeds.json").write_text(content)
    refused(grow("--seed-ids", tmp_path / "seeds.json"), pattern)
    assert not (tmp_path / "out.json").exists()


def test_some_unknown_seed_ids_are_reported_and_the_others_used(grow, tmp_path):
    (tmp_path / "seeds.json").write_text('["s1", "s4", "unknown"]')
    status, message = grow("--seed-ids", tmp_path / "seeds.json")
    assert status == 0
    assert re.search("1 .*3 seed", message)
    assert read_growth(tmp_path / "growth").totals["reasons"]["seed"] == 2


def test_recaptions_and_seeds_of_another_width_or_encoder_are_refused(
    grow, feature_folder, tmp_path
):
    narrow = np.ones((6, 5), np.float32)
    table = feature_folder("table", image=None, text=narrow)
    refused(grow("--recaptions", table), "table .*dimension 5.* 8")
    seeds = feature_folder("seeds", image=narrow, text=narrow)
    refused(grow("--seed-features", seeds), "seeds .*dimension 5.* 8")
    other = feature_folder("other", image=None)
    for folder, name in ((tmp_path / "features", "tiny"), (other, "big")):
        encoder = {"name": name, "fingerprint": name * 8}
        (folder / "features.json").write_text(json.dumps({"encoder": encoder, "finished": True}))
    refused(grow("--recaptions", other), "other .*encoder big.* tiny")


def test_an_output_that_cannot_be_written_loses_no_decision(grow, tmp_path):
    (tmp_path / "file").write_text("in the way")
    refused(grow("--output", tmp_path / "file/out.json", "--quiet"), r"cannot write .*out\.json")
    assert read_growth(tmp_path / "growth").totals["pairs"] == 6
    assert grow("--quiet") == (0, "")
    assert len(json.loads((tmp_path / "out.json").read_text())) == 6


@pytest.mark.parametrize("name", ["growth/growth.json", "growth/kept/more.npy", "link/o.json"])
def test_an_output_inside_the_growth_folder_is_refused(grow, tmp_path, name):
    assert grow("--quiet")[0] == 0
    (tmp_path / "link").symlink_to(tmp_path / "growth")
    before = contents(tmp_path / "growth")
    refused(grow("--output", tmp_path / name), "in the growth folder")
    assert contents(tmp_path / "growth") == before


def test_ids_that_are_no_datacomp_uids_cannot_become_a_subset(grow, tmp_path):
    answer = grow("--output", tmp_path / "uids.npy", "--quiet")
    refused(answer, "'s0' .*uid")
    assert not (tmp_path / "uids.npy").exists()


def damaged_manifest(growth):
    (growth / "manifest.json").write_text('{"format": 1, "parts": 1}')


def cut_off(path):
    path.write_bytes(path.read_bytes()[:-20])


def other_format(growth):
    settings = json.loads((growth / "growth.json").read_text())
    (growth / "growth.json").write_text(json.dumps({**settings, "format": 99}))


BAD_GROWTH_FOLDERS = {
    "a lost manifest": (
        lambda g: (g / "manifest.json").unlink(),
        r"lost .*manifest\.json",
    ),
    "lost settings": (lambda g: (g / "growth.json").unlink(), r"lost .*growth\.json"),
    "settings lost with the manifest": (
        lambda g: [(g / name).unlink() for name in ("growth.json", "manifest.json")],
        r"lost .*\.json",
    ),
    "a damaged manifest": (damaged_manifest, r"manifest\.json is damaged"),
    "an unknown format": (other_format, r"growth\.json .*format"),
    "a manifest that is no JSON": (
        lambda g: (g / "manifest.json").write_text("{"),
        r"manifest\.json .*JSON",
    ),
    "a missing part": (
        lambda g: (g / "decisions/000000.parquet").unlink(),
        r"000000\.parquet .*not exist",
    ),
    "a damaged array": (
        lambda g: (g / "kept/text_000000.npy").write_bytes(b"no"),
        r"text_000000\.npy .*damaged",
    ),
    "an empty array file": (
        lambda g: (g / "kept/image_000000.npy").write_bytes(b""),
        r"image_000000\.npy .*damaged",
    ),
    "an array cut off": (
        lambda g: cut_off(g / "kept/image_000000.npy"),
        r"image_000000\.npy .*damaged",
    ),
    "an array cut off in its header": (
        lambda g: (g / "kept/image_000000.npy").write_bytes(b"\x93NUMPY\x01\x00v"),
        r"image_000000\.npy .*damaged",
    ),
    "an array of another width": (
        lambda g: np.save(g / "kept/image_000000.npy", np.eye(6, 7, dtype=np.float32)),
        r"image_000000\.npy .*damaged",
    ),
    "an array of no dimension": (
        lambda g: np.save(g / "kept/image_000000.npy", np.float32(1)),
        r"image_000000\.npy .*damaged",
    ),
    "an array of text": (
        lambda g: np.save(g / "kept/image_000000.npy", np.full((6, 8), "a")),
        r"image_000000\.npy .*damaged",
    ),
    "an array of fewer rows": (
        lambda g: np.save(g / "kept/text_000000.npy", np.eye(2, 8, dtype=np.float32)),
        "2 text features",
    ),
}


@pytest.mark.parametrize("name", BAD_GROWTH_FOLDERS)
def test_a_damaged_growth_folder_is_refused_and_left_as_it_is(grow, tmp_path, name):
    assert grow("--quiet")[0] == 0
    damage, pattern = BAD_GROWTH_FOLDERS[name]
    damage(tmp_path / "growth")
    before = contents(tmp_path / "growth")
    refused(grow("--quiet"), pattern)
    assert contents(tmp_path / "growth") == before


def contents(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file() and path.name != "lock")
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def test_a_growth_folder_with_other_things_in_it_is_left_alone(grow, tmp_path):
    (tmp_path / "growth").mkdir()
    (tmp_path / "growth/thesis.tex").write_text("years of work")
    refused(grow("--quiet"), r"thesis\.tex")
    assert [path.name for path in (tmp_path / "growth").iterdir()] == ["thesis.tex"]


def test_a_growth_folder_that_is_a_file_is_refused(grow, tmp_path):
    (tmp_path / "growth").write_text("not a folder")
    refused(grow("--quiet"), "cannot use .*growth")


ENTRY = '{"image": "a", "caption": "c", "gains": [0.5, 0.5]}'
BAD_ANNOTATIONS = {
    "no JSON": (b"[{]", "line 1"),
    "no list": (b"{}", "list.*dict"),
    "no UTF-8": (b'["\xff\xfe"]', "utf-8"),
    "an empty list": (b"[]", "no samples"),
    "an entry that is no object": (b'["a"]', "sample 0 .*object"),
    "an entry without id": (b'[{"caption": "c"}]', "sample 0 .*id"),
    "an entry without caption": (b'[{"image": "a"}]', r"sample 0 .*'a'.* caption"),
    "an entry without gains": (
        f'[{ENTRY}, {{"image": "b", "caption": "c"}}]'.encode(),
        r"sample 1 .*'b'.* gains",
    ),
    "one gain": (ENTRY.replace("[0.5, 0.5]", "[0.5]"), r"\[0\.5\].*two numbers"),
    "gains of words": (ENTRY.replace("0.5, 0.5", '"much", "more"'), "gains .*two numbers"),
    "gains of NaN": (ENTRY.replace("0.5, 0.5", "NaN, 1"), "finite"),
    "half of a surrogate pair in an id": (
        ENTRY.replace('"a"', r'"a\ud83d"'),
        r"sample 0 of .* \('a\\ud83d'\) .*surrogates",
    ),
    "half of a surrogate pair in a caption": (
        ENTRY.replace('"c"', r'["c", "\ud83d"]'),
        r"sample 0 of .* \('a'\) .*surrogates",
    ),
    "half of a surrogate pair in an extra key": (
        ENTRY.replace("}", r', "page": {"\udc00": 1}}'),
        r"sample 0 of .* \('a'\) .*surrogates",
    ),
    "gains that are all zero": (
        ENTRY.replace("0.5, 0.5", "0, 0"),
        "total gain .*zero",
    ),
}


@pytest.mark.parametrize("name", BAD_ANNOTATIONS)
def test_a_bad_annotation_file_is_refused(infogrowth, tmp_path, name):
    content, pattern = BAD_ANNOTATIONS[name]
    content = content if isinstance(content, bytes) else f"[{content}]".encode()
    (tmp_path / "in.json").write_bytes(content)
    output = tmp_path / "out.json"
    arguments = ("--annotations", tmp_path / "in.json", "--output", output, "--bernoulli")
    refused(infogrowth("select", *arguments), pattern)
    assert not output.exists()
