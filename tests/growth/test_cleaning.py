"""Cleaning: unit rows, alignment, the threshold chosen from the seeds, and class labels."""

import numpy as np
import pytest
import torch

from infogrowth.growth.engine import InfoGrowth
from infogrowth.rows import Problem, fold_sum, row_products, unit_rows


def test_unit_rows_are_correctly_rounded_and_bringing_them_to_length_twice_changes_nothing():
    matrix = np.random.default_rng(0).normal(size=(2000, 37)) * 100
    rows, problems = unit_rows(matrix)
    expected = (matrix / np.linalg.norm(matrix, axis=1, keepdims=True)).astype(np.float32)
    np.testing.assert_allclose(rows, expected, atol=6e-8, rtol=1e-7)
    assert not problems.any()
    np.testing.assert_array_equal(unit_rows(rows)[0], rows)


def test_extreme_but_finite_features_are_no_problem():
    matrix = np.array([[1e300, 1e300], [1e-300, 0], [1e-30, -1e-30], [-np.inf, 1], [0, 0]])
    rows, problems = unit_rows(matrix)
    np.testing.assert_allclose(
        rows[:3], [[0.5**0.5, 0.5**0.5], [1, 0], [0.5**0.5, -(0.5**0.5)]], atol=1e-7
    )
    assert problems.tolist() == [0, 0, 0, Problem.NOT_FINITE, Problem.ZERO]
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
    assert set(growth.seed(ids[:30], labels[:30], image[:30]).reason) == {"seed"}
    saved = growth.settings, growth.kept_ids, labels[:30], growth.kept_gains
    other = InfoGrowth.restore(*saved, growth.kept_features("image"), device="cpu")
    arguments = ids[30:], labels[30:], image[30:]
    assert list(other.process(*arguments)) == list(growth.process(*arguments))
    assert other.annotations() == growth.annotations()
