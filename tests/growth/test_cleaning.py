"""Cleaning: unit rows, alignment, the threshold chosen from the seeds, and class labels."""

import numpy as np
import pytest
import torch

from infogrowth.errors import UserError
from infogrowth.growth.cleaning import choose_min_align
from infogrowth.growth.engine import InfoGrowth
from infogrowth.neighbors.rows import Trouble, fold_sum, row_products, unit_rows


def test_unit_rows_are_correctly_rounded_and_bringing_them_to_length_twice_changes_nothing():
    matrix = np.random.default_rng(0).normal(size=(2000, 37)) * 100
    rows, trouble = unit_rows(matrix)
    expected = (matrix / np.linalg.norm(matrix, axis=1, keepdims=True)).astype(np.float32)
    np.testing.assert_allclose(rows, expected, atol=6e-8, rtol=1e-7)
    assert not trouble.any()
    np.testing.assert_array_equal(unit_rows(rows)[0], rows)


def test_extreme_but_finite_features_are_no_trouble():
    matrix = np.array([[1e300, 1e300], [1e-300, 0], [1e-30, -1e-30], [-np.inf, 1], [0, 0]])
    rows, trouble = unit_rows(matrix)
    np.testing.assert_allclose(
        rows[:3], [[0.5**0.5, 0.5**0.5], [1, 0], [0.5**0.5, -(0.5**0.5)]], atol=1e-7
    )
    assert trouble.tolist() == [0, 0, 0, Trouble.NOT_FINITE, Trouble.ZERO]
    assert not rows[3:].any()


@pytest.mark.parametrize("dimension", [1, 2, 3, 7, 256, 513])
def test_products_have_the_same_bits_alone_and_together_in_numpy_and_torch(dimension):
    random = np.random.default_rng(dimension)
    left, right = random.normal(size=(2, 700, dimension)).astype(np.float32)
    together = row_products(left, right)
    np.testing.assert_allclose(together, (left.astype(float) * right).sum(1), atol=1e-10)
    alone = [row_products(left[i : i + 1], right[i : i + 1])[0] for i in range(700)]
    assert together.tolist() == alone
    doubles = torch.from_numpy(left).double() * torch.from_numpy(right)
    assert fold_sum(doubles).tolist() == alone


def seeds(noise, count=400, dimension=32):
    random = np.random.default_rng(1)
    image = random.normal(size=(count, dimension))
    text = image + noise * random.normal(size=image.shape)
    return unit_rows(image)[0], unit_rows(text)[0]


@pytest.mark.parametrize("noise", [0.5, 1.5])
def test_auto_min_align_best_separates_right_from_swapped_captions(noise):
    image, text = seeds(noise)
    chosen = choose_min_align(image, text)
    products = image.astype(float) @ text.T
    right = np.diag(products)
    swapped = products[~np.eye(len(image), dtype=bool)]

    def accuracy(threshold):
        return ((right >= threshold).mean() + (swapped < threshold).mean()) / 2

    best = max(accuracy(value) for value in np.linspace(-1, 1, 801))
    assert accuracy(chosen) > best - 0.01
    assert best > 0.85


def test_auto_min_align_is_the_middle_of_the_gap_in_a_hand_made_case():
    # right pairs align with 0.8, swapped ones with 0
    image = np.eye(4, dtype=np.float32)[:2]
    text = np.array([[0.8, 0, 0.6, 0], [0, 0.8, 0, 0.6]], np.float32)
    assert choose_min_align(image, text) == pytest.approx(0.4, abs=1e-6)


def test_auto_min_align_is_recorded_and_used_and_needs_seeds():
    image, text = seeds(0.5)
    ids = [f"s{number}" for number in range(len(image))]
    growth = InfoGrowth(min_align="auto", device="cpu")
    with pytest.raises(UserError, match=r"seed\(\) first"):
        growth.process(ids, ids, image, text)
    with pytest.raises(UserError, match="at least two seed"):
        growth.seed(ids[:1], ids[:1], image[:1], text[:1])
    assert growth.settings["min_align"] is None and len(growth) == 0
    growth.seed(ids[:300], ids[:300], image[:300], text[:300])
    assert growth.settings["min_align"] == choose_min_align(image[:300], text[:300])
    assert growth.settings["min_align_rule"].startswith("auto: ")
    swapped = growth.process(ids[300:], ids[300:], image[300:], np.roll(text[300:], 1, axis=0))
    assert swapped.verdicts.count("dropped") > 95


def label_oracle(ids, labels, image, k, min_align):
    """Single-modal growth, one at a time."""
    kept, decisions = [], []
    unit = unit_rows(image)[0].astype(float)
    for row, label in enumerate(labels):
        nearest = sorted((-round(float(unit[row] @ unit[other]), 12), at, other)
                         for at, other in enumerate(kept))[:k]  # fmt: skip
        same = sum(labels[other] == label for *_, other in nearest)
        possible = min(k, sum(labels[other] == label for other in kept))
        agreement = same / possible if possible else 1.0
        new = ids[row] not in {ids[other] for other in kept}
        if np.isfinite(image[row]).all() and np.float32(agreement) >= np.float32(min_align) and new:
            kept.append(row)
        decisions.append(agreement)
    return kept, decisions


@pytest.mark.parametrize("batch_size", [1, 17, 700])
def test_growth_by_labels_equals_one_by_one(batch_size):
    random = np.random.default_rng(0)
    truth = random.integers(5, size=700)
    image = random.normal(size=(5, 12))[truth] + 0.8 * random.normal(size=(700, 12))
    image[100:150] = image[:50]
    image[7] = np.nan
    wrong = random.random(700) < 0.2
    classes = np.where(wrong, random.integers(5, size=700), truth)
    labels = [f"class {number}" for number in classes]
    ids = [f"s{number % 660}" for number in range(700)]
    kept, agreement = label_oracle(ids, labels, image, 4, 0.4)

    growth = InfoGrowth(modality="image", device="cpu")
    decisions = [
        record
        for at in range(0, 700, batch_size)
        for record in growth.process(
            ids[at : at + batch_size], labels[at : at + batch_size], image[at : at + batch_size]
        )
    ]
    assert growth.kept_ids == [ids[row] for row in kept]
    usable = np.arange(700) != 7
    found = np.array([d.alignment if d.alignment is not None else np.nan for d in decisions])
    np.testing.assert_allclose(found[usable], np.array(agreement)[usable])
    assert decisions[7].reason == "image feature is not finite"
    assert decisions[20].gain_text is None and decisions[20].text_neighbors == []
    dropped = np.array([d.reason == "label disagrees with its neighbors" for d in decisions])
    mislabelled = classes != truth
    assert dropped[mislabelled].mean() > 0.6 and dropped[~mislabelled & usable].mean() < 0.2
    np.testing.assert_array_equal(growth.kept_gains[:, 0], growth.kept_gains[:, 1])


def test_seeds_of_a_labelled_dataset_are_not_filtered_and_it_can_be_restored():
    random = np.random.default_rng(1)
    image, labels = random.normal(size=(60, 8)), [f"c{n % 7}" for n in range(60)]
    ids = [f"s{n}" for n in range(60)]
    growth = InfoGrowth(modality="image", device="cpu")
    assert set(growth.seed(ids[:30], labels[:30], image[:30]).reasons) == {"seed"}
    saved = growth.settings, growth.kept_ids, labels[:30], growth.kept_gains
    other = InfoGrowth.restore(*saved, growth.kept_features("image"), device="cpu")
    arguments = ids[30:], labels[30:], image[30:]
    assert list(other.process(*arguments)) == list(growth.process(*arguments))
    assert other.annotations() == growth.annotations()
