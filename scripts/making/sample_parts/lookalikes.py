"""Are two artists' pictures really two drawings? Found by comparing small versions of them."""

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageChops

SIDE = 16
# Root mean square colour difference, on a 0 … 1 scale, of the 16×16 versions. Re-encoding and
# rescaling a picture stay below 0.03; two hands' drawings of one thing are mostly above 0.1.
SAME_PICTURE = 0.06


def signature(image: Image.Image) -> np.ndarray:
    """The drawing without its white margin, 16×16 RGB, as (768,) float32 in 0 … 1."""
    white = Image.new("RGB", image.size, "white")
    difference = ImageChops.difference(image, white).convert("L")
    box = difference.point(lambda value: 255 if value > 12 else 0).getbbox()
    small = image.crop(box or (0, 0, *image.size)).resize((SIDE, SIDE), Image.Resampling.BOX)
    return np.asarray(small, dtype=np.float32).reshape(-1) / 255


def nearest(signatures: np.ndarray, others: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Distance and position of the closest of ``others`` (M, 768), for each of (N, 768)."""
    squares = (others**2).sum(axis=1)
    distances, positions = [], []
    for row in signatures:
        squared = squares - 2 * others @ row + row @ row
        positions.append(int(squared.argmin()))
        distances.append(float(np.sqrt(max(squared.min(), 0) / signatures.shape[1])))
    return np.array(distances), np.array(positions)


def signatures(images: Sequence[Image.Image]) -> np.ndarray:
    """Signatures of all pictures, (N, 768) float32."""
    return np.stack([signature(image) for image in images])
