"""Gains from distances: numbers made by hand."""

import json
from pathlib import Path

import numpy as np

from infogrowth.growth.engine import mean_distance

GOLDEN = Path(__file__).parents[1] / "golden"


def test_gain_is_the_mean_of_the_distances_that_exist():
    nan = np.nan
    distances = np.array([[0.0, 0.5, 1.0, 2.0], [0.25, 0.75, nan, nan], [nan] * 4])
    np.testing.assert_array_equal(mean_distance(distances), [0.875, 0.5, 1.0])


def test_gain_has_the_same_bits_for_one_row_as_for_many():
    distances = np.sort(np.random.default_rng(0).random((500, 7)), axis=1)
    together = mean_distance(distances)
    assert together.tolist() == [mean_distance(row[None])[0] for row in distances]


def test_first_seed_of_the_original_has_gain_one():
    probes = json.loads((GOLDEN / "selection_edge_probes.json").read_text())
    assert probes["three_seed_gains"][0] == mean_distance(np.full((2, 4), np.nan)).tolist()
