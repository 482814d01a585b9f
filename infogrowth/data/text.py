"""The text of samples: the ids that file names give, text as people store it, and captions."""

import json
import posixpath
import re
import unicodedata
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from infogrowth.annotations import as_id
from infogrowth.errors import BadSample

# What Pillow calls the formats that images.py decodes; in order of preference.
IMAGE_EXTENSIONS = (
    *(".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif", ".jfif", ".jpe"),
    *(".mpo", ".apng", ".avifs", ".dib", ".jp2", ".j2k", ".jpc", ".jpf", ".jpx", ".j2c"),
    *(".ppm", ".pgm", ".pbm", ".pnm", ".ico"),
)
CAPTION_FIELDS = ("caption", "text", "txt", "captions")  # in order of preference, in any case
NO_CAPTION = "the caption is missing or empty"
WINDOWS_1252 = "text that is not UTF-8 was read as Windows-1252"
REPLACED = "characters that no text may hold (NUL, half of a surrogate pair) became U+FFFD"

# ".jpg" alone is a name, not an extension.
_ANY = "(?<=[^/])(" + "|".join(map(re.escape, IMAGE_EXTENSIONS)) + ")"
_EXTENSION = re.compile(f"{_ANY}$", re.IGNORECASE)
_EXTENSIONS = re.compile(f"{_ANY}+$", re.IGNORECASE)
_SEPARATING = re.compile(r'[.!"()*#:;~]')
_SPACES = re.compile(r"\s{2,}")

Caption = str | list[str]
Captioned = tuple[Caption, tuple[str, ...]]  # a caption, and the repairs that it took


# --- ids ------------------------------------------------------------------------------------------


def extension_of(name: str) -> str:
    """The extension in lower case, with its dot; empty if there is none."""
    return posixpath.splitext(name)[1].lower()


def strip_extension(name: str) -> str:
    """``name`` without its image extension (``.jpg``, ``.PNG``, …), folders kept."""
    return _EXTENSION.sub("", name)


def image_key(name: str) -> str:
    """The key under which an image is stored: file name without its image extension.

    An id without an image extension is its own key, slashes and dots included.
    """
    stem = strip_extension(name)
    return stem if stem == name else stem.rsplit("/", 1)[-1]


def possible_names(name: str) -> Iterator[str]:
    """Every name under which the image ``name`` may be stored, the surest first."""
    stems = dict.fromkeys((image_key(name), strip_extension(name)))
    yield from dict.fromkeys((name, *stems, name.rsplit("/", 1)[-1]))
    for stem in stems:
        yield from (stem + extension for extension in IMAGE_EXTENSIONS)


def clean_name(name: str) -> str:
    """A path in the form in which paths are compared, and ids are made of them."""
    if not name.isascii():
        name = decode_text(name.encode("utf-8", "surrogateescape"))[0]
        name = unicodedata.normalize("NFC", name)
    return "/".join(part for part in name.split("/") if part not in ("", ".", ".."))


def image_id(name: str) -> str:
    """The id of an image: its path without image extensions, as :func:`clean_name` has it."""
    return clean_name(_EXTENSIONS.sub("", name))


def sample_id(name: str) -> str:
    """The path that files of one sample share: ``photo`` for ``photo.jpg.txt``."""
    return image_id(posixpath.splitext(name)[0])


# --- text -----------------------------------------------------------------------------------------


def decode_text(data: bytes) -> tuple[str, tuple[str, ...]]:
    """Text in UTF-8 (or UTF-16 or -32, by their marks or zero bytes), else line by line in
    Windows-1252; returns it with the repairs that it took.
    """
    encoding = json.detect_encoding(data) if b"\0" in data[:4] else "utf-8-sig"
    if data.startswith((b"\xff\xfe", b"\xfe\xff")):
        encoding = "utf-32" if data[:4] in (b"\xff\xfe\0\0", b"\0\0\xfe\xff") else "utf-16"
    try:
        return repaired(data.decode(encoding, "strict" if encoding == "utf-8-sig" else "replace"))
    except UnicodeDecodeError:
        lines = data.removeprefix(b"\xef\xbb\xbf").splitlines(True)
    for number, line in enumerate(lines):
        try:
            line.decode()
        except UnicodeDecodeError:
            lines[number] = line.decode("cp1252", "replace").encode()
    text, repairs = repaired(b"".join(lines).decode())
    return text, (WINDOWS_1252, *repairs)


def repaired(text: str) -> tuple[str, tuple[str, ...]]:
    """``text`` with U+FFFD for what JSON, UTF-8 or a database would refuse, and whether it was."""
    text = text.removeprefix("\ufeff")
    clean = unicode_values(text).replace("\0", "\ufffd")
    return clean, (REPLACED,) if clean != text else ()


def unicode_values(value: Any) -> Any:
    """Bytes and text as text that every file can hold, also in lists; the rest as it is.

    Halves of surrogate pairs become U+FFFD, the replacement character.
    """
    if isinstance(value, list | tuple):
        return [unicode_values(item) for item in value]
    if isinstance(value, bytes):
        return value.decode("utf-8", "replace")
    if not isinstance(value, str) or value.isascii():
        return value
    return value.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")


def text_of(value: Any) -> str:
    """An id or caption as text: bytes read as UTF-8, of a list its first that is not blank, whole
    numbers without ``.0``; a missing one (None, NaN) as ``""``."""
    value = unicode_values(value)
    if isinstance(value, list):
        return next((text for item in value if (text := text_of(item)).strip()), "")
    return as_id(value) or ("" if value is None or value != value else str(value))


def texts_of(column: pa.ChunkedArray) -> list[str]:
    """A column of ids or captions as text, see :func:`text_of`."""
    if pa.types.is_string(column.type) or pa.types.is_large_string(column.type):
        with suppress(UnicodeDecodeError):  # the usual case, without a look at each value
            return pc.fill_null(column, "").to_pylist()
    return list(map(text_of, values_of(column)))


def values_of(column: pa.ChunkedArray) -> list[Any]:
    """A column as Python values, see :func:`unicode_values`."""
    try:
        return unicode_values(column.to_pylist())
    except UnicodeDecodeError:  # a faulty writer's bytes in a column of text
        if pa.types.is_dictionary(column.type):
            column = column.cast(column.type.value_type)
        listed = pa.types.is_list(column.type) or pa.types.is_large_list(column.type)
        return unicode_values(
            column.cast(pa.list_(pa.binary()) if listed else pa.binary()).to_pylist()
        )


# --- captions -------------------------------------------------------------------------------------


def caption_of(value: Any) -> Captioned:
    """The caption that a value, or a record by its fields, holds, with the repairs that it took.

    Text, or a list of text of which blank entries are left out; a list that keeps one entry is
    that entry. A record's fields are tried in the order of ``CAPTION_FIELDS``.

    Raises:
        BadSample: with the reason.
    """
    if isinstance(value, Mapping):
        fields = {str(name).lower(): field for name, field in value.items()}
        reasons: list[str] = []
        for field in map(fields.get, CAPTION_FIELDS):
            try:
                return caption_of([field] if isinstance(field, Mapping) else field)
            except BadSample as error:
                reasons.append(str(error))
        raise no_caption(reasons)
    texts: list[str] = []
    repairs: tuple[str, ...] = ()
    for text in value if isinstance(value, list | tuple) else [value]:
        if isinstance(text, bytes):
            text, more = decode_text(text)
        elif isinstance(text, str):
            text, more = repaired(text)
        elif text is None or text != text:  # NaN stands for a missing value in a table
            continue
        else:
            raise BadSample(f"the caption is not text but {type(text).__name__}")
        repairs += more
        if text.strip():
            texts.append(text.strip())
    if not texts:
        raise BadSample(NO_CAPTION)
    return texts[0] if len(texts) == 1 else texts, repairs


def no_caption(reasons: Iterable[str]) -> BadSample:
    """The error of a sample none of whose captions can be used: the first thing that is wrong with
    one that is there, else that there is none."""
    return BadSample(next((reason for reason in reasons if reason != NO_CAPTION), NO_CAPTION))


def first_caption(value: Any) -> str | None:
    """The one caption that is embedded or shown where there may be several; None if none."""
    with suppress(BadSample):
        caption = caption_of(value)[0]
        return caption if isinstance(caption, str) else caption[0]
    return None


def pre_caption(caption: str, max_words: int = 50) -> str:
    """A caption in lower case, without ``. ! " ( ) * # : ; ~`` and of at most ``max_words`` words.

    The marks become spaces, runs of whitespace one space; a single tab or newline between words
    stays, as do commas, dashes and apostrophes (BLIP's own rule: golden/schedules_pre_caption).
    """
    text = _SEPARATING.sub(" ", caption.lower())
    text = _SPACES.sub(" ", text).rstrip("\n").strip(" ")
    return " ".join(text.split(" ")[:max_words])
