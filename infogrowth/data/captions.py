"""Captions and questions as BLIP cleans them before the tokenizer sees them."""

import re

_SEPARATING = re.compile(r'[.!"()*#:;~]')
_SPACES = re.compile(r"\s{2,}")


def pre_caption(caption: str, max_words: int = 50) -> str:
    """A caption in lower case, without ``. ! " ( ) * # : ; ~``, cut to ``max_words`` words.

    The marks become spaces, runs of whitespace one space; a single tab or newline between words
    stays, as do commas, dashes and apostrophes (BLIP's own rule: golden/schedules_pre_caption).
    """
    text = _SEPARATING.sub(" ", caption.lower())
    text = _SPACES.sub(" ", text).rstrip("\n").strip(" ")
    return _first_words(text, max_words)


def pre_question(question: str, max_words: int = 50) -> str:
    """A question as BLIP cleans it: as a caption, but the marks vanish and inner spaces stay."""
    return _first_words(_SEPARATING.sub("", question.lower()).rstrip(" "), max_words)


def _first_words(text: str, max_words: int) -> str:
    return " ".join(text.split(" ")[:max_words])
