"""Decoding: what becomes RGB and how, and what is refused with which reason."""

import io
import struct
import zlib

import numpy as np
import pytest
from drawn_images import drawn, encoded
from PIL import Image, ImageFile, PngImagePlugin

from infogrowth.data.images import FORMATS, decode_image
from infogrowth.data.text import IMAGE_EXTENSIONS
from infogrowth.errors import BadSample


def array(data: bytes, **options) -> np.ndarray:
    image = decode_image(data, **options)
    assert image.mode == "RGB"
    return np.asarray(image).astype(int)


def huge_png(width: int, height: int) -> bytes:
    """A PNG of a few bytes that claims to be huge: a decompression bomb."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return (
            struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        )

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        [chunk(b"IHDR", header), chunk(b"IDAT", zlib.compress(b"\0" * 999)), chunk(b"IEND", b"")]
    )


@pytest.mark.parametrize("format", ["PNG", "BMP", "TIFF", "PPM"])
def test_lossless_formats_come_back_to_the_bit(format):
    image = drawn(1)
    assert np.array_equal(array(encoded(image, format)), np.asarray(image))


@pytest.mark.parametrize("format", ["JPEG", "WEBP", "AVIF"])
def test_lossy_formats_come_back_nearly(format):
    image = drawn(1)
    difference = np.abs(array(encoded(image, format, quality=95)) - np.asarray(image))
    assert difference.mean() < 6


def test_transparency_is_laid_on_white():
    image = drawn(2).convert("RGBA")
    image.putalpha(Image.linear_gradient("L").resize(image.size))
    alpha = np.asarray(image)[..., 3:].astype(float) / 255
    expected = np.asarray(image)[..., :3] * alpha + 255 * (1 - alpha)
    assert np.abs(array(encoded(image, "PNG")) - expected).max() <= 1


def test_a_transparent_palette_color_is_white():
    image = Image.new("P", (4, 4), 1)
    image.putpalette([255, 0, 0, 0, 0, 200])
    image.paste(0, (0, 0, 2, 4))
    pixels = array(encoded(image, "PNG", transparency=0))
    assert pixels[0, 0].tolist() == [255, 255, 255] and pixels[0, 3].tolist() == [0, 0, 200]


def test_a_color_declared_transparent_in_an_rgb_image_is_white():
    image = Image.new("RGB", (4, 4), (9, 8, 7))
    image.paste((200, 10, 10), (0, 0, 2, 4))
    pixels = array(encoded(image, "PNG", transparency=(200, 10, 10)))
    assert pixels[0, 0].tolist() == [255, 255, 255] and pixels[0, 3].tolist() == [9, 8, 7]


def test_grey_with_alpha_is_laid_on_white():
    pixels = array(encoded(Image.new("LA", (3, 3), (0, 51)), "PNG"))
    assert np.abs(pixels - 204).max() <= 1


@pytest.mark.parametrize("mode", ["1", "L", "P"])
def test_grey_and_palette_images_become_rgb(mode):
    image = drawn(3).convert(mode)
    expected = np.asarray(image.convert("RGB"))
    assert np.array_equal(array(encoded(image, "PNG")), expected)


def test_cmyk_becomes_rgb():
    image = drawn(4)
    difference = np.abs(array(encoded(image.convert("CMYK"), quality=95)) - np.asarray(image))
    assert difference.mean() < 6


def test_sixteen_bits_keep_their_upper_eight():
    values = (np.arange(256 * 8).reshape(8, 256) * 32).astype(np.uint16)
    pixels = array(encoded(Image.fromarray(values), "PNG"))
    assert np.array_equal(pixels[..., 0], values // 256)


def test_an_animation_gives_its_first_frame():
    frames = [drawn(n).quantize(16) for n in range(3)]
    data = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert np.array_equal(array(data), np.asarray(frames[0].convert("RGB")))


@pytest.mark.parametrize(
    ("orientation", "turn"),
    [(1, None), (2, 0), (3, 3), (4, 1), (5, 5), (6, 4), (7, 6), (8, 2)],
)
def test_images_are_turned_upright(orientation, turn):
    image = drawn(5)
    exif = Image.Exif()
    exif[0x0112] = orientation
    upright = image if turn is None else image.transpose(Image.Transpose(turn))
    assert np.array_equal(array(encoded(image, "PNG", exif=exif)), np.asarray(upright))


def test_damaged_exif_does_not_make_a_bad_image():
    data = encoded(drawn(5), exif=b"Exif\0\0II*\0\xff\xff\xff\xff garbage")
    assert array(data).shape == (48, 64, 3)


def exif_with(orientation: bytes, before: bytes = b"") -> bytes:
    """EXIF of one directory: the orientation as given, after another entry."""
    entries = [before, orientation] if before else [orientation]
    return b"Exif\0\0II*\0\x08\0\0\0" + struct.pack("<H", len(entries)) + b"".join(entries)


def entry(tag: int, kind: int, count: int, value: bytes) -> bytes:
    return struct.pack("<HHI", tag, kind, count) + value.ljust(4, b"\0")


@pytest.mark.parametrize(
    "exif",
    [
        exif_with(entry(0x0112, 3, 1, b"\x06")),
        exif_with(entry(0x0112, 3, 2, b"\x06\0\x06")),  # two where one belongs
        exif_with(entry(0x0112, 4, 1, b"\x06")),
        exif_with(entry(0x0112, 2, 2, b"6")),  # as text
        exif_with(entry(0x0112, 3, 1, b"\x06"), before=entry(0x010E, 2, 99, b"\xff\xff\xff\xff")),
        exif_with(entry(0x0112, 3, 1, b"\x06"), before=entry(0x010F, 77, 1, b"")),
        exif_with(entry(0x0112, 3, 1, b"\x06"), before=entry(0x8769, 4, 1, b"\xff\xff\xff")),
    ],
)
@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP"])
def test_the_orientation_counts_whatever_is_wrong_around_it(exif, format):
    assert array(encoded(drawn(5), format, exif=exif)).shape == (64, 48, 3)


def test_large_or_damaged_metadata_costs_nothing():
    profile = bytes(3_000_000)
    text = PngImagePlugin.PngInfo()
    text.add_text("XML:com.adobe.xmp", "x" * 3_000_000, zip=True)
    text.add_text("note", "hello")
    exif = Image.Exif()
    exif[0x0112] = 6
    png = encoded(drawn(1), "PNG", icc_profile=profile, pnginfo=text, exif=exif)
    damaged = png.replace(b"hello", b"jello")  # its checksum no longer fits
    expected = np.asarray(drawn(1).transpose(Image.Transpose.ROTATE_270))
    assert np.array_equal(array(damaged), expected)
    assert array(encoded(drawn(1), icc_profile=profile)).shape == (48, 64, 3)


def test_extensions_of_images_are_those_of_the_formats_that_are_decoded():
    Image.init()
    known = {e for e, name in Image.EXTENSION.items() if name in (*FORMATS, "MPO", "DIB")}
    assert known - {".pfm"} == set(IMAGE_EXTENSIONS)  # its pixels are floating-point


def test_a_large_jpeg_may_be_decoded_smaller_but_not_below_the_need():
    data = encoded(drawn(6, (1000, 600)))
    assert decode_image(data).size == (1000, 600)
    assert decode_image(data, at_least=224).size == (500, 300)
    assert decode_image(data, at_least=150).size == (250, 150)
    assert decode_image(data, at_least=301).size == (1000, 600)
    small = np.asarray(decode_image(data, at_least=150).resize((50, 30))).astype(int)
    whole = np.asarray(decode_image(data).resize((50, 30))).astype(int)
    assert np.abs(small - whole).mean() < 4


JPEG, PNG = encoded(drawn(7)), encoded(drawn(7), "PNG")
WEBP = encoded(drawn(7), "WEBP")
EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n"


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "the image is empty"),
        (b"<html>404 not found</html>", "not an image in a format that is read: HTML"),
        (b"<?xml version='1.0'?><svg xmlns='x'/>", "not an image in a format that is read: SVG"),
        (b"\0\0\0\x18ftypheic\0\0\0\0", "not an image in a format that is read: HEIC"),
        (b"\0" * 5000, "not an image that can be read"),
        (b"\xff\xd8\xff", "the image is truncated or corrupt: "),
        (EPS, "not an image in a format that is read: PostScript"),
        (JPEG[: len(JPEG) // 2], "the image is truncated or corrupt: "),
        (JPEG[:-200], "the image is truncated or corrupt: "),
        (PNG[: len(PNG) // 2], "the image is truncated or corrupt: "),
        (WEBP[: len(WEBP) // 2], ""),
        (PNG[:60] + b"\xff" * 40 + PNG[100:], "the image is truncated or corrupt: "),
        (huge_png(50_000, 50_000), "the image has too many pixels for Pillow"),
        (huge_png(12_000, 12_000)[:-20], "the image has more than 100000000 pixels"),
        (encoded(Image.new("F", (8, 8), 0.5), "TIFF"), "the image has floating-point pixels"),
    ],
)
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_bad_images_are_refused_with_a_reason(data, reason):
    with pytest.raises(BadSample) as caught:
        decode_image(data, max_pixels=100_000_000)
    assert str(caught.value).startswith(reason)
    assert "\n" not in str(caught.value)


def test_the_pixel_limit_is_an_argument():
    assert decode_image(JPEG, max_pixels=64 * 48).size == (64, 48)
    with pytest.raises(BadSample, match="3071"):
        decode_image(JPEG, max_pixels=64 * 48 - 1)


def test_pillows_process_wide_switches_stay_as_they_are():
    before = (ImageFile.LOAD_TRUNCATED_IMAGES, Image.MAX_IMAGE_PIXELS)
    decode_image(JPEG)
    with pytest.raises(BadSample):
        decode_image(JPEG[:300])
    assert (
        (ImageFile.LOAD_TRUNCATED_IMAGES, Image.MAX_IMAGE_PIXELS)
        == before
        == (
            False,
            89478485,
        )
    )


def test_decoding_reads_a_memoryview_too():
    assert np.array_equal(array(memoryview(PNG)), np.asarray(Image.open(io.BytesIO(PNG))))
