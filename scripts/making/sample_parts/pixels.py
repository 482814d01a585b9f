"""What happens to pictures on the web: encodings, and the changes of near copies."""

import io

import numpy as np
from PIL import Image, ImageEnhance

ENDINGS = ("jpg", "png", "webp")


def encode(image: Image.Image, ending: str) -> bytes:
    """Encode small and with visible but harmless losses, as pictures on the web are."""
    file = io.BytesIO()
    if ending == "jpg":
        image.save(file, "JPEG", quality=75)
    elif ending == "webp":
        image.save(file, "WEBP", quality=78, method=4)
    else:
        image.quantize(64).save(file, "PNG", optimize=True)
    return file.getvalue()


def store(image: Image.Image, rng: np.random.Generator) -> tuple[str, bytes]:
    """One picture of the dataset: most are 128 px PNG or WebP, some 112 px JPEG."""
    ending = str(rng.choice(ENDINGS, p=(0.15, 0.45, 0.40)))
    if ending == "jpg":
        image = image.resize((112, 112), Image.Resampling.LANCZOS)
    return ending, encode(image, ending)


def near_copy(data: bytes, rng: np.random.Generator) -> tuple[str, bytes, str]:
    """The same picture as somebody else would post it again.

    Returns:
        ending, bytes, and what was done: "re-encoded", "rescaled", "cropped" or "tinted".
    """
    with Image.open(io.BytesIO(data)) as opened:
        image = opened.convert("RGB")
    change = str(rng.choice(("re-encoded", "rescaled", "cropped", "tinted")))
    if change == "rescaled":
        side = round(image.width * rng.uniform(0.7, 0.9))
        image = image.resize((side, side), Image.Resampling.LANCZOS)
    elif change == "cropped":
        left, top, right, bottom = rng.integers(1, 6, size=4).tolist()
        box = (left, top, image.width - right, image.height - bottom)
        image = image.crop(box).resize(image.size, Image.Resampling.BICUBIC)
    elif change == "tinted":
        image = ImageEnhance.Brightness(image).enhance(float(rng.uniform(0.92, 1.04)))
        image = ImageEnhance.Color(image).enhance(float(rng.uniform(0.75, 1.25)))
    ending = str(rng.choice(("jpg", "webp")))
    return ending, encode(image, ending), change
