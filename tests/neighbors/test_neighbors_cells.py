"""Cells: never nearer than the truth, honest about their error, blind to batches and ranks."""

import logging

import numpy as np
import pytest
import torch
from oracle import brute_force, clustered, in_batches, near_copies, on_ranks

from infogrowth.growth.engine import InfoGrowth
from infogrowth.neighbors import AUTO, create_index, scan
from infogrowth.neighbors import cells as cells_module
from infogrowth.neighbors import index as index_module
from infogrowth.neighbors.cells import Cells, learn_centers, nearest_centers, two_cells
from infogrowth.neighbors.index import NeighborIndex
from infogrowth.randomness import generator

DIMENSION, COUNT = 24, 2600

pytestmark = pytest.mark.usefixtures("small_steps")


@pytest.fixture(scope="module")
def rows():
    return clustered(COUNT, DIMENSION)


def cell_index(k=4, **options):
    return NeighborIndex(DIMENSION, k, cells_from=1024, **options)


def test_answers_do_not_depend_on_batches_and_are_close_to_exact(rows, caplog):
    caplog.set_level(logging.INFO, "infogrowth")
    index = cell_index()
    positions, products = in_batches(index, rows, COUNT)
    assert sum("Cells learned" in record.message for record in caplog.records) == 2
    for batch_size in (433,):
        again = in_batches(cell_index(), rows, batch_size)
        np.testing.assert_array_equal(positions, again[0])
        np.testing.assert_array_equal(products, again[1])
    truth = brute_force(rows, rows, np.arange(COUNT), 4)[1]
    np.testing.assert_allclose(products[4:1024], truth[4:1024], atol=1e-12)  # exact before
    error = (truth[4:] - products[4:]).mean(axis=1)
    assert error.min() >= -1e-12 and error.mean() < 2e-3
    report = index.report()
    assert (report["search"], report["rows_trained"], report["cells_from"]) == ("cells", 2048, 1024)
    assert report["gain_error"]["mean"] == pytest.approx(error[2048:].mean(), abs=1.5e-3)


@pytest.mark.parametrize("k", [1, 4])
def test_the_measured_error_is_that_of_a_brute_force_in_float64(rows, k, monkeypatch):
    monkeypatch.setattr(index_module, "READS", (1,))
    index = cell_index(k)
    index.extend(rows[:1024])
    index.search(rows[2000:2001], np.array([1024]))
    chosen = np.sort(generator(0, "cells probe", 1024).choice(1024, 256, replace=False))
    held = rows[:1024].astype(np.float64)
    products = held[chosen] @ held.T
    products[np.arange(256), chosen] = -np.inf
    cells = index._cells
    nearest = (rows[chosen].astype(np.float64) @ cells.centers_JD.double().numpy().T).argmax(1)
    met = (
        two_cells(torch.from_numpy(rows[:1024]), cells.centers_JD).numpy() == nearest[:, None, None]
    ).any(2)
    truth = 1 - np.sort(products, axis=1)[:, -k:].mean(axis=1)
    found = np.sort(np.where(met, 1 - products, 1.0), axis=1)[:, :k].mean(axis=1)
    error = np.minimum(found, 1) - truth  # none found counts as a distance of 1
    assert error.max() > 0.01  # one cell is too few
    assert index.gain_error == pytest.approx(
        (error.mean(), np.quantile(error, 0.99), error.max()), abs=1e-6
    )


def test_as_many_cells_are_read_as_the_tolerable_error_needs(rows, monkeypatch):
    monkeypatch.setattr(index_module, "READS", (1, 2, 4, 16, 64))

    def read(tolerable):
        monkeypatch.setattr(index_module, "TOLERABLE_ERROR", tolerable)
        index = cell_index()
        index.extend(rows)
        index.search(rows[-1:], np.array([COUNT - 1]))
        report = index.report()
        assert report["gain_error"]["mean"] <= tolerable
        return report["cells_read"]

    assert read(1.0) == 1 < read(1e-4)


def test_a_batch_sees_the_earlier_samples_of_its_own(rows):
    index = cell_index()
    index.extend(rows[:1500])
    copies = np.repeat(rows[1500:1600], 2, axis=0)
    index.extend(copies)
    found = index.search(copies, 1500 + np.arange(200))
    np.testing.assert_array_equal(found.positions[1::2, 0], 1500 + np.arange(0, 200, 2))


def test_a_truncated_index_answers_as_if_it_had_never_held_more(rows):
    index = cell_index()
    in_batches(index, rows, 2300)
    index.truncate(1100)
    fresh = cell_index()
    fresh.extend(rows[:1100])
    queries, visible = rows[2200:2400], np.full(200, 1100)
    np.testing.assert_array_equal(
        index.search(queries, visible).products, fresh.search(queries, visible).products
    )
    assert index.report() == fresh.report()


@pytest.mark.parametrize("world_size", [2, 3])
def test_any_number_of_ranks_answers_as_one_does(rows, world_size):
    def grow(index):
        return *in_batches(index, rows[:2200], 700), index.report(), index.rows(5, 50)

    positions, products, report, some = grow(cell_index())
    for rank in on_ranks(world_size, grow, DIMENSION, 4, cells_from=1024):
        np.testing.assert_array_equal(rank[0], positions)
        np.testing.assert_array_equal(rank[1], products)
        assert rank[2] == report
        np.testing.assert_array_equal(rank[3], some)


def test_tiles_that_go_together_as_on_a_gpu_find_the_same(rows, monkeypatch):
    expected = in_batches(cell_index(), rows, 1300)
    monkeypatch.setitem(scan.TILES, "cpu", (16, 24))
    monkeypatch.setattr(cells_module.Cells, "rounds", together(cells_module.Cells.rounds))
    for half in (None, torch.bfloat16):
        monkeypatch.setattr(index_module, "half_precision", lambda device, half=half: half)
        found = in_batches(cell_index(), rows, 1300)
        np.testing.assert_array_equal(found[0], expected[0])
        np.testing.assert_array_equal(found[1], expected[1])


def together(original):
    return lambda self, queries, tile, _: original(self, queries, tile, 7)


def test_where_float32_leaves_open_which_center_is_nearer_float64_decides():
    rows = torch.from_numpy(near_copies(150, 16, clusters=3))
    centers = torch.from_numpy(near_copies(40, 16, clusters=3))
    products = torch.zeros((150, 40), dtype=torch.float64)
    for row in range(150):
        products[row] = (rows[row].double() * centers.double()).sum(1)
    products = np.round(products.numpy(), 13)
    for count in (1, 5):
        found = nearest_centers(rows, centers, count).sort(1).values.numpy()
        expected = np.sort(np.argsort(-products, axis=1, kind="stable")[:, :count], axis=1)
        worst = np.take_along_axis(products, found, 1).min(1)
        assert (worst >= np.take_along_axis(products, expected, 1).min(1) - 1e-12).all()
    single = [nearest_centers(rows[at : at + 1], centers, 5) for at in range(150)]
    whole = nearest_centers(rows, centers, 5)
    assert [set(row.tolist()) for row in whole] == [set(row[0].tolist()) for row in single]
    pairs = torch.cat([two_cells(rows[at : at + 1], centers) for at in range(150)])
    torch.testing.assert_close(two_cells(rows, centers), pairs, rtol=0, atol=0)


def test_centers_do_not_depend_on_the_order_of_summation():
    rows = torch.from_numpy(clustered(800, 16, clusters=20))

    def centers(sample):
        first = torch.from_numpy(np.sort(np.random.default_rng(0).choice(800, 20, replace=False)))
        head = torch.cat([rows[first], sample])
        return learn_centers(head, 20, FirstOnes())

    torch.testing.assert_close(centers(rows), centers(rows.flip(0)), rtol=0, atol=0)


class FirstOnes:
    def choice(self, _, count, replace):
        return np.arange(count)


def test_the_second_cell_minimises_what_it_should():
    rows, centers = clustered(50, 8, clusters=9), clustered(12, 8, seed=1, clusters=12)
    found = two_cells(torch.from_numpy(rows), torch.from_numpy(centers)).numpy()
    x, c = rows.astype(np.float64), centers.astype(np.float64)
    for row, (first, second) in enumerate(found):
        r = x[row] - c[first]
        assert first == (x[row] @ c.T).argmax()
        s = x[row] - c
        loss = (s**2).sum(1) + (s @ r) ** 2 / max(r @ r, cells_module.LEAST_SQUARE)
        loss[first] = np.inf
        assert loss[second] == pytest.approx(loss.min(), abs=1e-5)


def test_a_restored_approximate_dataset_grows_on_as_if_never_interrupted(rows, monkeypatch):
    monkeypatch.setitem(AUTO, "cpu", (1024, "small"))
    ids = [f"s{number}" for number in range(COUNT)]
    whole = InfoGrowth(min_align=-1.0, device="cpu")
    whole.process(ids, ids, rows, rows[::-1])
    first = InfoGrowth(min_align=-1.0, device="cpu")
    first.process(ids[:1500], ids[:1500], rows[:1500], rows[::-1][:1500])
    kept = first.annotations()
    saved = [row["image"] for row in kept], [row["caption"] for row in kept]
    gains = [row["gains"] for row in kept]
    features = [first.kept_features(space) for space in ("image", "text")]
    monkeypatch.setitem(AUTO, "cpu", (9999, "later"))
    second = InfoGrowth.restore(first.settings, *saved, gains, *features, device="cpu")
    second.process(ids[1500:], ids[1500:], rows[1500:], rows[::-1][1500:])
    assert second.annotations() == whole.annotations()  # and "auto" is what it was
    assert second.settings["search"]["image"]["cells"] == whole.settings["search"]["image"]["cells"]


@pytest.mark.parametrize(
    ("kind", "words"),
    [("auto", "exact search below 65,536 rows, the nearest cells from there on"),
     ("exact", "exact search, on cpu"),
     ("approximate", "exact search below 8,192 rows, the nearest cells")],
)  # fmt: skip
def test_the_choice_of_index_is_logged_with_its_reason(kind, words, caplog):
    caplog.set_level(logging.INFO, "infogrowth")
    create_index(kind, 8, 4, "cpu", 256, sharded=False)
    assert words in caplog.text
    assert ("asked for" in caplog.text) == (kind != "auto")


def test_every_row_has_two_different_cells(rows):
    index = cell_index()
    index.extend(rows)
    index.search(rows[:1], np.array([COUNT]))
    cells = index._cells
    assert isinstance(cells, Cells) and cells.count == COUNT
    assert bool((cells._of_row_M2[:, 0] != cells._of_row_M2[:, 1]).all())
