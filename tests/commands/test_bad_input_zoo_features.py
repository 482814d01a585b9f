"""The zoo of broken feature folders and files: refused in one sentence, nothing written."""

import json
import pickle
import re
import zipfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch


def replace_array(folder, name, array):
    np.save(next((folder / name).iterdir()), array)


def truncate(path):
    path.write_bytes(path.read_bytes()[:-20])


def first(folder, name):
    return sorted((folder / name).iterdir())[0]


def metadata(folder, **columns):
    pq.write_table(pa.table(columns), first(folder, "metadata"))


def metadata_with_twice(folder, name):
    names = ["image_path", "caption", name]
    pq.write_table(pa.table([list("abcdef")] * 3, names), first(folder, "metadata"))


def rename_away(folder, name):
    (folder / name).rename(folder / f"old_{name}")


def describe(folder, **content):
    (folder / "features.json").write_text(json.dumps(content))


def second_shard(folder, dimension):
    for name in ("img_emb", "text_emb"):
        np.save(folder / name / f"{name}_01.npy", np.ones((1, dimension), np.float32))
    table = pa.table({"image_path": ["z"], "caption": ["z"]})
    pq.write_table(table, folder / "metadata/metadata_01.parquet")


# What is done to a good folder of 6 samples, and what the error says of it.
BROKEN_FOLDERS = {
    "array cut off": (
        lambda f: truncate(first(f, "img_emb")),
        r"img_emb_00\.npy cannot be read",
    ),
    "array is no npy": (
        lambda f: first(f, "text_emb").write_bytes(b"hello"),
        r"text_emb_00\.npy cannot be read",
    ),
    "array is empty": (
        lambda f: first(f, "text_emb").write_bytes(b""),
        r"text_emb_00\.npy cannot be read",
    ),
    "array of objects": (
        lambda f: np.save(first(f, "img_emb"), np.array([{}] * 6), allow_pickle=True),
        r"img_emb_00\.npy cannot be read",
    ),
    "array of one dimension": (
        lambda f: replace_array(f, "img_emb", np.ones(6, np.float32)),
        r"must hold floating-point features of shape \(samples, dimension\), not float32 of shape",
    ),
    "array of whole numbers": (
        lambda f: replace_array(f, "img_emb", np.ones((6, 8), np.int64)),
        r"must hold floating-point features .* not int64",
    ),
    "array without columns": (
        lambda f: replace_array(f, "img_emb", np.ones((6, 0), np.float32)),
        r"float32 of shape \(6, 0\)",
    ),
    "fewer images than captions": (
        lambda f: replace_array(f, "img_emb", np.ones((5, 8), np.float32)),
        r"row counts do not agree: .*img_emb_00\.npy has 5, .*text_emb_00\.npy has 6, "
        r".*metadata_00\.parquet has 6",
    ),
    "image and text of different width": (
        lambda f: replace_array(f, "img_emb", np.ones((6, 4), np.float32)),
        r"text_emb_00\.npy has text features of dimension 8, but .*img_emb_00\.npy has image .* 4",
    ),
    "shards of different width": (
        lambda f: second_shard(f, 5),
        r"img_emb_01\.npy has image features of dimension 5, but .*img_emb_00\.npy has .* 8",
    ),
    "a shard without text": (
        lambda f: np.save(f / "img_emb/img_emb_07.npy", np.ones((1, 8), np.float32)),
        "shard 7 of .* has no text features file",
    ),
    "two files of one shard": (
        lambda f: np.save(f / "img_emb/img_emb_0.npy", np.ones((6, 8), np.float32)),
        r"img_emb_0\.npy .*img_emb_00\.npy",
    ),
    "no text features": (
        lambda f: rename_away(f, "text_emb"),
        "text_emb.*--modality image",
    ),
    "no image features": (
        lambda f: rename_away(f, "img_emb"),
        "no image features",
    ),
    "no metadata": (
        lambda f: rename_away(f, "metadata"),
        "no metadata",
    ),
    "metadata cut off": (
        lambda f: truncate(first(f, "metadata")),
        r"metadata_00\.parquet cannot be read",
    ),
    "metadata without ids": (
        lambda f: metadata(f, caption=["c"] * 6, url=["u"] * 6),
        "image_path.*caption, url",
    ),
    "metadata without captions": (
        lambda f: metadata(f, image_path=list("abcdef")),
        "column .*'caption'",
    ),
    "metadata with two columns of captions": (
        lambda f: metadata_with_twice(f, "caption"),
        r"metadata_00\.parquet .*'caption'",
    ),
    "metadata with two columns of ids": (
        lambda f: metadata_with_twice(f, "image_path"),
        r"metadata_00\.parquet .*'image_path'",
    ),
    "embed not finished": (
        lambda f: describe(f, finished=False),
        "not finished",
    ),
    "shards missing": (
        lambda f: describe(f, finished=True, shards=3),
        r"1 .*features\.json .*3",
    ),
    "description is no JSON": (
        lambda f: (f / "features.json").write_text("{"),
        r"features\.json .*line 1",
    ),
    "description is a list": (
        lambda f: (f / "features.json").write_text("[]"),
        r"features\.json .*object",
    ),
    "list of skipped samples is damaged": (
        lambda f: (f / "skipped.jsonl").write_text('{"id": "a", "reason": "x"}\n{"id":\n'),
        r"skipped\.jsonl, line 2,",
    ),
}


def refused(infogrowth, tmp_path, features, *more):
    """Run `grow`; it must end with status 2 and one sentence, and leave nothing behind."""
    status, printed = infogrowth(
        "grow", "--features", features, "--growth", tmp_path / "growth",
        "--output", tmp_path / "out.json", *more,
    )  # fmt: skip
    assert status == 2
    assert printed.startswith("error: ")
    assert printed.count("\n") == 1
    assert not (tmp_path / "out.json").exists()
    assert not (tmp_path / "growth/manifest.json").exists()
    return printed


@pytest.mark.parametrize("name", BROKEN_FOLDERS)
def test_a_broken_features_folder_is_refused(feature_folder, infogrowth, tmp_path, name):
    breaking, pattern = BROKEN_FOLDERS[name]
    folder = feature_folder("features")
    breaking(folder)
    assert re.search(pattern, refused(infogrowth, tmp_path, folder))


def test_a_missing_folder_is_refused(infogrowth, tmp_path):
    assert re.search("nowhere do not exist", refused(infogrowth, tmp_path, tmp_path / "nowhere"))


def test_an_empty_folder_is_refused(infogrowth, tmp_path):
    (tmp_path / "empty").mkdir()
    assert re.search(
        r"empty holds no features: expected img_emb/\*\.npy",
        refused(infogrowth, tmp_path, tmp_path / "empty"),
    )


def test_a_folder_of_no_samples_is_refused(feature_folder, infogrowth, tmp_path):
    folder = feature_folder("features")
    for name in ("img_emb", "text_emb"):
        replace_array(folder, name, np.ones((0, 8), np.float32))
    metadata(folder, image_path=pa.array([], pa.string()), caption=pa.array([], pa.string()))
    assert re.search("features hold no samples", refused(infogrowth, tmp_path, folder))


def torch_file(path, **change):
    content = {"ids": list("abc"), "captions": list("xyz")}
    features = {"image": torch.ones(3, 4), "text": torch.ones(3, 4)}
    torch.save({**content, **features, **change}, path)
    return path


def damaged_in_the_middle(path):
    """A compressed npz whose members cannot be inflated; its table of contents is whole."""
    with zipfile.ZipFile(path) as content:
        members = content.infolist()
    data = bytearray(path.read_bytes())
    for member in members:
        start = member.header_offset + 30 + len(member.filename) + 20  # 20: numpy's zip64 field
        data[start : start + member.compress_size // 2] = b"\xff" * (member.compress_size // 2)
    path.write_bytes(data)
    return path


def compressed_arrays(path):
    noise = np.random.default_rng(0).normal(size=(3, 400)).astype(np.float32)
    np.savez_compressed(path, ids=list("abc"), captions=list("xyz"), image=noise, text=noise)
    return damaged_in_the_middle(path)


def renamed_npy(path):
    with open(path, "wb") as file:
        np.save(file, np.ones((3, 4), np.float32))
    return path


class Unsafe:
    """Pickled, it would run code when loaded."""

    def __reduce__(self):
        return (Path.touch, (Path("run-by-pickle"),))


def arrays_file(path, **change):
    content = {
        "ids": np.array(list("abc")),
        "captions": np.array(["x", "y", "z"]),
        "image": np.ones((3, 4), np.float32),
        "text": np.ones((3, 4), np.float32),
        **change,
    }
    content = {name: value for name, value in content.items() if value is not None}
    if path.suffix == ".npz":
        np.savez(path, **content)
    else:
        torch.save({name: value.tolist() for name, value in content.items()}, path)
    return path


BROKEN_FILES = {
    "another kind of file": (
        lambda d: (d / "f.csv").write_text("a,b") and d / "f.csv",
        r"f\.csv .*\.npz",
    ),
    "npz that is no zip": (
        lambda d: (d / "f.npz").write_bytes(b"PK nonsense") and d / "f.npz",
        r"f\.npz cannot be read",
    ),
    "npz of Python objects": (
        lambda d: arrays_file(d / "f.npz", captions=np.array([{}, 1, "x"], object)),
        r"f\.npz .*Object arrays",
    ),
    "compressed npz with damaged members": (
        lambda d: compressed_arrays(d / "f.npz"),
        r"f\.npz .*decompressing",
    ),
    "npy renamed npz": (
        lambda d: renamed_npy(d / "f.npz"),
        r"f\.npz .*single array",
    ),
    "npz without ids": (
        lambda d: arrays_file(d / "f.npz", ids=None),
        r"f\.npz .*'ids' .*captions, image, text",
    ),
    "npz without captions": (
        lambda d: arrays_file(d / "f.npz", captions=None),
        r"f\.npz .*'captions'",
    ),
    "npz of different lengths": (
        lambda d: arrays_file(d / "f.npz", text=np.ones((2, 4), np.float32)),
        r"f\.npz:image .*3, .*f\.npz:text .*2",
    ),
    "pth of lists where arrays should be": (
        lambda d: arrays_file(d / "f.pth"),
        r"f\.pth .*floating-point",
    ),
    "pth of a sparse tensor": (
        lambda d: torch_file(d / "f.pth", image=torch.ones(3, 4).to_sparse()),
        r"f\.pth .*'image' .*[Ss]parse",
    ),
    "pth of a single id": (
        lambda d: torch_file(d / "f.pth", ids=torch.tensor(3)),
        r"f\.pth: 'ids'",
    ),
    "pth of Python objects": (
        lambda d: torch_file(d / "f.pth", ids=Path("a")),
        r"f\.pth .*weights_only[^\x1b]+\n$",
    ),
    "pth that is cut off": (
        lambda d: (d / "f.pth").write_bytes(b"\x80\x02") and d / "f.pth",
        r"f\.pth .*weights_only[^\x1b]+\n$",
    ),
}


@pytest.mark.parametrize("name", BROKEN_FILES)
def test_a_broken_file_of_arrays_is_refused(infogrowth, tmp_path, name):
    making, pattern = BROKEN_FILES[name]
    assert re.search(pattern, refused(infogrowth, tmp_path, making(tmp_path)))


def test_a_pickle_with_code_in_it_is_refused_and_not_run(infogrowth, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "evil.pth"
    path.write_bytes(pickle.dumps({"ids": Unsafe()}, protocol=2))
    assert re.search(r"evil\.pth cannot be read", refused(infogrowth, tmp_path, path))
    torch.save({"ids": Unsafe()}, path)
    assert re.search(r"evil\.pth cannot be read", refused(infogrowth, tmp_path, path))
    assert not (tmp_path / "run-by-pickle").exists()


def datacomp(folder, keys=("b32",), rows=4):
    folder.mkdir()
    stem = folder / ("0" * 32)
    uids = [f"{row:032x}" for row in range(4)]
    pq.write_table(pa.table({"uid": uids, "text": ["t"] * 4}), stem.with_suffix(".parquet"))
    names = [f"{key}_{part}" for key in keys for part in ("img", "txt")]
    np.savez(stem.with_suffix(".npz"), **{n: np.ones((rows, 4), np.float16) for n in names})
    return folder


def lone_datacomp(folder):
    datacomp(folder)
    np.savez(folder / ("1" * 32), b32_img=np.ones((1, 4), np.float16))
    return folder


BROKEN_DATACOMP = {
    "a npz without its parquet": (lone_datacomp, r"1{32}\.parquet is missing"),
    "two kinds of features": (
        lambda f: datacomp(f, ("b32", "l14")),
        "b32.* l14.*--feature-key",
    ),
    "no known kind of features": (
        lambda f: datacomp(f, ("h14",)),
        "b32_img.*h14_img",
    ),
    "row counts that differ": (
        lambda f: datacomp(f, rows=3),
        r"\.npz:b32_img .*3, .*\.parquet .*4",
    ),
}


@pytest.mark.parametrize("name", BROKEN_DATACOMP)
def test_a_broken_datacomp_folder_is_refused(infogrowth, tmp_path, name):
    making, pattern = BROKEN_DATACOMP[name]
    assert re.search(pattern, refused(infogrowth, tmp_path, making(tmp_path / "datacomp")))


def test_a_kind_of_features_that_datacomp_does_not_hold_is_refused(infogrowth, tmp_path):
    folder = datacomp(tmp_path / "datacomp")
    assert re.search("l14.*b32_img", refused(infogrowth, tmp_path, folder, "--feature-key", "l14"))
