import numpy as np
import pytest

from infogrowth.report import projection
from infogrowth.report.dataset import open_growth
from infogrowth.report.galleries import Thumbnails
from infogrowth.report.projection import (
    into_unit_square,
    kept_map,
    principal_components,
    spread_out,
)


def random(seed=0):
    return np.random.default_rng(seed)


def test_points_that_lie_in_a_plane_keep_their_positions():
    plane = random().uniform(size=(300, 2)) * [10, 4]
    directions = np.linalg.qr(random(1).normal(size=(16, 2)))[0]
    points, explained = principal_components((plane @ directions.T).astype(np.float32))
    assert explained == pytest.approx(1.0, abs=1e-6)
    points = into_unit_square(points)
    inside = (points > 0).all(axis=1) & (points < 1).all(axis=1)
    for axis in (0, 1):  # each axis is the plane's, but for its direction and scale
        correlation = np.corrcoef(points[inside, axis], plane[inside, axis])[0, 1]
        assert abs(correlation) > 0.99


def test_many_rows_are_drawn_at_random_and_always_the_same(made, monkeypatch):
    monkeypatch.setattr(projection, "MAP_POINTS", 50)
    first, again = (kept_map(open_growth(made.growth), Thumbnails(made.lmdb)) for _ in range(2))
    assert first["paths"] == again["paths"]
    assert [mark["sample"].id for mark in first["landmarks"]] == [
        mark["sample"].id for mark in again["landmarks"]
    ]
    assert first["points"] == 50
    assert sum(path.count("M") for path in first["paths"]) == 50


def test_equal_rows_and_a_single_dimension_do_not_break_it():
    assert principal_components(np.ones((5, 4), np.float32))[1] == 0.0
    assert principal_components(random().normal(size=(6, 1)))[0].shape == (6, 2)


def test_images_on_the_map_do_not_overlap_and_cover_it():
    points = random().uniform(size=(4000, 2))
    chosen = points[spread_out(points, (0.06, 0.1))]
    apart = np.abs(chosen[:, None] - chosen[None]) >= (0.06, 0.1)
    overlap = ~apart.any(axis=2)
    assert overlap.sum() == len(chosen)  # each only with itself
    assert len(chosen) > 50
    assert np.ptp(chosen, axis=0) == pytest.approx([1, 1], abs=0.15)
