"""Training and evaluation preprocessing, held against torchvision's own."""

import numpy as np
import pytest
import torch
from drawn_images import drawn
from PIL import Image
from torchvision import transforms as reference
from torchvision.transforms import InterpolationMode

from infogrowth.data.transforms import (
    MEAN,
    STD,
    EvaluationTransform,
    TrainingTransform,
    jittered,
    normalized,
    pixels,
    random_crop,
    tinted,
)
from infogrowth.randomness import generator


@pytest.mark.parametrize("size", [32, 224])
@pytest.mark.parametrize("picture_size", [(64, 48), (31, 200), (300, 224), (1, 1)])
def test_evaluation_is_a_bicubic_resize_and_one_normalisation(size, picture_size):
    image = drawn(1, (256, 256)).resize(picture_size)
    expected = reference.Compose(
        [
            reference.Resize((size, size), interpolation=InterpolationMode.BICUBIC),
            reference.ToTensor(),
            reference.Normalize(MEAN, STD),
        ]
    )(image)
    torch.testing.assert_close(EvaluationTransform(size)(image), expected)


def test_evaluation_is_the_same_every_time():
    transform, image = EvaluationTransform(48), drawn(2)
    assert torch.equal(transform(image), transform(image, generator(1, "x")))


def test_training_is_a_function_of_the_generator_alone():
    transform, image = TrainingTransform(48), drawn(2)
    np.random.seed(0)
    torch.manual_seed(0)
    state, torch_state = np.random.get_state()[1].tolist(), torch.get_rng_state()
    first = transform(image, generator(0, "augment", 1, 5))
    assert torch.equal(first, transform(image, generator(0, "augment", 1, 5)))
    assert not torch.equal(first, transform(image, generator(0, "augment", 1, 6)))
    assert not torch.equal(first, transform(image, generator(0, "augment", 2, 5)))
    assert np.random.get_state()[1].tolist() == state
    assert torch.equal(torch.get_rng_state(), torch_state)
    assert first.shape == (3, 48, 48) and first.dtype == torch.float32 and first.is_contiguous()


def test_normalised_values_are_those_of_the_pixels():
    image = drawn(3)
    values = normalized(pixels(image)).permute(1, 2, 0).double().numpy() * STD + MEAN
    assert np.abs(values * 255 - np.asarray(image)).max() < 1e-4


@pytest.mark.parametrize("augment", ["blip", "jitter", "none"])
def test_pixels_normalised_as_a_batch_are_the_images_that_a_worker_normalises(augment):
    image, whole = drawn(3, (90, 70)), TrainingTransform(48, augment=augment)
    raw = TrainingTransform(48, augment=augment, normalize=False)
    shown = torch.stack([raw(image, generator(0, "augment", n)) for n in range(5)])
    assert shown.dtype == torch.uint8 and shown.shape == (5, 3, 48, 48)
    expected = [whole(image, generator(0, "augment", n)) for n in range(5)]
    assert torch.equal(normalized(shown), torch.stack(expected))


@pytest.mark.parametrize(("width", "height"), [(640, 480), (100, 300)])
def test_crops_are_distributed_as_torchvisions(width, height):
    """2,000 crops each: area share and log aspect, two-sample Kolmogorov–Smirnov."""
    random = np.random.default_rng(1)
    ours = [random_crop(width, height, 0.2, random) for _ in range(2000)]
    ours = [(right - left, bottom - top) for left, top, right, bottom in ours]
    torch.manual_seed(0)
    canvas = torch.empty(3, height, width)
    theirs = [
        reference.RandomResizedCrop.get_params(canvas, [0.2, 1.0], [3 / 4, 4 / 3])[2:]
        for _ in range(2000)
    ]
    theirs = [(w, h) for h, w in theirs]
    for value in (lambda w, h: w * h, lambda w, h: w / h):
        first, second = (np.sort([value(w, h) for w, h in sizes]) for sizes in (ours, theirs))
        points = np.concatenate([first, second])
        shares = [np.searchsorted(part, points, side="right") / 2000 for part in (first, second)]
        assert np.abs(shares[0] - shares[1]).max() < 1.95 * np.sqrt(2 / 2000)  # p = 0.001


@pytest.mark.parametrize("size", [(1, 1), (1, 500), (500, 1), (7, 3), (640, 480)])
def test_crops_lie_inside_the_image(size):
    random = np.random.default_rng(2)
    for _ in range(300):
        left, top, right, bottom = random_crop(*size, 0.2, random)
        assert 0 <= left < right <= size[0] and 0 <= top < bottom <= size[1]


def test_without_augmentation_a_whole_crop_is_the_evaluation_or_its_mirror():
    image = drawn(4, (96, 96))
    whole = EvaluationTransform(32)(image)
    transform = TrainingTransform(32, min_scale=1.0, augment="none")
    random = np.random.default_rng(0)
    seen = set()
    for _ in range(300):
        result = transform(image, random)
        seen.add((torch.equal(result, whole), torch.equal(result, whole.flip(2))))
    assert (True, False) in seen and (False, True) in seen


def test_a_smaller_decoding_never_starves_the_smallest_crop():
    transform = TrainingTransform(224, min_scale=0.2)
    side = transform.pixels_needed
    # The narrowest crop: the smallest area at the widest aspect.
    assert np.sqrt(0.2 * side * side * 3 / 4) >= 224
    assert EvaluationTransform(224).pixels_needed is None


def test_only_images_without_colors_are_tinted_and_always_the_same_way():
    black = Image.new("RGB", (40, 40), "white")
    black.paste("black", (10, 10, 30, 30))
    red = Image.new("RGB", (40, 40), "white")
    red.paste("red", (10, 10, 30, 30))
    assert tinted(red, np.random.default_rng(0)) is red
    results = [np.asarray(tinted(black, np.random.default_rng(seed))) for seed in (1, 1, 2)]
    assert (results[0] == results[1]).all() and (results[0] != results[2]).any()
    # Two colors, where there were two.
    assert len(np.unique(results[0].reshape(-1, 3), axis=0)) == 2
    paper = [tinted(black, np.random.default_rng(s)).getpixel((0, 0)) for s in range(400)]
    assert 90 <= paper.count((255, 255, 255)) <= 150  # four in ten, if not swapped: 120


def test_jitter_is_a_function_of_its_generator_and_gives_the_size_asked_for():
    image = drawn(4, (96, 64))
    transform = TrainingTransform(32, min_scale=0.6, augment="jitter", tint=True)
    first, again, other = (transform(image, np.random.default_rng(seed)) for seed in (1, 1, 2))
    assert first.shape == (3, 32, 32)
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_jitter_moves_a_drawing_by_no_more_than_its_frame():
    image = Image.new("RGB", (96, 96), "white")
    image.paste((200, 30, 30), (24, 24, 72, 72))
    for seed in range(30):
        drawing = np.asarray(jittered(image, 48, 0.6, False, np.random.default_rng(seed)))
        inked = (drawing.astype(int) - drawing[0, 0]).__abs__().sum(axis=2) > 60
        assert 0.1 < inked.mean() < 0.6  # a quarter, at scales of 0.6 to 1 / 0.6
