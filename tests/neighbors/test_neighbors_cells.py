"""Cells: never nearer than the truth, honest about their error, blind to batches and ranks."""

import logging
from itertools import pairwise

import numpy as np
import pytest
import torch
from oracle import brute_force, clustered, in_batches, merged, near_copies, on_ranks

from infogrowth.growth.engine import InfoGrowth
from infogrowth.neighbors import AUTO, create_index, scan
from infogrowth.neighbors import index as index_module
from infogrowth.neighbors.cells import LEAST_SQUARE, Cells, Layout, learn_centers, nearest
from infogrowth.neighbors.codes import Coder
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


@pytest.mark.parametrize("world_size", [1, 3])
@pytest.mark.parametrize("cells_from", [None, 256, 1024])
@pytest.mark.parametrize("share", [0.4, 0.95])
def test_to_look_up_and_add_at_once_is_to_add_and_look_up(rows, world_size, cells_from, share):
    random = np.random.default_rng(0)
    joins = random.random(COUNT) < share
    edges = [0, *np.sort(random.integers(0, COUNT, 4)), COUNT]
    options = {"dimension": DIMENSION, "k": 4, "cells_from": cells_from}
    added = NeighborIndex(**options)
    added.extend(rows[joins])
    expected = added.search(rows, np.cumsum(joins) - joins)

    def at_once(index):
        parts = [slice(*edge) for edge in pairwise(edges)]
        found = [index.search_and_extend(rows[part], joins[part]) for part in parts]
        assert index.count == joins.sum()
        return merged(found)

    for positions, products in on_ranks(world_size, at_once, **options):
        np.testing.assert_array_equal(positions, expected.positions)
        np.testing.assert_array_equal(products, expected.products)


@pytest.mark.parametrize("k", [1, 4])
def test_the_measured_error_is_that_of_a_brute_force_in_float64(rows, k, monkeypatch):
    monkeypatch.setattr(index_module, "READS", (1,))
    index = cell_index(k)
    index.extend(rows[:1024])
    index.search(rows[2000:2001], np.array([1024]))
    chosen = np.sort(generator(0, "cells", 1024).choice(1024, 1024, replace=False)[:256])
    held = rows[:1024].astype(np.float64)
    products = held[chosen] @ held.T
    products[np.arange(256), chosen] = -np.inf
    codes = encode(rows[:1024])
    first = nearest(codes[chosen], index._cells.centers_JD, 1)[0].numpy()
    met = (index._cells.pairs(*index._cells.nearest(codes)).numpy() == first[:, None]).any(2)
    truth = 1 - np.sort(products, axis=1)[:, -k:].mean(axis=1)
    found = np.sort(np.where(met, 1 - products, 1.0), axis=1)[:, :k].mean(axis=1)
    error = np.minimum(found, 1) - truth  # none found counts as a distance of 1
    assert error.max() > 0.01  # one cell is too few
    assert index.gain_error == pytest.approx(
        (error.mean(), np.quantile(error, 0.99), error.max()), abs=1e-6
    )


def test_as_many_cells_are_read_as_the_tolerable_error_needs(rows, monkeypatch):
    monkeypatch.setattr(index_module, "READS", (1, 4, 64, 512))

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


@pytest.mark.parametrize("crowd", [256, -1000])
def test_whatever_is_multiplied_together_is_found_the_same(rows, monkeypatch, crowd):
    expected = in_batches(cell_index(), rows, 1300)
    monkeypatch.setitem(scan.TILE, "cpu", (500, 3))
    monkeypatch.setattr(scan, "CROWD", crowd)
    found = in_batches(cell_index(), rows, 1300)
    np.testing.assert_array_equal(found[0], expected[0])
    np.testing.assert_array_equal(found[1], expected[1])


def encode(rows):
    return Coder(rows.shape[1], torch.device("cpu")).encode(torch.from_numpy(rows))[0]


def test_of_equally_near_centers_the_first_is_nearest():
    rows, centers = (encode(near_copies(n, 16, clusters=3)) for n in (150, 40))
    products = rows.numpy().astype(int) @ centers.numpy().astype(int).T
    for count in (1, 5, 60):
        found, scores = nearest(rows, centers, count)
        expected = np.argsort(-products, axis=1, kind="stable")[:, :count]
        np.testing.assert_array_equal(found.numpy(), expected)
        np.testing.assert_array_equal(scores.numpy(), np.take_along_axis(products, expected, 1))


def test_centers_are_the_directions_of_their_rows_in_any_order():
    rows = encode(clustered(800, 16, clusters=20))
    coder = Coder(16, torch.device("cpu"))

    def centers(sample):
        head = torch.cat([rows[np.random.default_rng(0).choice(800, 20, replace=False)], sample])
        return learn_centers(head, 20, coder.unit, FirstOnes())

    learned = centers(rows)
    assert torch.equal(learned, centers(rows.flip(0)))
    assert np.linalg.norm(learned.double(), axis=1) == pytest.approx(coder.unit**0.5, rel=0.02)
    before = np.linalg.norm(rows.double() - rows[:20][nearest(rows, rows[:20], 1)[0][:, 0]], axis=1)
    after = np.linalg.norm(rows.double() - learned[nearest(rows, learned, 1)[0][:, 0]], axis=1)
    assert after.mean() < 0.8 * before.mean()


class FirstOnes:
    def choice(self, _, count, replace):
        return np.arange(count)


def test_the_second_cell_minimises_what_it_should():
    rows, centers = (encode(clustered(n, 8, clusters=9)) for n in (50, 12))
    unit = Coder(8, torch.device("cpu")).unit
    cells = Cells(centers, unit)
    found = cells.pairs(*cells.nearest(rows)).numpy()
    x, c = (codes.numpy() / unit**0.5 for codes in (rows, centers))
    for row, (first, second) in enumerate(found):
        assert first == (x[row] @ c.T).argmax()
        cosines, between = x[row] @ c.T, c[first] @ c.T
        square = max(2 - 2 * cosines[first], LEAST_SQUARE)
        loss = 2 - 2 * cosines + (1 - cosines[first] - cosines + between) ** 2 / square
        loss[first] = np.inf
        assert loss[second] == pytest.approx(loss.min(), abs=1e-9)


@pytest.mark.parametrize("most", [1, 6, 40])
def test_a_query_reads_its_nearest_cell_and_then_those_that_are_nearly_as_near(most):
    queries, centers = (encode(clustered(n, 8, clusters=9)) for n in (60, 40))
    unit = Coder(8, torch.device("cpu")).unit
    cells = Cells(centers, unit)
    cells.read = most
    (first, all_queries), (others, queries_of_others) = cells.passes(cells.nearest(queries))
    assert all_queries.tolist() == list(range(60))
    products = queries.numpy().astype(int) @ centers.numpy().astype(int).T
    for query, row in enumerate(products):
        order = np.argsort(-row, kind="stable")[:most]
        within = np.log(2 * most / np.arange(1, most + 1)) / 8
        expected = order[row[order[0]] - row[order] <= within * unit] if most < 40 else order
        read = [first[query].item(), *others[queries_of_others == query].tolist()]
        assert read == expected.tolist()
    assert most == 40 or len(others) < 59 * most


def test_a_layout_holds_each_cell_in_order_and_leaves_out_rows_of_none():
    random = np.random.default_rng(0)
    cells = torch.from_numpy(random.integers(0, 8, (200, 2))).int()  # 7 is none
    layout = Layout(cells, 7, 32)
    for cell in range(7):
        begin, width = layout.starts[cell], layout.widths[cell]
        held = layout.numbers[begin : begin + width].numpy()
        expected = np.repeat(np.arange(200), (cells.numpy() == cell).sum(1))
        assert width % 32 == 0 and width - len(expected) < 32
        np.testing.assert_array_equal(held[: len(expected)], expected)
        assert (held[len(expected) :] == 200).all()


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
    assert len(cells._of_row_M2) == COUNT
    assert bool((cells._of_row_M2[:, 0] != cells._of_row_M2[:, 1]).all())
