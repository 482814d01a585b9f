import numpy as np
import pytest

from infogrowth.report.map import project, spread_out


def random(seed=0):
    return np.random.default_rng(seed)


def test_points_that_lie_in_a_plane_keep_their_places():
    plane = random().uniform(size=(300, 2)) * [10, 4]
    directions = np.linalg.qr(random(1).normal(size=(16, 2)))[0]
    flat = project((plane @ directions.T).astype(np.float32), limit=1000, random=random())
    assert flat.explained == pytest.approx(1.0, abs=1e-6)
    inside = (flat.points > 0).all(axis=1) & (flat.points < 1).all(axis=1)
    for axis in (0, 1):  # each axis is the plane's, but for its direction and scale
        correlation = np.corrcoef(flat.points[inside, axis], plane[inside, axis])[0, 1]
        assert abs(correlation) > 0.99


def test_a_sample_of_the_rows_is_drawn_when_there_are_many():
    features = random().normal(size=(500, 8)).astype(np.float32)
    first = project(features, limit=100, random=random(5))
    again = project(features, limit=100, random=random(5))
    assert len(first.rows) == 100 == len(set(first.rows.tolist()))
    assert (first.rows == again.rows).all()
    assert (first.points == again.points).all()


def test_equal_rows_and_a_single_dimension_do_not_break_it():
    assert project(np.ones((5, 4), np.float32), 10, random()).explained == 0.0
    assert project(random().normal(size=(6, 1)), 10, random()).points.shape == (6, 2)


def test_images_on_the_map_do_not_overlap_and_cover_it():
    points = random().uniform(size=(4000, 2))
    chosen = points[spread_out(points, (0.06, 0.1))]
    apart = np.abs(chosen[:, None] - chosen[None]) >= (0.06, 0.1)
    overlap = ~apart.any(axis=2)
    assert overlap.sum() == len(chosen)  # each only with itself
    assert len(chosen) > 50
    assert np.ptp(chosen, axis=0) == pytest.approx([1, 1], abs=0.15)
