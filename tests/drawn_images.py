"""Small images, drawn with Pillow: no two numbers give the same."""

import io

import numpy as np
from PIL import Image, ImageDraw

COLORS = ["crimson", "teal", "goldenrod", "royalblue", "purple", "olive", "coral", "slategray"]


def drawn(number: int, size: tuple[int, int] = (64, 48)) -> Image.Image:
    """An image that no other number gives."""
    random = np.random.default_rng(number)
    image = Image.new("RGB", size, tuple(random.integers(180, 255, 3).tolist()))
    draw = ImageDraw.Draw(image)
    for _ in range(3):
        x, y = random.integers(0, size[0]), random.integers(0, size[1])
        w, h = random.integers(5, size[0] // 2), random.integers(5, size[1] // 2)
        shape = (draw.ellipse, draw.rectangle)[int(random.integers(2))]
        shape((x, y, x + w, y + h), fill=COLORS[int(random.integers(len(COLORS)))])
    return image


def encoded(image: Image.Image, format: str = "JPEG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def jpeg(number: int) -> bytes:
    return encoded(drawn(number), quality=90)
