"""What the real producers write is read: webdataset's TarWriter, Hugging Face datasets."""

import io
import json

import pytest
from PIL import Image

from infogrowth.data.sources import open_source, open_splits


def found(source):
    return {sample.id: (sample.data, sample.caption) for sample in source if not sample.problem}


@pytest.mark.parametrize("suffix", [".tar", ".tar.gz"])
@pytest.mark.parametrize("fields", [("jpg", "txt"), ("jpg", "json"), ("image.jpg", "caption.txt")])
def test_webdatasets_tar_writer(tmp_path, pairs, suffix, fields):
    webdataset = pytest.importorskip("webdataset")
    image, caption = fields
    for shard, keys in enumerate((list(pairs)[:5], list(pairs)[5:])):
        with webdataset.TarWriter(str(tmp_path / f"pairs-train-{shard:06d}{suffix}")) as writer:
            for key in keys:
                data, text = pairs[key]
                text = {"caption": text} if caption == "json" else text
                writer.write({"__key__": f"shoot/{key}", image: data, caption: text})
    with webdataset.TarWriter(str(tmp_path / f"pairs-test-000000{suffix}")) as writer:
        writer.write({"__key__": "x", image: pairs["000000000"][0], caption: "never trained on"})
    sources = open_splits(tmp_path)
    assert found(sources["train"]) == {f"shoot/{key}": pair for key, pair in pairs.items()}
    assert list(sources) == ["train", "test"]


def test_hugging_faces_parquet(tmp_path, pairs):
    datasets = pytest.importorskip("datasets")
    features = datasets.Features(image=datasets.Image(), text=datasets.Value("string"))
    for split in ("train", "validation"):
        rows = {
            "image": [{"bytes": data, "path": f"{key}.jpg"} for key, (data, _) in pairs.items()],
            "text": [f"{split} {text}" for _, text in pairs.values()],
        }
        table = datasets.Dataset.from_dict(rows, features=features)
        (tmp_path / "data").mkdir(exist_ok=True)
        table.to_parquet(str(tmp_path / "data" / f"{split}-00000-of-00001.parquet"))
    sources = open_splits(tmp_path)
    for split, word in (("train", "train"), ("val", "validation")):
        assert found(sources[split]) == {
            key: (data, f"{word} {text}") for key, (data, text) in pairs.items()
        }


@pytest.mark.parametrize("name", ["metadata.jsonl", "metadata.csv", "metadata.parquet"])
def test_an_imagefolder_is_read_as_datasets_reads_it(tmp_path, pairs, name):
    datasets = pytest.importorskip("datasets")
    folder = tmp_path / "set" / "train"
    (folder / "part").mkdir(parents=True)
    rows = []
    for key, (data, text) in pairs.items():
        (folder / "part" / f"{key}.jpg").write_bytes(data)
        rows.append({"file_name": f"part/{key}.jpg", "text": text})
    table = datasets.Dataset.from_list(rows)
    if name.endswith("jsonl"):
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        getattr(table, f"to_{name.rpartition('.')[2]}")(str(folder / name))
    theirs = datasets.load_dataset(
        "imagefolder", data_dir=str(tmp_path / "set"), split="train", cache_dir=str(tmp_path / "c")
    )
    ours = open_source(tmp_path / "set")
    assert {sample.caption for sample in ours} == set(theirs["text"])
    assert found(ours) == {f"part/{key}": pair for key, pair in pairs.items()}
    assert Image.open(io.BytesIO(ours.read(0).data)).size == theirs[0]["image"].size
