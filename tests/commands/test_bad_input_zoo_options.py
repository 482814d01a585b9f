"""The zoo of bad options, outputs, growth folders and annotation files."""

import json
from pathlib import Path

import numpy as np
import pytest

from infogrowth.growth.ledger import read_growth


def told_as(pattern, message):
    with pytest.raises(AssertionError, match=pattern):
        raise AssertionError(message)


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
    told_as(pattern, message)


BAD_OPTIONS = {
    "k of zero": (["--k", "0"], "k must be at least 1, not 0"),
    "k that is no number": (["--k", "four"], "--k must be a whole number, not 'four'"),
    "k of a half": (["--k", "2.5"], "--k must be a whole number"),
    "batch of zero": (["--batch-size", "0"], "batch_size must be at least 1, not 0"),
    "commit of zero": (["--commit-rows", "0"], "commit_rows must be at least 1, not 0"),
    "min_align of words": (["--min-align", "some"], "min_align must be a number"),
    "min_align of NaN": (["--min-align", "nan"], "min_align"),
    "min_align above one": (["--min-align", "40"], "min_align"),
    "unknown index": (["--index", "exakt"], "--index must be one of .*did you mean 'exact'"),
    "unknown device": (["--device", "tpu"], "--device must be one of auto, cpu, cuda"),
    "unknown modality": (["--modality", "video"], "--modality must be one of pair, image"),
    "output of an unknown kind": (
        ["--output", "out.csv"],
        r"--output out\.csv must end in one of \.json, \.jsonl, \.npy, \.parquet",
    ),
    "the same output twice": (["--output", "a.json", "a.json"], r"a\.json is given twice"),
    "auto without seeds": (
        ["--min-align", "auto"],
        "min_align auto is found from a clean starting set: give --seed-features or --seed-ids",
    ),
    "no such config": (["--config", "no.yaml"], r"the config file no\.yaml does not exist"),
    "no such recaptions": (["--recaptions", "no"], "the features no do not exist"),
    "no such seeds": (["--seed-features", "no"], "the features no do not exist"),
    "no such seed list": (["--seed-ids", "no.json"], r"the seed list no\.json does not exist"),
    "seeds given twice": (
        ["--seed-features", "a", "--seed-ids", "b"],
        "give --seed-features or --seed-ids, not both",
    ),
    "recaptions for labels": (
        ["--modality", "image", "--recaptions", "r"],
        "--recaptions has no use with --modality image",
    ),
}


@pytest.mark.parametrize("name", BAD_OPTIONS)
def test_a_bad_option_is_refused_before_any_work(grow, tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    arguments, told = BAD_OPTIONS[name]
    refused(grow(*arguments), told)
    assert not (tmp_path / "growth/manifest.json").exists()
    assert not (tmp_path / "out.json").exists()


BAD_CONFIGS = {
    "an unknown key": ("min_algin: 0.4\n", "unknown key 'min_algin' .*did you mean 'min_align'"),
    "a value that does not fit": ("k: many\n", "key 'k' in .* must be a whole number"),
    "a key given twice": ("k: 4\nk: 5\n", "key 'k' is given twice"),
    "no YAML": ("k: [4\n", "is not valid YAML"),
    "a list": ("- k\n", "must hold `key: value` lines"),
}


@pytest.mark.parametrize("name", BAD_CONFIGS)
def test_a_bad_config_file_is_refused(grow, tmp_path, name):
    content, told = BAD_CONFIGS[name]
    (tmp_path / "grow.yaml").write_text(content)
    refused(grow("--config", tmp_path / "grow.yaml"), told)


def test_a_missing_required_option_is_named(infogrowth):
    refused(infogrowth("grow", "--features", "f"), "growth is missing: give --growth")


BAD_SEED_LISTS = {
    "no JSON": ("[", "the seed list .* is not valid JSON"),
    "no list": ('{"a": 1}', "must be a JSON list of sample ids"),
    "an empty list": ("[]", "must be a JSON list of sample ids"),
    "a list of lists": ("[[1], [2]]", "must be a JSON list of sample ids"),
    "numbers, which are ids of other samples": ("[1, 2.0]", "none of the 2 seed ids is in"),
    "ids of other samples": ('["x", "y"]', "none of the 2 seed ids is in"),
}


@pytest.mark.parametrize("name", BAD_SEED_LISTS)
def test_a_bad_seed_list_is_refused(grow, tmp_path, name):
    content, told = BAD_SEED_LISTS[name]
    (tmp_path / "seeds.json").write_text(content)
    refused(grow("--seed-ids", tmp_path / "seeds.json"), told)
    assert not (tmp_path / "out.json").exists()


def test_some_unknown_seed_ids_are_told_and_the_others_used(grow, tmp_path):
    (tmp_path / "seeds.json").write_text('["s1", "s4", "unknown"]')
    status, message = grow("--seed-ids", tmp_path / "seeds.json")
    assert status == 0
    assert "1 of the 3 seed ids are not in" in message
    assert read_growth(tmp_path / "growth").totals["reasons"]["seed"] == 2


def test_recaptions_and_seeds_of_another_width_or_encoder_are_refused(
    grow, feature_folder, tmp_path
):
    narrow = np.ones((6, 5), np.float32)
    table = feature_folder("table", image=None, text=narrow)
    refused(grow("--recaptions", table), "table has features of dimension 5, and .* of 8")
    seeds = feature_folder("seeds", image=narrow, text=narrow)
    refused(grow("--seed-features", seeds), "seeds has features of dimension 5, and .* of 8")
    other = feature_folder("other", image=None)
    for folder, name in ((tmp_path / "features", "tiny"), (other, "big")):
        encoder = {"name": name, "fingerprint": name * 8}
        (folder / "features.json").write_text(json.dumps({"encoder": encoder, "finished": True}))
    refused(grow("--recaptions", other), "other was embedded with encoder big, and .* with tiny")


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
    refused(grow("--output", tmp_path / name), "lies inside the growth folder")
    assert contents(tmp_path / "growth") == before


def test_ids_that_are_no_datacomp_uids_cannot_become_a_subset(grow, tmp_path):
    answer = grow("--output", tmp_path / "uids.npy", "--quiet")
    refused(answer, "sample 's0' has no DataComp uid")
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
        r"growth has lost its manifest\.json",
    ),
    "lost settings": (lambda g: (g / "growth.json").unlink(), r"growth has lost its growth\.json"),
    "settings lost with the manifest": (
        lambda g: [(g / name).unlink() for name in ("growth.json", "manifest.json")],
        r"growth has lost its growth\.json",
    ),
    "a damaged manifest": (damaged_manifest, r"manifest\.json is damaged"),
    "an unknown format": (other_format, r"growth\.json has an unknown format"),
    "a manifest that is no JSON": (
        lambda g: (g / "manifest.json").write_text("{"),
        r"manifest\.json is not valid JSON",
    ),
    "a missing part": (
        lambda g: (g / "decisions/000000.parquet").unlink(),
        r"000000\.parquet of the growth folder is damaged",
    ),
    "a damaged array": (
        lambda g: (g / "kept/text_000000.npy").write_bytes(b"no"),
        r"text_000000\.npy of the growth folder is damaged",
    ),
    "an empty array file": (
        lambda g: (g / "kept/image_000000.npy").write_bytes(b""),
        r"image_000000\.npy of the growth folder is damaged",
    ),
    "an array cut off": (
        lambda g: cut_off(g / "kept/image_000000.npy"),
        r"image_000000\.npy of the growth folder is damaged",
    ),
    "an array cut off in its header": (
        lambda g: (g / "kept/image_000000.npy").write_bytes(b"\x93NUMPY\x01\x00v"),
        r"image_000000\.npy of the growth folder is damaged",
    ),
    "an array of another width": (
        lambda g: np.save(g / "kept/image_000000.npy", np.eye(6, 7, dtype=np.float32)),
        r"image_000000\.npy of the growth folder is damaged",
    ),
    "an array of no dimension": (
        lambda g: np.save(g / "kept/image_000000.npy", np.float32(1)),
        r"image_000000\.npy of the growth folder is damaged",
    ),
    "an array of text": (
        lambda g: np.save(g / "kept/image_000000.npy", np.full((6, 8), "a")),
        r"image_000000\.npy of the growth folder is damaged",
    ),
    "an array of fewer rows": (
        lambda g: np.save(g / "kept/text_000000.npy", np.eye(2, 8, dtype=np.float32)),
        "2 text features",
    ),
}


@pytest.mark.parametrize("name", BAD_GROWTH_FOLDERS)
def test_a_damaged_growth_folder_is_refused_and_left_as_it_is(grow, tmp_path, name):
    assert grow("--quiet")[0] == 0
    damage, told = BAD_GROWTH_FOLDERS[name]
    damage(tmp_path / "growth")
    before = contents(tmp_path / "growth")
    refused(grow("--quiet"), told)
    assert contents(tmp_path / "growth") == before


def contents(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file() and path.name != "lock")
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def test_a_growth_folder_with_other_things_in_it_is_left_alone(grow, tmp_path):
    (tmp_path / "growth").mkdir()
    (tmp_path / "growth/thesis.tex").write_text("years of work")
    refused(grow("--quiet"), r"growth is not a growth folder: it holds 'thesis\.tex'")
    assert [path.name for path in (tmp_path / "growth").iterdir()] == ["thesis.tex"]


def test_a_growth_folder_that_is_a_file_is_refused(grow, tmp_path):
    (tmp_path / "growth").write_text("not a folder")
    refused(grow("--quiet"), "cannot use .*growth as the growth folder")


ENTRY = '{"image": "a", "caption": "c", "gains": [0.5, 0.5]}'
BAD_ANNOTATIONS = {
    "no JSON": (b"[{]", "line 1"),
    "no list": (b"{}", "must hold a list of samples, not a dict"),
    "no UTF-8": (b'["\xff\xfe"]', "utf-8"),
    "an empty list": (b"[]", "holds no samples to select from"),
    "an entry that is no object": (b'["a"]', "sample 0 of .* must be an object"),
    "an entry without id": (b'[{"caption": "c"}]', "sample 0 of .* has no image id"),
    "an entry without caption": (b'[{"image": "a"}]', r"sample 0 of .* \('a'\) has no caption"),
    "an entry without gains": (
        f'[{ENTRY}, {{"image": "b", "caption": "c"}}]'.encode(),
        r"sample 1 \('b'\) has no gains",
    ),
    "one gain": (ENTRY.replace("[0.5, 0.5]", "[0.5]"), r"has gains \[0\.5\], not two numbers"),
    "gains of words": (ENTRY.replace("0.5, 0.5", '"much", "more"'), "has gains .*not two numbers"),
    "gains of NaN": (ENTRY.replace("0.5, 0.5", "NaN, 1"), "has gains that are not finite"),
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
        "the total gain of the 1 samples is zero",
    ),
}


@pytest.mark.parametrize("name", BAD_ANNOTATIONS)
def test_a_bad_annotation_file_is_refused(infogrowth, tmp_path, name):
    content, told = BAD_ANNOTATIONS[name]
    content = content if isinstance(content, bytes) else f"[{content}]".encode()
    (tmp_path / "in.json").write_bytes(content)
    output = tmp_path / "out.json"
    arguments = ("--annotations", tmp_path / "in.json", "--output", output, "--bernoulli")
    refused(infogrowth("select", *arguments), told)
    assert not output.exists()
