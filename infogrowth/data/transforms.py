"""From an image to the model's input: training (random) and evaluation (never random) apart."""

import math
from collections.abc import Callable
from functools import cache, partial
from typing import Literal

import numpy as np
import torch
from PIL import Image, ImageEnhance, ImageOps

MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)

Augment = Literal["blip", "jitter", "none"]

_ASPECTS = (3 / 4, 4 / 3)  # width to height of a random crop
_CROP_ATTEMPTS = 10
# The largest difference between a pixel's channels in an image that counts as one without colors.
_COLORLESS = 30


class EvaluationTransform:
    """BLIP's preprocessing for evaluation and features: the whole image, resized to a square.

    Call it with an RGB image; gives ``(3, size, size) float32``, normalised. A second argument
    is ignored, so that it can stand where a training transform does.

    Args:
        normalize: False gives ``uint8`` and leaves the rest to :func:`normalized` on the device.
    """

    pixels_needed = None

    def __init__(self, size: int, normalize: bool = True) -> None:
        self.size, self.normalize = size, normalize

    def __call__(self, image: Image.Image, random: object = None) -> torch.Tensor:
        shown = pixels(image.resize((self.size, self.size), Image.Resampling.BICUBIC))
        return normalized(shown) if self.normalize else shown


class TrainingTransform:
    """A random crop, a random flip, BLIP's random augmentation: a pure function of its arguments.

    Call it with an RGB image and a numpy generator; gives ``(3, size, size) float32``,
    normalised.

    Args:
        size: pixels a side of the result.
        min_scale: the smallest share of the image's area that a crop keeps (0.2 for
            pretraining, 0.5 for retrieval in BLIP).
        augment: ``blip`` (its two random operations), ``jitter`` (see :func:`jittered`, which then
            makes the crop and the flip as well) or ``none``.
        tint: give an image without colors a random ink and a random paper (before the others).
        normalize: False gives ``uint8`` and leaves the rest to :func:`normalized` on the device:
            a quarter of the bytes to hand over, and a sixth less work for a loader's worker.
    """

    def __init__(
        self,
        size: int,
        min_scale: float = 0.2,
        augment: Augment = "blip",
        tint: bool = False,
        normalize: bool = True,
    ) -> None:
        self.size, self.min_scale, self.augment, self.tint = size, min_scale, augment, tint
        self.normalize = normalize
        # An image at least so wide and high fills the smallest crop without being enlarged.
        self.pixels_needed = math.ceil(size / math.sqrt(max(min_scale, 0.01) * _ASPECTS[0]))

    def __call__(self, image: Image.Image, random: np.random.Generator) -> torch.Tensor:
        shown = pixels(self._shown(image, random))
        return normalized(shown) if self.normalize else shown

    def _shown(self, image: Image.Image, random: np.random.Generator) -> Image.Image:
        if self.augment == "jitter":
            return jittered(image, self.size, self.min_scale, self.tint, random)
        box = random_crop(image.width, image.height, self.min_scale, random)
        image = image.resize((self.size, self.size), Image.Resampling.BICUBIC, box=box)
        if random.random() < 0.5:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        if self.tint:
            image = tinted(image, random)
        return random_augment(image, random) if self.augment == "blip" else image


def random_crop(
    width: int, height: int, min_scale: float, random: np.random.Generator
) -> tuple[int, int, int, int]:
    """A box (left, top, right, bottom) that keeps ``min_scale`` to all of the area.

    Its aspect is log-uniform in 3:4…4:3. Where ten draws do not fit into the image it is the
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


def tinted(image: Image.Image, random: np.random.Generator) -> Image.Image:
    """An RGB image with colors of its own as it is; any other between two random ones.

    Black becomes the ink, any color; white the paper: white in four of ten, else a light color.
    In a quarter of all cases the two change places, a drawing in light on dark.
    """
    pixels_HWC = np.asarray(image)
    if not colorless(pixels_HWC):
        return image
    ink, light = random.random(3), 1 - 0.35 * random.random(3)
    white, swapped = random.random(2) < (0.4, 0.25)
    paper = np.ones(3) if white else light
    if swapped:
        ink, paper = paper, 0.8 * ink
    brightness_HW1 = pixels_HWC.mean(axis=2, keepdims=True) / 255
    mixed_HWC = ink + brightness_HW1 * (paper - ink)
    return Image.fromarray((255 * mixed_HWC + 0.5).astype(np.uint8))


def colorless(pixels_HWC: np.ndarray) -> bool:
    """Whether no pixel of ``(H, W, 3) uint8`` has a color to speak of."""
    return int((pixels_HWC.max(axis=2) - pixels_HWC.min(axis=2)).max()) < _COLORLESS


def jittered(
    image: Image.Image, size: int, min_scale: float, tint: bool, random: np.random.Generator
) -> Image.Image:
    """An RGB image in another hand's manner: turned, stretched, sheared, moved; other colors.

    For drawings, which fill their frame and differ from hand to hand in proportions and colors.

    Args:
        size: pixels a side of the result.
        min_scale: the smallest share of the area that is shown; the largest is its inverse, with
            the color of the top left corner around the image.
        tint: whether one image in ten loses its colors, and those without get random ones.
    """
    angle, shear = math.radians(random.normal(0, 8)), random.normal(0, 0.08)
    zoom = random.uniform(-0.5, 0.5) * math.log(min_scale)
    stretch = random.uniform(-0.15, 0.15)
    flip = -1.0 if random.random() < 0.5 else 1.0
    turn = np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
    scale = np.array([[flip * math.exp(zoom + stretch), shear], [0, math.exp(zoom - stretch)]])
    matrix = turn @ scale * (np.array([[image.width], [image.height]]) / size)
    shift = random.uniform(-0.06, 0.06, 2) * (image.width, image.height)
    offset = np.array([image.width / 2, image.height / 2]) - matrix @ [size / 2, size / 2] + shift
    paper = image.getpixel((0, 0))
    drawn = image.transform(
        (size, size),
        Image.Transform.AFFINE,
        (*matrix[0], offset[0], *matrix[1], offset[1]),
        Image.Resampling.BILINEAR,
        fillcolor=paper,  # type: ignore[arg-type]
    )
    recolor, bleach = random.random(2) < (0.6, 0.1)
    if tint and bleach:
        drawn = drawn.convert("L").convert("RGB")
    if tint and colorless(np.asarray(drawn)):
        return tinted(drawn, random)
    return recolored(drawn, random) if recolor else drawn


def recolored(image: Image.Image, random: np.random.Generator) -> Image.Image:
    """An RGB image with its hue turned, a little mostly, and other saturation and contrast."""
    pixels_HWC = np.array(image.convert("HSV"))
    far = random.random() < 0.25
    turn = int(random.integers(256) if far else random.integers(-14, 15))
    pixels_HWC[..., 0] += np.uint8(turn % 256)
    image = Image.fromarray(pixels_HWC, "HSV").convert("RGB")
    for enhancer, low, high in (
        (ImageEnhance.Color, 0.4, 1.5),
        (ImageEnhance.Contrast, 0.7, 1.2),
        (ImageEnhance.Brightness, 0.75, 1.15),
    ):
        image = enhancer(image).enhance(random.uniform(low, high))
    return image


def pixels(image: Image.Image) -> torch.Tensor:
    """An RGB image as ``(3, H, W) uint8``."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()


def normalized(pixels_CHW: torch.Tensor) -> torch.Tensor:
    """``(…, 3, H, W) uint8`` as float32 on its device: (value / 255 - MEAN) / STD.

    The same bits on every device: they divide alike by a tensor, by a number they need not.
    """
    full, mean, std = _per_channel(pixels_CHW.device)
    return pixels_CHW.to(torch.float32).div_(full).sub_(mean).div_(std)


@cache
def _per_channel(device: torch.device) -> list[torch.Tensor]:
    """White's value, mean and deviation: made once, for making them waits for the device."""
    with torch.inference_mode(False):
        return [torch.tensor(c, device=device).view(3, 1, 1) for c in ((255.0,) * 3, MEAN, STD)]


# --- BLIP's random augmentation -------------------------------------------------------------------

_LEVEL = 5 / 10
_BORDER = 128
# Three 8-bit channels in one 64-bit number, 21 bits apart: a weighted sum of pixels with weights
# that add up to 1024 is one multiplication and one addition for all three.
_BITS = 21
_EVERY_CHANNEL = 1 + (1 << _BITS) + (1 << 2 * _BITS)
_STRIP = 64  # rows

Operation = Callable[[Image.Image, float], Image.Image]  # the second is the direction, 1 or −1


def random_augment(image: Image.Image, random: np.random.Generator) -> Image.Image:
    """BLIP's random augmentation: two of ten operations, drawn with replacement, at level 5 of 10.

    Each then happens with probability 1/2; a warp goes either way with the same chance. The
    operations reproduce the paper's images to the bit (golden/augment_ops). Warps are bilinear
    with coordinates in 32nds of a pixel and a grey border (128), as OpenCV computes them.
    """
    for choice in random.integers(len(OPERATIONS), size=2):
        if random.random() > 0.5:
            continue
        name = tuple(OPERATIONS)[choice]
        sign = -1.0 if name in WARPS and random.random() > 0.5 else 1.0
        image = OPERATIONS[name](image, sign)
    return image


def _auto_contrast(image: Image.Image, sign: float) -> Image.Image:
    """Stretch each channel to 0…255, as the paper's code really does.

    Its 8-bit arithmetic wraps around: a channel whose darkest value is not 0 turns to 255
    throughout. The published models were trained with that, so it stays.
    """
    table: list[int] = []
    for low, high in image.getextrema():  # type: ignore[misc]  # of each channel
        if high <= low:
            table.extend(range(256))
            continue
        scale = 255 / (high - low)
        wrapped = (256 - low) % 256  # what -low is in 8 bits
        table.extend(min(int(value * scale + wrapped * scale), 255) for value in range(256))
    return image.point(table)


def _shear(image: Image.Image, sign: float, x: int = 0, y: int = 0) -> Image.Image:
    """Move rows (x) by 0.15 pixels per row, or columns (y) per column."""
    slope = -sign * 0.3 * _LEVEL
    return _warped(image, [[1, x * slope, 0], [y * slope, 1, 0]])


def _translate(image: Image.Image, sign: float, x: int = 0, y: int = 0) -> Image.Image:
    """Move by whole pixels: 5 at level 5."""
    pixels = -int(sign * 10 * _LEVEL)
    moved = Image.new("RGB", image.size, (_BORDER,) * 3)
    moved.paste(image, (x * pixels, y * pixels))
    return moved


def _rotate(image: Image.Image, sign: float) -> Image.Image:
    """Turn by 15 degrees about the middle: clockwise for a positive sign."""
    angle = math.radians(sign * 30 * _LEVEL)
    cos, sin = math.cos(angle), math.sin(angle)
    x, y = image.width / 2, image.height / 2
    return _warped(
        image, [[cos, sin, (1 - cos) * x - sin * y], [-sin, cos, sin * x + (1 - cos) * y]]
    )


# Brightness and sharpness blend by 0.1 + 1.8 · level / 10, which at level 5 leaves all as it is.
OPERATIONS: dict[str, Operation] = {
    "Identity": lambda image, sign: image,
    "AutoContrast": _auto_contrast,
    "Brightness": lambda image, sign: image,
    "Sharpness": lambda image, sign: image,
    "Equalize": lambda image, sign: ImageOps.equalize(image),
    "ShearX": partial(_shear, x=1),
    "ShearY": partial(_shear, y=1),
    "TranslateX": partial(_translate, x=1),
    "TranslateY": partial(_translate, y=1),
    "Rotate": _rotate,
}
WARPS = ("ShearX", "ShearY", "TranslateX", "TranslateY", "Rotate")


def _warped(image: Image.Image, inverse: list[list[float]]) -> Image.Image:
    """Sample ``image`` at ``inverse · (x, y, 1)`` for every pixel (x, y) of the result."""
    pixels_HWC = np.asarray(image)
    height, width = pixels_HWC.shape[:2]
    # Two border pixels all around: whatever lies further outside is as good as the border.
    packed = np.full((height + 4, width + 4), _BORDER * _EVERY_CHANNEL, np.uint64)
    inner = packed[2:-2, 2:-2]
    inner[:] = pixels_HWC[..., 2]
    for channel in (1, 0):
        inner <<= _BITS
        inner |= pixels_HWC[..., channel]
    result = np.empty_like(pixels_HWC)
    # In strips that stay in the processor's cache, which is four times quicker.
    for top in range(0, height, _STRIP):
        rows = np.arange(top, min(top + _STRIP, height))
        total = _sampled(
            packed, *(_positions(coefficients, rows, width) for coefficients in inverse)
        )
        for channel in range(3):
            result[rows[0] : rows[-1] + 1, :, channel] = total  # the lower 8 bits stay
            total >>= _BITS
    return Image.fromarray(result)


def _sampled(
    packed: np.ndarray,
    columns: tuple[np.ndarray, np.ndarray],
    rows: tuple[np.ndarray, np.ndarray],
) -> np.ndarray:
    """The weighted sums of four neighbouring pixels each, rounded, still packed."""
    stride, flat = packed.shape[1], packed.ravel()
    (column, right), (row, lower) = columns, rows
    at = (np.clip(row, -2, packed.shape[0] - 4) + 2) * stride
    at += np.clip(column, -2, stride - 4) + 2
    left = 32 - right
    total = flat.take(at) * left
    total += flat.take(at + 1) * right
    if lower.any():
        total *= 32 - lower
        at += stride
        below = flat.take(at) * left
        below += flat.take(at + 1) * right
        below *= lower
        total += below
    else:  # a shear along the rows
        total <<= 5
    total += np.uint64(512 * _EVERY_CHANNEL)
    total >>= 10
    return total


def _positions(
    coefficients: list[float], rows: np.ndarray, width: int
) -> tuple[np.ndarray, np.ndarray]:
    """Whole pixel and 32nds, ``(rows, W)`` each, of one coordinate, in OpenCV's fixed point."""
    by_x, by_y, offset = coefficients
    by_row = np.rint((by_y * rows + offset) * 1024).astype(np.int64) + 16
    by_column = np.rint(by_x * np.arange(width) * 1024).astype(np.int64)
    position = by_row[:, None] + by_column
    position >>= 5
    return position >> 5, (position & 31).view(np.uint64)
