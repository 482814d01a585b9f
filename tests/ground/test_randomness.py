"""Named random streams: a pure function of seed and names, and nobody's global state."""

import random

import numpy as np
import torch

from infogrowth.randomness import generator, torch_generator


def test_same_names_same_numbers_and_other_names_other_numbers():
    draw = lambda *names: generator(*names).integers(0, 2**63, 4).tolist()  # noqa: E731
    assert draw(0, "sampler", 3) == draw(0, "sampler", 3)
    streams = [
        draw(0),
        draw(1),
        draw(0, 1),
        draw(0, "1"),
        draw(0, "sampler"),
        draw(0, "sampler", 3),
    ]
    assert len({tuple(s) for s in streams}) == len(streams)


def test_the_first_numbers_never_change_between_releases():
    assert generator(0, "sampler", 0).integers(0, 1000, 3).tolist() == [869, 462, 992]


def test_global_random_state_is_left_alone():
    before = np.random.get_state()[1].copy(), torch.get_rng_state().clone(), random.getstate()
    generator(5, "x").random(10)
    torch.rand(10, generator=torch_generator(5, "x"))
    np.testing.assert_array_equal(np.random.get_state()[1], before[0])
    assert torch.equal(torch.get_rng_state(), before[1]) and random.getstate() == before[2]


def test_numpy_integers_name_the_same_stream_as_python_ones():
    assert generator(0, np.int64(3)).random() == generator(0, 3).random()
