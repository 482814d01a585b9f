"""Retrieval sets from the three forms of caption files."""

import json

import numpy as np
import pytest
import torch
from drawn_images import drawn, encoded

from infogrowth.data.datasets import PairDataset, RetrievalEvaluation, training_pairs
from infogrowth.data.image_stores import LmdbWriter
from infogrowth.data.transforms import MEAN, STD, EvaluationTransform, TrainingTransform
from infogrowth.errors import UserError

TRANSFORM = EvaluationTransform(16)


def write(path, content):
    path.write_text(json.dumps(content))
    return path


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    for sub in ("val2014", "train2014", "val2017"):
        (folder / sub).mkdir()
    for number in range(6):
        data = encoded(drawn(number))
        for sub in ("val2014", "train2014"):
            (folder / sub / f"COCO_{sub}_{number:012d}.jpg").write_bytes(data)
        (folder / "val2017" / f"{number:012d}.jpg").write_bytes(data)
    return folder


@pytest.fixture
def blip_train(tmp_path):
    rows = [
        ("val2014/COCO_val2014_000000000001.jpg", "A dog.", "coco_1"),
        ("train2014/COCO_train2014_000000000002.jpg", "A cat.", "coco_2"),
        ("val2014/COCO_val2014_000000000001.jpg", "A big dog!", "coco_1"),
    ]
    return write(
        tmp_path / "coco_karpathy_train.json",
        [{"image": image, "caption": text, "image_id": number} for image, text, number in rows],
    )


@pytest.fixture
def karpathy(tmp_path):
    splits = ["train", "restval", "val", "test", "test", "train"]
    return write(
        tmp_path / "dataset_coco.json",
        {
            "dataset": "coco",
            "images": [
                {
                    "filepath": "val2014",
                    "filename": f"COCO_val2014_{number:012d}.jpg",
                    "split": split,
                    "cocoid": number,
                    "sentences": [{"raw": f"Text {number}, {n}."} for n in range(5 + number)],
                }
                for number, split in enumerate(splits)
            ],
        },
    )


@pytest.fixture
def official(tmp_path):
    return write(
        tmp_path / "captions_val2017.json",
        {
            "info": {},
            "images": [
                {
                    "id": number,
                    "file_name": f"{number:012d}.jpg",
                    "coco_url": f"http://images.cocodataset.org/val2017/{number:012d}.jpg",
                }
                for number in (4, 2)
            ],
            "annotations": [
                {"id": n, "image_id": number, "caption": text}
                for n, (number, text) in enumerate([(2, "two"), (4, "four"), (2, "also two")])
            ],
        },
    )


def test_training_rows_are_pairs_with_the_number_of_their_image(images, blip_train):
    pairs, numbers = training_pairs([blip_train])
    dataset = PairDataset(pairs, images, TrainingTransform(16), seed=1, classes=numbers)
    found = [(dataset[n]["caption"], dataset[n]["class"]) for n in range(len(dataset))]
    assert found == [("a dog", 0), ("a big dog", 0), ("a cat", 1)]
    assert dataset[(0, 3, 7)]["image"].shape == (3, 16, 16)
    assert not torch.equal(dataset[(0, 3, 7)]["image"], dataset[(0, 3, 8)]["image"])


def test_restval_is_for_training_and_files_can_be_joined(images, karpathy, blip_train):
    pairs, ids = training_pairs([karpathy, blip_train])
    dataset = PairDataset(pairs, images, TRANSFORM)
    texts = [dataset[n]["caption"] for n in range(len(dataset))]
    assert len(texts) == 5 + 6 + 10 + 3
    assert texts[:2] == ["text 0, 0", "text 0, 1"] and "text 1, 5" in texts
    assert ids == [0] * 5 + [1] * 6 + [2] * 10 + [3, 3, 4]


def test_evaluation_has_every_image_once_and_all_texts(images, karpathy):
    dataset = RetrievalEvaluation(f"{karpathy}:test", images, TRANSFORM)
    assert len(dataset) == 2
    assert dataset.names == [f"val2014/COCO_val2014_{n:012d}.jpg" for n in (3, 4)]
    assert len(dataset.texts) == 8 + 9  # more than five each
    assert dataset.txt2img == [0] * 8 + [1] * 9
    assert dataset.img2txt == [list(range(8)), list(range(8, 17))]
    assert dataset.texts[8] == "text 4, 0"
    assert dataset[1]["index"] == 1


def test_blips_evaluation_files_hold_lists_of_captions(tmp_path, images):
    file = write(
        tmp_path / "coco_karpathy_val.json",
        [
            {"image": "val2014/COCO_val2014_000000000001.jpg", "caption": ["A.", "B", " ", "C!"]},
            {"image": "val2014/COCO_val2014_000000000002.jpg", "caption": ["D"]},
        ],
    )
    dataset = RetrievalEvaluation(file, images, TRANSFORM)
    assert dataset.texts == ["a", "b", "c", "d"]
    assert dataset.img2txt == [[0, 1, 2], [3]] and dataset.txt2img == [0, 0, 0, 1]


def test_official_captions_are_read_with_the_folder_of_their_address(images, official, capsys):
    dataset = RetrievalEvaluation(official, images, TRANSFORM)
    assert dataset.names == ["val2017/000000000004.jpg", "val2017/000000000002.jpg"]
    assert dataset.texts == ["four", "two", "also two"]
    assert dataset.img2txt == [[0], [1, 2]]
    assert capsys.readouterr().out == ""
    from_its_own_folder = RetrievalEvaluation(official, images / "val2017", TRANSFORM)
    assert torch.equal(dataset[0]["image"], from_its_own_folder[0]["image"])


def test_images_come_from_an_lmdb_as_well(tmp_path, images, karpathy):
    with LmdbWriter(tmp_path / "lmdb") as writer:
        for file in (images / "val2014").iterdir():
            writer.put(file.name, file.read_bytes())
    from_lmdb = RetrievalEvaluation(karpathy, tmp_path / "lmdb", TRANSFORM, split="val")
    from_folder = RetrievalEvaluation(f"{karpathy}:val", images, TRANSFORM)
    assert len(from_lmdb) == 1
    assert torch.equal(from_lmdb[0]["image"], from_folder[0]["image"])


def test_evaluation_images_are_normalised_once(tmp_path, images):
    """Trap 2: the paper's validation images went through the normalisation twice."""
    file = write(tmp_path / "f.json", [{"image": "val2017/000000000003.jpg", "caption": "x"}])
    image = RetrievalEvaluation(file, images, TRANSFORM)[0]["image"]
    pixels = np.asarray(drawn(3).resize((16, 16), 3)) / 255  # before JPEG
    restored = image.permute(1, 2, 0).numpy() * STD + MEAN
    assert np.abs(restored - pixels).mean() < 0.05
    assert restored.max() <= 1.0001 and restored.min() >= -0.0001


def test_an_image_that_cannot_be_evaluated_is_named(tmp_path):
    (tmp_path / "bad.jpg").write_bytes(encoded(drawn(0))[:300])
    file = write(tmp_path / "f.json", [{"image": n, "caption": "x"} for n in ("bad.jpg", "gone")])
    dataset = RetrievalEvaluation(file, tmp_path, TRANSFORM)
    with pytest.raises(UserError, match=r"bad\.jpg.*truncated"):
        dataset[0]
    with pytest.raises(UserError, match="gone"):
        dataset[1]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("text", "neither"),
        ({"a": 1}, "neither"),
        ([], "no image"),
        ([{"image": "x", "caption": ["", " "]}], "no image"),
        ([1], "it names no image"),
        ([{"caption": "x"}], "it names no image"),
        ([{"image": "x"}], "x.*missing"),
        ([{"image": "x", "caption": [1]}], "x.*not text"),
        ({"images": [{"split": "val"}]}, "no image"),
        ({"images": [1]}, "no image"),
        ({"images": [{"id": 1}], "annotations": [{"id": 0}]}, "no image"),
        (
            {"images": [], "annotations": [{"id": 0, "image_id": 7, "caption": "x"}]},
            "image 7",
        ),
    ],
)
def test_files_that_are_no_caption_files_give_one_sentence(tmp_path, content, message):
    file = write(tmp_path / "f.json", content)
    with pytest.raises(UserError, match=message):
        RetrievalEvaluation(file, tmp_path, TRANSFORM)


def test_captions_of_removed_images_and_bad_entries_are_left_out_with_a_warning(
    tmp_path, images, official, caplog
):
    content = json.loads(official.read_text())
    content["categories"] = [{"id": 1, "name": "thing"}]
    content["annotations"] += [{"image_id": 99, "caption": "gone"}, {"image_id": 4}, 7]
    for annotation in content["annotations"][:-1]:
        annotation.pop("id", None)
    content["annotations"][0]["image_id"] = "2"  # as text, where the image has a number
    dataset = RetrievalEvaluation(write(tmp_path / "f.json", content), images, TRANSFORM)
    assert dataset.texts == ["four", "two", "also two"]
    assert "left out: 1" in caplog.text


@pytest.mark.parametrize("name", ["a.jpg", "a", "A.JPG", "sub\\b.jpg", "e\u0301.png"])
def test_images_of_a_folder_are_found_whatever_their_capitals_and_unicode(tmp_path, name):
    (tmp_path / "sub").mkdir()
    for file in ("A.JPG", "sub/b.JPEG", "é.PNG"):
        (tmp_path / file).write_bytes(encoded(drawn(1)))
    file = write(tmp_path / "f.json", [{"image": name, "caption": "x"}])
    assert RetrievalEvaluation(file, tmp_path, TRANSFORM)[0]["image"].shape == (3, 16, 16)


def test_karpathys_file_needs_a_split_to_evaluate(tmp_path, images, karpathy):
    with pytest.raises(UserError, match="restval, test, train, val"):
        RetrievalEvaluation(karpathy, images, TRANSFORM)
    with pytest.raises(UserError, match="exist"):
        RetrievalEvaluation(tmp_path / "gone.json:test", images, TRANSFORM)
    with pytest.raises(UserError, match="dev"):
        RetrievalEvaluation(karpathy, images, TRANSFORM, split="dev")
