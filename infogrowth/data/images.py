"""From encoded bytes to an RGB image, with guards: what is not a whole image is refused.

Nothing here changes Pillow's process-wide switches; a bad image raises :class:`BadSample` with a
reason, and whoever reads a dataset decides what to do with it.
"""

import io
import zlib
from contextlib import suppress

from PIL import Image

from infogrowth.errors import BadSample, shorten

MAX_PIXELS = 178_956_970  # where Pillow itself refuses to open an image
# Only image formats: Pillow would also hand a file to a PostScript interpreter.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "JPEG2000", "PPM", "ICO")

_ORIENTATION = 0x0112  # the EXIF tag
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_PNG_CHUNKS = (b"IHDR", b"PLTE", b"IDAT", b"IEND", b"tRNS")
_OTHER_FORMATS = {  # what begins like this, in lower case, is called by its name
    "SVG": (b"<svg",),
    "HTML": (b"<html", b"<!doctype html"),
    "PostScript": (b"%!ps",),
    "PDF": (b"%pdf",),
    "Photoshop": (b"8bps",),
    "HEIC": (b"ftyphei", b"ftypmif1", b"ftyphev"),
    "JPEG XL": (b"\xff\x0a", b"jxl "),
    "a video": (b"ftypmp4", b"ftypiso", b"ftypqt", b"\x1a\x45\xdf\xa3"),
    "ZIP": (b"pk\x03\x04",),
    "gzip": (b"\x1f\x8b",),
    "JSON": (b'{"',),
}


def decode_image(
    data: bytes | memoryview, max_pixels: int = MAX_PIXELS, at_least: int | None = None
) -> Image.Image:
    """Decode the whole image to RGB, upright.

    * Rotated as its EXIF orientation says, since captions describe what people saw. (The paper's
      code showed such images lying on their side.)
    * Transparency is laid on white; a palette, CMYK, grey or 16-bit image is converted.
    * Of an animation, the first frame.

    Args:
        data: the encoded image.
        max_pixels: larger images are refused before they are decoded. Pillow's own limit
            (``MAX_PIXELS``) stands above it.
        at_least: when given, a JPEG may be decoded at a half, a quarter or an eighth of its size
            as long as neither side falls below so many pixels; for training, where time matters.

    Returns:
        a loaded image in mode RGB.

    Raises:
        BadSample: empty, not an image, truncated or corrupt, too many pixels.
    """
    if len(data) == 0:
        raise BadSample("the image is empty")
    try:
        return _decoded(data, max_pixels, at_least)
    except BadSample as error:
        if not bytes(data[:4]).startswith((b"\x89PNG", b"\xff\xd8")):
            raise
        try:  # perhaps only the metadata is damaged, or too large for Pillow
            return _decoded(_without_metadata(bytes(data)), max_pixels, at_least)
        except (BadSample, IndexError):
            raise error from None


def _decoded(data: bytes | memoryview, max_pixels: int, at_least: int | None) -> Image.Image:
    Image.init()
    formats = [name for name in FORMATS if name in Image.OPEN]
    try:
        image = Image.open(io.BytesIO(data), formats=formats)
        if image.width * image.height > max_pixels:
            raise BadSample(f"the image has more than {max_pixels} pixels")
        if at_least is not None and image.format == "JPEG":
            scale = min(image.width, image.height) // at_least
            if scale >= 2:  # several times quicker for a large photograph
                image.draft(None, (image.width // scale, image.height // scale))
        image.load()  # before anything is asked for: asking a PNG for its EXIF may hide an error
        turn = None
        with suppress(Exception):  # damaged metadata does not make a bad image
            turn = _TURNS.get(int(image.getexif().get(_ORIENTATION, 1)))
        return _rgb(image if turn is None else image.transpose(turn))
    except BadSample:
        raise
    except Image.UnidentifiedImageError as error:
        raise BadSample(_unidentified(bytes(data[:512]), formats)) from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise BadSample("the image has too many pixels for Pillow") from error
    except Exception as error:  # a decoder may say anything to hostile bytes
        raise BadSample(f"the image is truncated or corrupt: {shorten(error, 120)}") from error


def _unidentified(start: bytes, formats: list[str]) -> str:
    """Why no decoder takes what begins like this."""
    for name in formats:
        accept = Image.OPEN[name][1]
        if accept is not None and accept(start[:16]) is True:
            return f"the image is truncated or corrupt: no decoder takes this {name}"
    for name, marks in _OTHER_FORMATS.items():
        if any(mark in (start if name == "SVG" else start[:16]).lower() for mark in marks):
            return f"not an image in a format that is read: {name}"
    return "not an image that can be read"


def _without_metadata(data: bytes) -> bytes:
    """A PNG or JPEG without its metadata.

    In a PNG the chunks of pixels, palette, transparency and EXIF stay, in a JPEG all but comments
    and the segments of applications (except Adobe's, which says how colors are stored).
    """
    kept: list[bytes] = []
    if data.startswith(b"\x89PNG"):
        position = 8
        while position + 8 <= len(data):
            size = int.from_bytes(data[position : position + 4], "big") + 12
            chunk = data[position : position + size]
            whole = chunk[-4:] == zlib.crc32(chunk[4:-4]).to_bytes(4, "big")
            if chunk[4:8] in _PNG_CHUNKS or (chunk[4:8] == b"eXIf" and whole):
                kept.append(chunk)
            position += size
        return data[:8] + b"".join(kept)
    position = 2
    while data[position : position + 1] == b"\xff" and data[position + 1] != 0xDA:
        marker = data[position + 1]
        size = int.from_bytes(data[position + 2 : position + 4], "big") + 2
        if marker == 0xEE or not (0xE0 <= marker <= 0xEF or marker == 0xFE):
            kept.append(data[position : position + size])
        position += size
    return data[:2] + b"".join(kept) + data[position:]


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode == "F":
        raise BadSample("the image has floating-point pixels")
    if image.mode.startswith("I"):  # grey of 16 bits, whose upper 8 are kept: convert would clip
        image = image.convert("I").point(lambda value: value * (1 / 256)).convert("L")
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        layer = image.convert("RGBA")
        white = Image.new("RGBA", layer.size, "white")
        return Image.alpha_composite(white, layer).convert("RGB")
    return image.convert("RGB")
