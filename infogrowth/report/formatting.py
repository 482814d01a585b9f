"""Numbers and untrusted texts as readers see them, on a page or in a terminal."""

import math


def count(value: float) -> str:
    """A whole number with thin spaces between the thousands."""
    return f"{round(value):,}".replace(",", "\N{NARROW NO-BREAK SPACE}")


def decimal(value: float | None, digits: int = 3) -> str:
    """A number with ``digits`` decimals and a real minus sign; a dash when it is unknown."""
    if value is None or not math.isfinite(value):
        return "–"
    text = f"{value:.{digits}f}"
    if float(text) == 0:
        text = text.lstrip("-")
    return text.replace("-", "\N{MINUS SIGN}")


def known(value: float) -> float | None:
    """A number for JSON, None for one that is not finite."""
    return float(value) if math.isfinite(value) else None


def plain(value: float | None) -> str:
    """A number for the page's script, which sorts "nan" last."""
    return "nan" if value is None else repr(float(value))


def share(part: float, whole: float) -> float:
    """``part`` of ``whole`` in percent, 0 of nothing."""
    return 100 * part / whole if whole else 0.0


def percent(value: float) -> str:
    """A percentage for readers: 0.04 %, 3.2 %, 78 %; never rounded to 0 or 100 when it is not."""
    if 0 < value < 0.05:
        return "<\N{NARROW NO-BREAK SPACE}0.1\N{NARROW NO-BREAK SPACE}%"
    rounded = f"{value:.1f}" if value < 9.95 or 99 < value < 100 else f"{value:.0f}"
    if rounded == "100.0":
        rounded = "99.9"
    return f"{rounded}\N{NARROW NO-BREAK SPACE}%"


# Direction overrides would let a caption rewrite the text around it; other controls are noise.
_INVISIBLE = dict.fromkeys(
    [*range(0x00, 0x20), *range(0x7F, 0xA0), *range(0x202A, 0x202F), *range(0x2066, 0x206A)], " "
)


def shown(text: str) -> str:
    """Untrusted text as it may be shown: no control characters, valid Unicode. Not escaped."""
    return text.encode("utf-8", "replace").decode("utf-8").translate(_INVISIBLE)


def compact(value: float) -> str:
    """A count in few letters: 950, 12.5k, 3M."""
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.3g}{letter}"
    return f"{value:.3g}"
