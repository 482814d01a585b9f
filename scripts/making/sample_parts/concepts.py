"""What is drawn: one concept per emoji, and the words that different people wrote for it."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from sample_parts.packages import by_artist, read_member

# Emojibase's group numbers. Symbols and flags look alike in every artist's set (a white arrow on
# a blue square, the same three stripes), so a second artist's copy would not be another drawing.
SYMBOLS, FLAGS, COMPONENTS = 8, 9, 2
_WORD = re.compile(r"[a-z][a-z' -]{2,23}")
_GENDER = re.compile(r"(wo)?m[ae]n\b")
_CLOCK = re.compile(r"o.clock|-thirty")


@dataclass(frozen=True)
class Concept:
    """One emoji: its code points and the people's words for it, all in lower case.

    ``names`` are full short descriptions (CLDR's and Unicode's own), ``keywords`` single words or
    short phrases, one list per source.
    """

    code: str
    names: tuple[str, ...]
    keywords: tuple[tuple[str, ...], ...]
    symbolic: bool


def code_of(text: str) -> str:
    """The code points of an emoji, or a hex code, in one spelling: "1f468-200d-1f33e"."""
    hexes = (
        text.split("-") if re.fullmatch(r"[0-9A-Fa-f-]+", text) else [f"{ord(c):x}" for c in text]
    )
    return "-".join(part.lower() for part in hexes if part.lower() != "fe0f")


def read_concepts(cache: Path) -> dict[str, Concept]:
    """Every emoji without a skin tone, a gender or a clock's hour in it, by its code."""
    base = by_artist("emojibase")
    unicode_names = read_member(base, cache, "meta/unicode-names.json")
    unicode_names = {code_of(code): name for code, name in unicode_names.items()}
    annotations = read_member(by_artist("cldr"), cache, "annotations/en/annotations.json")
    cldr = {code_of(c): a for c, a in annotations["annotations"]["annotations"].items()}
    crowd = read_member(by_artist("emojilib"), cache, "dist/emoji-en-US.json")
    crowd = {code_of(emoji): words for emoji, words in crowd.items()}
    concepts = {}
    for entry in read_member(base, cache, "en/data.json"):
        code = code_of(entry["emoji"])
        if not _is_a_drawing(entry):
            continue
        spoken = cldr.get(code, {})
        names = [*spoken.get("tts", []), entry["label"], unicode_names.get(code, "")]
        keywords = (spoken.get("default", []), crowd.get(code, [])[1:], entry.get("tags", []))
        concepts[code] = Concept(
            code,
            tuple(dict.fromkeys(_plain(name) for name in names if name)),
            tuple(_usable(words) for words in keywords),
            symbolic=entry["group"] in (SYMBOLS, FLAGS),
        )
    return concepts


def caption(concept: Concept, rng: np.random.Generator, own_name: str | None = None) -> str:
    """One caption in people's words: a name, mostly with one to three keywords of one source.

    Args:
        own_name: how the artist's own set calls the drawing; then it may serve as the name too.
    """
    names = [*concept.names, *([own_name] if own_name else [])]
    name = str(rng.choice(names))
    spoken = set(name.split())
    sources = [
        fresh
        for words in concept.keywords
        if (fresh := [w for w in words if not set(w.split()) <= spoken])
    ]
    if not sources or (len(name.split()) >= 3 and rng.random() < 0.3):
        return name
    words = sources[int(rng.integers(len(sources)))]
    count = min(len(words), int(rng.integers(1, 4)))
    chosen = sorted(rng.choice(len(words), size=count, replace=False).tolist())
    return ", ".join([name, *(words[i] for i in chosen)])


def captions(
    concept: Concept, rng: np.random.Generator, count: int, own_name: str | None = None
) -> list[str]:
    """Up to ``count`` different captions of one drawing."""
    drawn = [caption(concept, rng, own_name) for _ in range(4 * count)]
    return list(dict.fromkeys(drawn))[:count]


def _is_a_drawing(entry: dict[str, Any]) -> bool:
    label = entry["label"].lower()
    # "Woman pilot" and "man pilot" differ from "pilot" by a hairstyle of a few pixels.
    gendered = "\u200d" in entry["emoji"] and bool(_GENDER.match(label))
    joined_people = label.startswith(("family:", "kiss:", "couple with heart:"))
    return (
        entry.get("group") not in (None, COMPONENTS)
        and not gendered
        and not joined_people
        and not _CLOCK.search(label)
    )


def _plain(name: str) -> str:
    """Lower case, without the punctuation that is notation and not language."""
    name = re.sub(r"[“”\"’]", "'", name.lower())
    return re.sub(r"\s+", " ", re.sub(r"[():;&_]", " ", name)).strip(" '")


def _usable(words: list[str]) -> tuple[str, ...]:
    plain = (_plain(word) for word in words)
    return tuple(dict.fromkeys(word for word in plain if _WORD.fullmatch(word)))
