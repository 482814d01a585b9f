"""The random augmentation against the paper's own images, to the bit."""

import json
from pathlib import Path

import numpy as np
import pytest
from drawn_images import drawn
from PIL import Image

from infogrowth.data.transforms import OPERATIONS, WARPS, random_augment

GOLDEN = Path(__file__).parents[1] / "golden"
GOLDEN_IMAGES = np.load(GOLDEN / "augment_ops.npz")
NAMES = json.loads((GOLDEN / "augment_ops.json").read_text())
IMAGE = Image.fromarray(GOLDEN_IMAGES["image"])


class LegacyDraws:
    """numpy's legacy generator behind the two methods of the new one: replays the paper's draws."""

    def __init__(self, seed: int) -> None:
        self._state = np.random.RandomState(seed)

    def integers(self, high: int, size: int) -> np.ndarray:
        return self._state.randint(0, high, size)

    def random(self) -> float:
        return self._state.random_sample()


@pytest.mark.parametrize("sign", [0, 1])
@pytest.mark.parametrize("name", OPERATIONS)
def test_every_operation_gives_the_papers_image_at_both_signs(name, sign):
    result = OPERATIONS[name](IMAGE, (1.0, -1.0)[sign])
    assert np.array_equal(np.asarray(result), GOLDEN_IMAGES[f"{name}_sign{sign}"])


@pytest.mark.parametrize("seed", range(30))
def test_chains_of_two_operations_give_the_papers_images(seed):
    result = random_augment(IMAGE, LegacyDraws(seed))
    assert np.array_equal(np.asarray(result), GOLDEN_IMAGES[f"chain_seed{seed}"])
    names = [list(OPERATIONS)[n] for n in LegacyDraws(seed).integers(10, 2)]
    assert names == NAMES[f"chain_seed{seed}"]


@pytest.mark.parametrize("size", [(1, 1), (3, 200), (224, 224), (225, 17)])
@pytest.mark.parametrize("name", OPERATIONS)
def test_operations_keep_the_size_of_odd_images(name, size):
    result = OPERATIONS[name](drawn(1, (256, 256)).resize(size), -1.0)
    assert result.size == size and result.mode == "RGB"


@pytest.mark.parametrize("name", WARPS)
def test_a_warp_leaves_grey_where_it_uncovers_the_border(name):
    white = np.asarray(OPERATIONS[name](Image.new("RGB", (60, 60), "white"), 1.0))
    corners = [white[y, x].tolist() for y in (0, -1) for x in (0, -1)]
    assert [128, 128, 128] in corners
    assert white[30, 30].tolist() == [255, 255, 255]


def test_a_constant_channel_has_no_contrast_to_stretch():
    grey = Image.new("RGB", (5, 5), (0, 77, 255))
    assert np.array_equal(np.asarray(OPERATIONS["AutoContrast"](grey, 1.0)), np.asarray(grey))


def test_every_operation_is_drawn_equally_often_and_happens_half_the_time():
    """20,000 images: a share p of n draws lies within 5 standard deviations."""
    counts = dict.fromkeys(OPERATIONS, 0)
    calls = {
        name: (lambda image, sign, name=name: counts.__setitem__(name, counts[name] + 1) or image)
        for name in OPERATIONS
    }
    random = np.random.default_rng(0)
    with pytest.MonkeyPatch.context() as patch:
        for name, call in calls.items():
            patch.setitem(OPERATIONS, name, call)
        for _ in range(20_000):
            random_augment(IMAGE, random)
    expected, spread = 20_000 * 2 / 10 / 2, np.sqrt(40_000 * 0.05 * 0.95)
    assert all(abs(count - expected) < 5 * spread for count in counts.values()), counts
