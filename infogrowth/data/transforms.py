"""From a picture to the model's input: training (random) and evaluation (never random) apart."""

import math

import numpy as np
import torch
from PIL import Image

from infogrowth.data.augmentation import random_augment

MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)

_ASPECTS = (3 / 4, 4 / 3)  # width to height of a random crop
_CROP_ATTEMPTS = 10


class EvaluationTransform:
    """The whole picture, resized to a square: the same tensor every time.

    Call it with an RGB picture; gives ``(3, size, size) float32``, normalised. A second argument
    is ignored, so that it can stand where a training transform does.
    """

    pixels_needed = None

    def __init__(self, size: int) -> None:
        self.size = size

    def __call__(self, image: Image.Image, random: object = None) -> torch.Tensor:
        return normalized(image.resize((self.size, self.size), Image.Resampling.BICUBIC))


class TrainingTransform:
    """A random crop, a random flip, BLIP's random augmentation: a pure function of its arguments.

    Call it with an RGB picture and a numpy generator; gives ``(3, size, size) float32``,
    normalised.

    Args:
        size: pixels a side of the result.
        min_scale: the smallest share of the picture's area that a crop keeps (0.2 for
            pretraining, 0.5 for retrieval in BLIP).
        augment: whether the two random operations are applied.
    """

    def __init__(self, size: int, min_scale: float = 0.2, augment: bool = True) -> None:
        self.size, self.min_scale, self.augment = size, min_scale, augment
        # A picture at least so wide and high fills the smallest crop without being enlarged.
        self.pixels_needed = math.ceil(size / math.sqrt(max(min_scale, 0.01) * _ASPECTS[0]))

    def __call__(self, image: Image.Image, random: np.random.Generator) -> torch.Tensor:
        box = random_crop(image.width, image.height, self.min_scale, random)
        image = image.resize((self.size, self.size), Image.Resampling.BICUBIC, box=box)
        if random.random() < 0.5:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        return normalized(random_augment(image, random) if self.augment else image)


def evaluation_transform(size: int) -> EvaluationTransform:
    """BLIP's preprocessing for evaluation and feature extraction, at ``size`` pixels."""
    return EvaluationTransform(size)


def training_transform(
    size: int, min_scale: float = 0.2, augment: bool = True
) -> TrainingTransform:
    """BLIP's preprocessing for training, at ``size`` pixels; see :class:`TrainingTransform`."""
    return TrainingTransform(size, min_scale, augment)


def random_crop(
    width: int, height: int, min_scale: float, random: np.random.Generator
) -> tuple[int, int, int, int]:
    """A box (left, top, right, bottom) that keeps ``min_scale`` to all of the area.

    Its aspect is log-uniform in 3:4…4:3. Where ten draws do not fit into the picture it is the
    largest centred box of an allowed aspect (the rule of torchvision's RandomResizedCrop).
    """
    area = width * height
    low, high = (math.log(aspect) for aspect in _ASPECTS)
    for _ in range(_CROP_ATTEMPTS):
        kept = area * random.uniform(min_scale, 1.0)
        aspect = math.exp(random.uniform(low, high))
        w, h = round(math.sqrt(kept * aspect)), round(math.sqrt(kept / aspect))
        if 0 < w <= width and 0 < h <= height:
            left = int(random.integers(width - w + 1))
            top = int(random.integers(height - h + 1))
            return left, top, left + w, top + h
    w = min(width, max(1, round(height * _ASPECTS[1])))
    h = min(height, max(1, round(width / _ASPECTS[0])))
    left, top = (width - w) // 2, (height - h) // 2
    return left, top, left + w, top + h


def normalized(image: Image.Image) -> torch.Tensor:
    """An RGB picture as ``(3, H, W) float32``: (value / 255 - MEAN) / STD."""
    pixels_CHW = torch.from_numpy(np.array(image)).permute(2, 0, 1)
    scaled = pixels_CHW.to(torch.float32, memory_format=torch.contiguous_format).div_(255)
    return scaled.sub_(_PER_CHANNEL[0]).div_(_PER_CHANNEL[1])


_PER_CHANNEL = tuple(torch.tensor(values).view(3, 1, 1) for values in (MEAN, STD))
