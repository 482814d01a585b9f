"""Text as people store it, the captions of a record, and captions as BLIP cleans them."""

import json
import re
from collections.abc import Iterable, Mapping
from typing import Any

CAPTION_FIELDS = ("caption", "text", "txt", "captions")  # in order of preference, in any case
NO_CAPTION = "the caption is missing or empty"
WINDOWS_1252 = "text that is not UTF-8 was read as Windows-1252"
REPLACED = "characters that no text may hold (NUL, half of a surrogate pair) became U+FFFD"

_SEPARATING = re.compile(r'[.!"()*#:;~]')
_SPACES = re.compile(r"\s{2,}")
_FORBIDDEN = re.compile("[\0\ud800-\udfff]")

Caption = str | list[str]
Captioned = tuple[Caption, tuple[str, ...]]  # a caption, and the repairs that it took


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
        lines = (_line(line) for line in data.removeprefix(b"\xef\xbb\xbf").splitlines(True))
        text, repairs = repaired("".join(lines))
        return text, (WINDOWS_1252, *repairs)


def _line(line: bytes) -> str:
    try:
        return line.decode()
    except UnicodeDecodeError:
        return line.decode("cp1252", "replace")


def repaired(text: str) -> tuple[str, tuple[str, ...]]:
    """``text`` with U+FFFD for what JSON, UTF-8 or a database would refuse, and whether it was."""
    text = text.removeprefix("\ufeff")
    clean = text if text.isascii() and "\0" not in text else _FORBIDDEN.sub("\ufffd", text)
    return clean, (REPLACED,) if clean != text else ()


class Unusable(Exception):
    """A sample, or its caption or image, cannot be used; ``reason`` says why."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


def no_caption(reasons: Iterable[str]) -> Unusable:
    """The error of a sample none of whose captions can be used: the first thing that is wrong with
    one that is there, else that there is none."""
    return Unusable(next((reason for reason in reasons if reason != NO_CAPTION), NO_CAPTION))


def caption_of(value: Any) -> Captioned:
    """The caption that a value, or a record by its fields, holds, with the repairs that it took.

    Text, or a list of text of which blank entries are left out; a list that keeps one entry is
    that entry. A record's fields are tried in the order of ``CAPTION_FIELDS``.

    Raises:
        Unusable: with the reason.
    """
    if isinstance(value, Mapping):
        fields = {str(name).lower(): field for name, field in value.items()}
        reasons: list[str] = []
        for name in CAPTION_FIELDS:
            field = fields.get(name)
            try:
                return caption_of([field] if isinstance(field, Mapping) else field)
            except Unusable as error:
                reasons.append(error.reason)
        raise no_caption(reasons)
    texts: list[str] = []
    repairs: tuple[str, ...] = ()
    for text in value if isinstance(value, list | tuple) else [value]:
        if isinstance(text, bytes):
            text, told = decode_text(text)
        elif isinstance(text, str):
            text, told = repaired(text)
        elif text is None or text != text:  # NaN is how a table says that there is none
            continue
        else:
            raise Unusable(f"the caption is not text but {type(text).__name__}")
        repairs += told
        if text.strip():
            texts.append(text.strip())
    if not texts:
        raise Unusable(NO_CAPTION)
    return texts[0] if len(texts) == 1 else texts, repairs


def first_caption(value: Any) -> str | None:
    """The one caption that is embedded or shown where there may be several; None if none."""
    try:
        caption = caption_of(value)[0]
    except Unusable:
        return None
    return caption if isinstance(caption, str) else caption[0]


def pre_caption(caption: str, max_words: int = 50) -> str:
    """A caption in lower case, without ``. ! " ( ) * # : ; ~``, cut to ``max_words`` words.

    The marks become spaces, runs of whitespace one space; a single tab or newline between words
    stays, as do commas, dashes and apostrophes (BLIP's own rule: golden/schedules_pre_caption).
    """
    text = _SEPARATING.sub(" ", caption.lower())
    text = _SPACES.sub(" ", text).rstrip("\n").strip(" ")
    return " ".join(text.split(" ")[:max_words])
