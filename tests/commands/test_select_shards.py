"""`select --output DIR`: webdataset shards that webdataset, open_clip and this project read."""

import io
import json
import tarfile
from argparse import Namespace
from collections import Counter

import numpy as np
import pyarrow.parquet as pq
import pytest
import webdataset

from infogrowth import GainSampler, GainShards, UserError, gains_array, load_annotations
from infogrowth.data.exports import shard_key


@pytest.fixture
def grown(repository):
    """The bundled sample as it was grown, and its images in webdataset shards."""
    return repository / "processed_data/sample_grown.json", repository / "processed_data/sample"


@pytest.fixture
def shards(grown, infogrowth, tmp_path):
    """The 120 samples of highest gain in shards of 50."""
    annotations, images = grown
    folder = tmp_path / "shards"
    arguments = ("--annotations", annotations, "--images", images, "--shard-size", 50)
    assert infogrowth("select", *arguments, "--top", 120, "--output", folder)[0] == 0
    return folder


def content(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_shards_hold_images_captions_and_gains(shards, grown):
    annotations, images = grown
    everything = load_annotations(annotations)
    gains = gains_array(everything).mean(axis=1)
    best = [everything[row] for row in sorted(np.argsort(-gains, kind="stable")[:120])]
    stored = {}
    for tar in sorted(images.glob("*.tar")):
        with tarfile.open(tar) as file:
            stored |= {m.name: file.extractfile(m).read() for m in file if m.isfile()}
    urls = sorted(map(str, shards.glob("*.tar")))
    read = list(webdataset.WebDataset(urls, shardshuffle=False))
    assert [len(urls), len(read)] == [3, 120]
    for sample, expected in zip(read, best, strict=True):
        metadata = json.loads(sample["json"])
        assert metadata["id"] == expected["image"]
        assert sample["txt"].decode() == metadata["caption"] == expected["caption"]
        assert [metadata["gain_image"], metadata["gain_text"]] == expected["gains"]
        extension = next(kind for kind in ("png", "webp", "jpg") if kind in sample)
        assert sample[extension] == stored[f"{expected['image']}.{extension}"]
    sizes = json.loads((shards / "sizes.json").read_text())
    assert sizes == {"00000.tar": 50, "00001.tar": 50, "00002.tar": 20}


def test_a_run_that_was_stopped_ends_with_the_same_bytes(shards, grown, infogrowth):
    whole = content(shards)
    annotations, images = grown
    (shards / "00001.tar").unlink()
    (shards / "sizes.json").unlink()
    (shards / "00002.tar.tmp-1-abc").write_bytes(b"half")
    arguments = ("--annotations", annotations, "--images", images, "--output", shards)
    status, printed = infogrowth("select", *arguments, "--top", 120, "--shard-size", 50)
    assert status == 0
    assert "2 of them by an earlier run" in printed
    assert content(shards) == whole
    for other in (["--top", 119], ["--top", 60], ["--top", 120, "--shard-size", 49]):
        status, printed = infogrowth("select", *arguments, *["--shard-size", 50, *other])
        assert status == 2
        assert "another selection" in printed or "selection" in printed
    assert content(shards) == whole


def test_open_clips_own_loader_reads_them(shards):
    loader = pytest.importorskip("open_clip_train.data")
    args = Namespace(
        val_data=str(shards / "{00000..00002}.tar"), val_num_samples=120, workers=1, batch_size=40
    )
    data = loader.get_wds_dataset(
        args, preprocess_img=pixels, is_train=False, tokenizer=lambda text: [text]
    )
    batches = list(data.dataloader)
    assert [len(captions) for _, captions in batches] == [40, 40, 40]
    captions = [text for _, texts in batches for text in texts]
    assert captions == pq.read_table(sorted(shards.glob("*.parquet")))["caption"].to_pylist()
    assert batches[0][0][0].shape == (16, 16, 3)


def pixels(image):
    return np.asarray(image.resize((16, 16)))


def test_this_project_reads_its_own_shards(shards, infogrowth, tmp_path):
    assert infogrowth("pack", "--image-root", shards, "--output-root", tmp_path / "packed")[0] == 0
    packed = load_annotations(tmp_path / "packed/cc3m_train.json")
    table = pq.read_table(sorted(shards.glob("*.parquet")))
    expected = dict(zip(table["key"].to_pylist(), table["caption"].to_pylist(), strict=True))
    assert {entry["image"]: entry["caption"] for entry in packed} == expected


def test_pictures_come_from_an_lmdb_or_a_folder_and_the_missing_are_recorded(
    grown, infogrowth, tmp_path
):
    images = grown[1]
    with tarfile.open(sorted(images.glob("*.tar"))[0]) as tar:
        members = [member for member in tar if not member.name.endswith(".json")][:20]
        tar.extractall(tmp_path / "folder", members, filter="data")
    arguments = ("--image-root", tmp_path / "folder", "--output-root", tmp_path)
    assert infogrowth("pack", *arguments)[0] == 0
    names = [entry["image"] for entry in load_annotations(tmp_path / "cc3m_train.json")]
    entries = [
        {"image": name, "caption": ["one", "two"], "gains": [1, 1], "page": f"p {name}"}
        for name in [*names, "gone"]
    ]
    (tmp_path / "in.json").write_text(json.dumps(entries))
    for kind, where in {"lmdb": "lmdb_train", "files": "folder"}.items():
        status, printed = infogrowth(
            "select", "--annotations", tmp_path / "in.json", "--images", tmp_path / where,
            "--where", "true", "--output", f"{tmp_path / kind}/",
        )  # fmt: skip
        assert status == 0
        assert "1 left out: the image is missing" in printed
    assert content(tmp_path / "lmdb") == content(tmp_path / "files")
    table = pq.read_table(tmp_path / "lmdb/00000.parquet").to_pylist()
    assert [row["status"] for row in table] == ["success"] * len(names) + ["failed"]
    assert table[0]["page"] == f"p {names[0]}"
    assert table[0]["captions"] == ["one", "two"]


def test_samples_are_drawn_from_shards_with_the_probability_of_their_gain(shards):
    drawn = GainShards(shards, mode="gain", seed=3)
    count, epochs = Counter(), 400
    for sample in webdataset.DataPipeline(drawn.visits(range(epochs)), drawn.samples):
        count[sample["__key__"]] += 1
    weights = {k: w for url in drawn.urls for k, w in drawn.sample_weights(url).items()}
    chance = np.array(list(weights.values()))
    # The same probabilities as those of the sampler that draws rows.
    table = pq.read_table(sorted(shards.glob("*.parquet")))
    gains = np.stack([table["gain_image"].to_numpy(), table["gain_text"].to_numpy()], axis=1)
    drawn_rows = np.concatenate([list(sampler(gains, epoch)) for epoch in range(0, 2 * epochs, 2)])
    often = np.array([count[key] for key in weights])
    error = np.sqrt(np.maximum(chance * (1 - chance), 1e-12) / epochs)
    assert (np.abs(often / epochs - chance) <= 5 * error + 1e-9).all()
    by_row = np.bincount(drawn_rows, minlength=len(gains)) / epochs
    assert (np.abs(by_row - chance) <= 5 * error + 1e-9).all()


def sampler(gains, epoch):
    rows = GainSampler(gains, mode="two_phase", seed=3)
    rows.set_epoch(epoch)
    return rows


def test_the_drawn_samples_are_the_same_however_many_workers_read(shards):
    drawn = GainShards(shards, seed=1)
    stages = (drawn.visits(range(2)), webdataset.split_by_worker, drawn.samples)
    pipeline = webdataset.DataPipeline(*stages, webdataset.to_tuple("__key__", "txt"))
    alone = Counter(key for key, _ in pipeline)
    loader = webdataset.WebLoader(pipeline, num_workers=2, batch_size=None)
    assert Counter(key for key, _ in loader) == alone
    odd = GainShards(shards, seed=1).sample_weights(drawn.urls[0], epoch=1)
    assert min(odd.values()) == pytest.approx(0.1)


def test_what_holds_no_shards_is_refused(tmp_path):
    for folder in (tmp_path, tmp_path / "missing"):
        with pytest.raises(UserError, match=str(folder)):
            GainShards(folder)


@pytest.mark.parametrize("name", ["a.jpg", "x/y.tar/1.2", "ä ~%", "http://a/b?c=1"])
def test_keys_are_safe_and_lead_back_to_the_id(name):
    from urllib.parse import unquote

    key = shard_key(name)
    assert not set("./~ ") & set(key)
    assert unquote(key) == name
    stream = io.BytesIO()
    with webdataset.TarWriter(stream, encoder=False) as writer:
        writer.write({"__key__": key, "txt": b"t"})
    stream.seek(0)
    from webdataset.tariterators import group_by_keys, tar_file_expander

    (read,) = group_by_keys(tar_file_expander([{"url": "", "stream": stream}]))
    assert read["__key__"] == key
