"""BLIP's random augmentation: up to two of ten operations at level 5, functions of an image.

The operations reproduce the paper's images to the bit (golden/augment_ops). Warps are bilinear
with coordinates in 32nds of a pixel and a grey border (128), as OpenCV computes them.
"""

import math
from collections.abc import Callable
from functools import partial

import numpy as np
from PIL import Image, ImageEnhance, ImageOps

LEVEL, MAX_LEVEL = 5, 10
OPERATIONS_PER_IMAGE = 2
PROBABILITY = 0.5
BORDER = 128

Operation = Callable[[Image.Image, float], Image.Image]

# Three 8-bit channels in one 64-bit number, 21 bits apart: a weighted sum of pixels with weights
# that add up to 1024 is one multiplication and one addition for all three.
_BITS = 21
_EVERY_CHANNEL = 1 + (1 << _BITS) + (1 << 2 * _BITS)
_STRIP = 64  # rows


def random_augment(image: Image.Image, random: np.random.Generator) -> Image.Image:
    """Two operations drawn with replacement; each then happens with probability 1/2.

    A warp goes either way with the same chance.
    """
    names = tuple(OPERATIONS)
    for choice in random.integers(len(names), size=OPERATIONS_PER_IMAGE):
        if random.random() > PROBABILITY:
            continue
        name = names[choice]
        sign = -1.0 if name in WARPS and random.random() > 0.5 else 1.0
        image = OPERATIONS[name](image, sign)
    return image


def identity(image: Image.Image, sign: float) -> Image.Image:
    """The image itself."""
    return image


def auto_contrast(image: Image.Image, sign: float) -> Image.Image:
    """Stretch each channel to 0…255, as the paper's code really does.

    Its 8-bit arithmetic wraps around: a channel whose darkest value is not 0 turns to 255
    throughout. The published models were trained with that, so it stays.
    """
    table: list[int] = []
    for low, high in _channel_extrema(image):
        if high <= low:
            table.extend(range(256))
            continue
        scale = 255 / (high - low)
        wrapped = (256 - low) % 256  # what -low is in 8 bits
        table.extend(min(int(value * scale + wrapped * scale), 255) for value in range(256))
    return image.point(table)


def equalize(image: Image.Image, sign: float) -> Image.Image:
    """Flatten each channel's histogram."""
    return ImageOps.equalize(image)


def brightness(image: Image.Image, sign: float) -> Image.Image:
    """Blend with black; at level 5 the factor is 1, which leaves the image as it is."""
    return _enhanced(image, ImageEnhance.Brightness)


def sharpness(image: Image.Image, sign: float) -> Image.Image:
    """Blend with a smoothed copy; at level 5 the factor is 1 as well."""
    return _enhanced(image, ImageEnhance.Sharpness)


def shear_x(image: Image.Image, sign: float) -> Image.Image:
    """Rows move by 0.15 pixels per row."""
    return _warped(image, [[1, -sign * 0.3 * LEVEL / MAX_LEVEL, 0], [0, 1, 0]])


def shear_y(image: Image.Image, sign: float) -> Image.Image:
    """Columns move by 0.15 pixels per column."""
    return _warped(image, [[1, 0, 0], [-sign * 0.3 * LEVEL / MAX_LEVEL, 1, 0]])


def translate(image: Image.Image, sign: float, x: int = 0, y: int = 0) -> Image.Image:
    """Move by whole pixels: 5 at level 5."""
    pixels = -int(sign * 10 * LEVEL / MAX_LEVEL)
    moved = Image.new("RGB", image.size, (BORDER,) * 3)
    moved.paste(image, (x * pixels, y * pixels))
    return moved


def rotate(image: Image.Image, sign: float) -> Image.Image:
    """Turn by 15 degrees about the middle: clockwise for a positive sign."""
    angle = math.radians(sign * 30 * LEVEL / MAX_LEVEL)
    cos, sin = math.cos(angle), math.sin(angle)
    x, y = image.width / 2, image.height / 2
    return _warped(
        image, [[cos, sin, (1 - cos) * x - sin * y], [-sin, cos, sin * x + (1 - cos) * y]]
    )


OPERATIONS: dict[str, Operation] = {
    "Identity": identity,
    "AutoContrast": auto_contrast,
    "Brightness": brightness,
    "Sharpness": sharpness,
    "Equalize": equalize,
    "ShearX": shear_x,
    "ShearY": shear_y,
    "TranslateX": partial(translate, x=1),
    "TranslateY": partial(translate, y=1),
    "Rotate": rotate,
}
WARPS = ("ShearX", "ShearY", "TranslateX", "TranslateY", "Rotate")


def _enhanced(image: Image.Image, enhancer: Callable) -> Image.Image:
    factor = 0.1 + 1.8 * LEVEL / MAX_LEVEL
    return image if factor == 1 else enhancer(image).enhance(factor)


def _channel_extrema(image: Image.Image) -> list[tuple[int, int]]:
    return [channel.getextrema() for channel in image.split()]  # type: ignore[misc]


def _warped(image: Image.Image, inverse: list[list[float]]) -> Image.Image:
    """Sample ``image`` at ``inverse · (x, y, 1)`` for every pixel (x, y) of the result."""
    pixels_HWC = np.asarray(image)
    height, width = pixels_HWC.shape[:2]
    # Two border pixels all around: whatever lies further outside is as good as the border.
    packed = np.full((height + 4, width + 4), BORDER * _EVERY_CHANNEL, np.uint64)
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
