"""Training pairs: the same in any worker, robust against bad images, clear about missing ones."""

import logging
import pickle
import re
from collections import Counter

import numpy as np
import pytest
import torch
from drawn_images import drawn, encoded
from torch.utils.data import DataLoader

from infogrowth.data.datasets import PairDataset
from infogrowth.data.image_stores import LmdbImages, LmdbWriter, open_images
from infogrowth.data.loading import collate
from infogrowth.data.transforms import EvaluationTransform, TrainingTransform
from infogrowth.errors import UserError


@pytest.fixture
def packed(tmp_path, jpegs):
    with LmdbWriter(tmp_path / "lmdb") as writer:
        for key, data in jpegs.items():
            writer.put(key, data)
    return tmp_path / "lmdb"


@pytest.fixture
def annotations(jpegs):
    return [{"image": f"{key}.jpg", "caption": f"Image {key}."} for key in jpegs]


def items(dataset, positions, workers):
    loader = DataLoader(
        dataset, batch_size=None, sampler=positions, num_workers=workers,
        multiprocessing_context="fork" if workers else None,
    )  # fmt: skip
    return list(loader)


def test_items_do_not_depend_on_the_number_of_workers(packed, annotations):
    """Trap 14: the dataset has been used in this process before its workers are forked."""
    dataset = PairDataset(annotations, packed, TrainingTransform(32), seed=3)
    positions = [(row % 12, 1, 100 + row) for row in range(24)]
    here = [dataset[position] for position in positions]
    for workers in (1, 2):
        there = items(dataset, positions, workers)
        assert all(torch.equal(a["image"], b["image"]) for a, b in zip(here, there, strict=True))
        assert [a["caption"] for a in here] == [b["caption"] for b in there]
    assert not torch.equal(here[0]["image"], here[12]["image"])  # same row, another position


def test_a_dataset_can_be_pickled_while_in_use(packed, annotations):
    dataset = PairDataset(annotations, str(packed), TrainingTransform(32))
    first = dataset[0]
    again = pickle.loads(pickle.dumps(dataset))[0]
    assert torch.equal(first["image"], again["image"])


def test_an_item_names_its_row_and_holds_a_cleaned_caption(packed, annotations):
    dataset = PairDataset(annotations, packed, EvaluationTransform(32), max_words=1)
    assert len(dataset) == 12
    item = dataset[5]
    assert (item["caption"], item["index"], item["replaced"]) == ("image", 5, 0)
    assert dataset[-1]["index"] == 11
    with pytest.raises(IndexError):
        dataset[12]


def test_a_plain_row_is_augmented_the_same_every_time(packed, annotations):
    dataset = PairDataset(annotations, packed, TrainingTransform(32), seed=1)
    assert torch.equal(dataset[2]["image"], dataset[(2, 0, 2)]["image"])
    other = PairDataset(annotations, packed, TrainingTransform(32), seed=2)
    assert not torch.equal(dataset[2]["image"], other[2]["image"])


def test_one_of_several_captions_is_chosen_by_the_position(packed):
    dataset = PairDataset(
        [{"image": "000000000", "caption": ["one", "two", "three"]}],
        packed,
        EvaluationTransform(8),
    )
    chosen = [dataset[(0, 0, position)]["caption"] for position in range(600)]
    assert chosen[:50] == [dataset[(0, 0, position)]["caption"] for position in range(50)]
    counts = Counter(chosen)
    # 200 expected of each; 5 standard deviations are 58.
    assert set(counts) == {"one", "two", "three"} and min(counts.values()) > 142


@pytest.fixture
def damaged(tmp_path, jpegs):
    """Rows 3 and 7 cannot be decoded."""
    with LmdbWriter(tmp_path / "damaged") as writer:
        for row, (key, data) in enumerate(jpegs.items()):
            writer.put(key, data[:200] if row in (3, 7) else data)
    return tmp_path / "damaged"


def test_a_bad_image_is_replaced_the_same_way_every_time(damaged, annotations, caplog):
    dataset = PairDataset(annotations, damaged, EvaluationTransform(16), seed=0)
    with caplog.at_level(logging.WARNING):
        shown = [dataset[(3, 0, position)] for position in range(40)]
    assert all(item["replaced"] == 1 for item in shown)
    assert {item["index"] for item in shown}.isdisjoint({3, 7})
    assert len({item["index"] for item in shown}) > 5
    again = items(dataset, [(3, 0, position) for position in range(40)], workers=1)
    assert [item["index"] for item in again] == [item["index"] for item in shown]
    for item in shown:
        assert item["caption"] == f"image {item['index']:09d}"
    assert re.search("'000000003.jpg'.*truncated", caplog.text)
    assert dataset[4]["replaced"] == 0


def test_only_bad_images_are_an_error_not_an_endless_search(tmp_path, annotations, jpegs):
    with LmdbWriter(tmp_path / "bad") as writer:
        for key in jpegs:
            writer.put(key, b"no image")
    dataset = PairDataset(annotations, tmp_path / "bad", EvaluationTransform(16))
    with pytest.raises(UserError, match="20 images"):
        dataset[0]


def test_an_image_that_is_not_there_is_an_error_that_names_it(packed):
    dataset = PairDataset([{"image": "gone", "caption": "x"}], packed, EvaluationTransform(8))
    with pytest.raises(UserError, match="gone"):
        dataset[0]


def test_images_come_from_a_folder_as_well(tmp_path, jpegs):
    (tmp_path / "val2014").mkdir()
    (tmp_path / "val2014" / "x.png").write_bytes(encoded(drawn(1), "PNG"))
    annotations = [{"image": name, "caption": "c"} for name in ("val2014/x.png", "val2014/x")]
    dataset = PairDataset(annotations, tmp_path, EvaluationTransform(16))
    assert torch.equal(dataset[0]["image"], dataset[1]["image"])
    assert np.isfinite(dataset[0]["image"].numpy()).all()


@pytest.mark.parametrize("name", ["../secret.png", "/etc/hostname", "a/../../secret", "x\0.png"])
def test_an_id_cannot_lead_out_of_the_folder(tmp_path, name):
    (tmp_path / "inside").mkdir()
    (tmp_path / "secret.png").write_bytes(encoded(drawn(1), "PNG"))
    with pytest.raises(UserError, match="outside"):
        open_images(tmp_path / "inside").read(name)


def test_an_image_that_is_not_in_the_folder_is_named(tmp_path):
    with pytest.raises(UserError, match=r"nobody\.jpg"):
        open_images(tmp_path).read("nobody.jpg")


def test_images_that_are_neither_lmdb_nor_folder_are_refused(tmp_path, packed):
    assert isinstance(open_images(packed), LmdbImages)
    assert isinstance(open_images(packed / "data.mdb"), LmdbImages)
    with pytest.raises(UserError, match="neither"):
        open_images(tmp_path / "nothing")


WORDINGS = [f"wording {name}" for name in ("one", "two", "three", "four", "five")]


def test_several_captions_a_visit_are_different_and_a_function_of_the_position(packed):
    annotations = [{"image": "000000001", "caption": WORDINGS}]
    dataset = PairDataset(annotations, packed, TrainingTransform(32), seed=3, captions_per_visit=2)
    visits = [dataset[0, epoch, position] for epoch in (0, 1) for position in range(20)]
    texts = [item["caption"] for item in visits]
    assert all(len(set(two)) == 2 and set(two) <= set(WORDINGS) for two in texts)
    assert len({tuple(two) for two in texts}) > 10
    for workers in (0, 2):  # as other ranks or a resumed run would ask: any order, anywhere
        positions = [(0, 1, position) for position in reversed(range(20))]
        again = items(dataset, positions, workers)
        assert [item["caption"] for item in again] == texts[:19:-1]


def test_an_item_with_fewer_captions_than_asked_for_repeats_them_and_has_its_class(packed):
    annotations = [{"image": "000000001", "caption": "A dog."}]
    transform = TrainingTransform(32)
    dataset = PairDataset(annotations, packed, transform, captions_per_visit=3, classes=[8])
    assert dataset[0]["caption"] == ["a dog"] * 3 and dataset[0]["class"] == 8


def test_a_batch_tokenizes_all_first_captions_before_all_second_ones():
    seen = []

    def tokenize(texts):
        seen.extend(texts)
        return torch.zeros(len(texts), 1), torch.ones(len(texts), 1)

    collate([{"caption": ["a", "b"]}, {"caption": ["c", "d"]}], tokenize)
    assert seen == ["a", "c", "b", "d"]
