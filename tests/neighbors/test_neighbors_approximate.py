"""The approximate index: never nearer than the truth, honest about its error, blind to batches."""

import logging

import numpy as np
import pytest

from infogrowth.growth.engine import InfoGrowth
from infogrowth.neighbors import approximate, create_index
from infogrowth.neighbors.approximate import ApproximateIndex
from infogrowth.neighbors.exact import ExactIndex
from infogrowth.neighbors.rows import unit_rows
from infogrowth.randomness import generator

DIMENSION = 24
COUNT = 7000


@pytest.fixture(autouse=True)
def small_segments(monkeypatch):
    monkeypatch.setattr(approximate, "SEGMENT_ROWS", 512)
    monkeypatch.setattr(approximate, "PROBE_ROWS", 256)


@pytest.fixture(scope="module")
def rows():
    random = np.random.default_rng(0)
    centers = random.normal(size=(300, DIMENSION))
    noise = 0.4 * random.normal(size=(COUNT, DIMENSION))
    return unit_rows(centers[random.integers(300, size=COUNT)] + noise)[0]


def grown(rows, batch_size):
    index = ApproximateIndex(DIMENSION, 4, first_training=1000, probes=6)
    found = []
    for start in range(0, len(rows), batch_size):
        index.extend(rows[start : start + batch_size])
        visible = np.arange(start, min(start + batch_size, len(rows)))
        found.append(index.search(rows[start : start + batch_size], visible))
    positions = np.concatenate([part.positions for part in found])
    return index, positions, np.concatenate([part.distances for part in found])


def test_answers_do_not_depend_on_batches_and_are_close_to_exact(rows, caplog):
    caplog.set_level(logging.INFO, "infogrowth")
    index, positions, distances = grown(rows, COUNT)
    _, other_positions, other_distances = grown(rows, 333)
    np.testing.assert_array_equal(positions, other_positions)
    np.testing.assert_array_equal(distances, other_distances)

    exact = ExactIndex(DIMENSION, 4)
    exact.extend(rows)
    truth = exact.search(rows, np.arange(COUNT)).distances
    error = np.nanmean(distances[1:] - truth[1:], axis=1)
    assert error.min() >= 0 and error.mean() < 0.01
    np.testing.assert_array_equal(distances[:1024], truth[:1024])  # exact before the training
    # trained at 1024 and at 4096 rows, and the error measured then is the error there is
    assert sum("measured gain error" in record.message for record in caplog.records) == 4
    assert index.gain_error is not None and index.gain_error[0] == pytest.approx(
        error[4096:].mean(), abs=0.005
    )


@pytest.mark.parametrize("k", [1, 4])
def test_the_measured_error_is_that_of_a_brute_force_in_float64(rows, k):
    index = ApproximateIndex(DIMENSION, k, first_training=1024, probes=1)
    index.extend(rows[:1024])
    index.search(rows[2000:2001], np.array([1024]))
    chosen = generator(0, "approximate index probe", 1024).choice(1024, 256, replace=False)
    held = rows[:1024].astype(np.float64)
    products = held[np.sort(chosen)] @ held.T
    products[np.arange(256), np.sort(chosen)] = -np.inf
    truth = 1 - np.sort(products, axis=1)[:, -k:].mean(axis=1)
    chosen = np.sort(chosen)
    found = index._search_lists(rows[chosen], itself=chosen).distances
    error = np.where(np.isnan(found), 2, found).mean(axis=1) - truth  # nothing found: farthest
    assert index.gain_error is not None and error.max() > 0.01  # one list is too few
    assert index.gain_error == pytest.approx(
        (error.mean(), np.quantile(error, 0.99), error.max()), abs=1e-6
    )


def test_as_many_lists_are_read_as_the_tolerable_error_needs(rows, monkeypatch):
    monkeypatch.setattr(approximate, "PROBES", (1, 4, 16, 64))

    def read(tolerable):
        monkeypatch.setattr(approximate, "TOLERABLE_ERROR", tolerable)
        index = ApproximateIndex(DIMENSION, 4, first_training=1024)
        index.extend(rows)
        index.search(rows[-1:], np.array([COUNT - 1]))
        assert index.gain_error is not None and index.gain_error[0] <= tolerable
        return index._lists.nprobe

    assert read(1.0) == 1 < read(1e-4)


def test_a_batch_sees_the_earlier_samples_of_its_own(rows):
    index = ApproximateIndex(DIMENSION, 4, first_training=1000, probes=6)
    index.extend(rows[:3000])
    copies = np.repeat(rows[3000:3100], 2, axis=0)
    index.extend(copies)
    found = index.search(copies, 3000 + np.arange(200))
    np.testing.assert_array_equal(found.positions[1::2, 0], 3000 + np.arange(0, 200, 2))


def test_a_truncated_index_answers_as_if_it_had_never_held_more(rows):
    index, _, _ = grown(rows, 2000)
    index.truncate(2100)
    fresh = ApproximateIndex(DIMENSION, 4, first_training=1000, probes=6)
    fresh.extend(rows[:2100])
    queries, visible = rows[5000:5200], np.full(200, 2100)
    np.testing.assert_array_equal(
        index.search(queries, visible).products, fresh.search(queries, visible).products
    )


def test_a_restored_approximate_dataset_grows_on_as_if_never_interrupted(rows, monkeypatch):
    monkeypatch.setattr("infogrowth.neighbors.AUTO_EXACT_ROWS", 1000)
    ids = [f"s{number}" for number in range(COUNT)]
    whole = InfoGrowth(min_align=-1.0, device="cpu")
    whole.process(ids, ids, rows, rows[::-1])
    first = InfoGrowth(min_align=-1.0, device="cpu")
    first.process(ids[:2500], ids[:2500], rows[:2500], rows[::-1][:2500])
    saved = first.settings, first.kept_ids, ids[:2500], first.kept_gains
    features = [first.kept_features(space) for space in ("image", "text")]
    second = InfoGrowth.restore(*saved, *features, device="cpu")
    second.process(ids[2500:], ids[2500:], rows[2500:], rows[::-1][2500:])
    assert second.annotations() == whole.annotations()


@pytest.mark.parametrize(
    ("kind", "words"),
    [("auto", "exact search below 524288 rows, then approximate (faiss IVF), because on a CPU"),
     ("exact", "exact search, skipping what is too far to matter"),
     ("approximate", "exact search below 65536 rows, then approximate")],
)  # fmt: skip
def test_the_choice_of_index_is_told(kind, words, caplog):
    caplog.set_level(logging.INFO, "infogrowth")
    create_index(kind, 8, 4, "cpu", 256, sharded=False)
    assert words in caplog.text
