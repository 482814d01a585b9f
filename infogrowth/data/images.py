"""From encoded bytes to an RGB picture, with guards: what is not a whole picture is refused.

Nothing here changes Pillow's process-wide switches; a bad picture raises :class:`BadImage` with a
reason, and whoever reads a pile decides what to do with it.
"""

import io

from PIL import Image, ImageOps

MAX_PIXELS = 178_956_970  # where Pillow itself refuses to open a picture
# Only picture formats: Pillow would also hand a file to a PostScript interpreter.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "JPEG2000", "PPM", "ICO")

_ORIENTATION = 0x0112  # the EXIF tag


class BadImage(Exception):
    """A sample's picture cannot be used; ``reason`` says why, in words fit for a record."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


def decode_image(
    data: bytes | memoryview, max_pixels: int = MAX_PIXELS, at_least: int | None = None
) -> Image.Image:
    """Decode the whole picture to RGB, upright.

    * Rotated as its EXIF orientation says, since captions describe what people saw. (The paper's
      code showed such pictures lying on their side.)
    * Transparency is laid on white; a palette, CMYK, grey or 16-bit picture is converted.
    * Of an animation, the first frame.

    Args:
        data: the encoded picture.
        max_pixels: larger pictures are refused before they are decoded. Pillow's own limit
            (``MAX_PIXELS``) stands above it.
        at_least: when given, a JPEG may be decoded at a half, a quarter or an eighth of its size
            as long as neither side falls below so many pixels; for training, where time matters.

    Returns:
        a loaded picture in mode RGB.

    Raises:
        BadImage: empty, not a picture, truncated or corrupt, too many pixels.
    """
    if len(data) == 0:
        raise BadImage("the image is empty")
    image = _opened(data)
    if image.width * image.height > max_pixels:
        raise BadImage(f"the image has more than {max_pixels} pixels")
    try:
        if at_least is not None and image.format == "JPEG":
            _draft(image, at_least)
        image.load()
        return _rgb(_upright(image))
    except BadImage:
        raise
    except Exception as error:  # a decoder may say anything to hostile bytes
        raise BadImage(f"the image is truncated or corrupt: {_short(error)}") from error


def _opened(data: bytes | memoryview) -> Image.Image:
    Image.init()
    formats = [name for name in FORMATS if name in Image.OPEN]
    try:
        return Image.open(io.BytesIO(data), formats=formats)
    except Image.UnidentifiedImageError as error:
        raise BadImage("not an image that can be read") from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise BadImage("the image has too many pixels for Pillow") from error
    except Exception as error:
        raise BadImage(f"the image is truncated or corrupt: {_short(error)}") from error


def _draft(image: Image.Image, at_least: int) -> None:
    """Let libjpeg decode fewer pixels, which is several times quicker for a large photograph."""
    scale = min(image.width, image.height) // at_least
    if scale >= 2:
        image.draft(None, (image.width // scale, image.height // scale))


def _upright(image: Image.Image) -> Image.Image:
    try:
        turned = image.getexif().get(_ORIENTATION, 1) != 1
    except Exception:  # damaged metadata does not make a bad picture
        return image
    return ImageOps.exif_transpose(image) if turned else image


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode == "F":
        raise BadImage("the image has floating-point pixels")
    if image.mode.startswith("I"):
        return _eight_bits(image).convert("RGB")
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        layer = image.convert("RGBA")
        white = Image.new("RGBA", layer.size, "white")
        return Image.alpha_composite(white, layer).convert("RGB")
    return image.convert("RGB")


def _eight_bits(image: Image.Image) -> Image.Image:
    """Grey of 16 bits a pixel, of which the upper 8 are kept (Pillow's convert would clip)."""
    wide = image.convert("I")
    return wide.point(lambda value: value * (1 / 256)).convert("L")


def _short(error: Exception) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text[:120]
