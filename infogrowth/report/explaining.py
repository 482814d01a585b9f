"""Why one sample was kept, recaptioned or dropped, in words, numbers and pictures."""

import difflib
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import get_data_path
from PIL import Image, ImageDraw, ImageFont, ImageOps

from infogrowth.data.lmdb_store import image_key, strip_ending
from infogrowth.errors import UserError
from infogrowth.report.dataset import GrownDataset
from infogrowth.report.numbers import expected_visits, ranks_in_percent
from infogrowth.report.page import decimal, percent, shown
from infogrowth.report.pictures import Pictures


@dataclass(frozen=True)
class NeighborNote:
    """One nearest neighbor at the time of arrival."""

    id: str
    distance: float
    caption: str


@dataclass(frozen=True)
class Explanation:
    """What is known of one decision. Numbers are None where they were not computed."""

    id: str
    row: int  # place in the stream, from 0
    source: str
    verdict: str
    reason: str
    why: str
    caption: str
    original_caption: str
    alignment: float | None
    original_alignment: float | None
    min_align: float | None
    gain_image: float | None
    gain_text: float | None
    gain_rank: float | None  # percent of the kept samples with a smaller mean gain
    visits: dict[str, float] | None  # expected visits per epoch by sampler, if it is kept
    image_neighbors: list[NeighborNote]
    text_neighbors: list[NeighborNote]

    def as_json(self) -> dict[str, Any]:
        """Plain values for ``--json``."""
        return asdict(self)


def explain(dataset: GrownDataset, sample_id: str) -> list[Explanation]:
    """Every decision about ``sample_id``, which may have come more than once, in stream order.

    The id is found with or without its file ending, as everywhere.

    Raises:
        UserError: no such sample, with the nearest ids.
    """
    rows = [row for row, name in enumerate(dataset.ids) if name == sample_id]
    if not rows:
        stem = strip_ending(sample_id)
        rows = [row for row, name in enumerate(dataset.ids) if strip_ending(name) == stem]
    if not rows:
        key = image_key(sample_id)
        rows = [row for row, name in enumerate(dataset.ids) if image_key(name) == key]
    if not rows:
        # difflib looks at every id; the first hundred thousand are enough for a hint
        close = difflib.get_close_matches(sample_id, dataset.ids[:100_000], n=3)
        hint = f"; did you mean {' or '.join(map(repr, close))}?" if close else ""
        raise UserError(
            f"sample {sample_id!r} was never offered to {dataset.name!r}"
            f"{hint or '; samples without features are listed by reason in the report'}"
        )
    kept_rows = np.flatnonzero(dataset.kept)
    visits = expected_visits(dataset.gains[kept_rows]).per_epoch
    ranks = ranks_in_percent(dataset.mean_gain[kept_rows])
    place = {row: index for index, row in enumerate(kept_rows.tolist())}
    captions = dataset.caption_by_id()
    return [_explanation(dataset, row, captions, place.get(row), visits, ranks) for row in rows]


def as_text(found: Explanation) -> str:
    """The explanation for a terminal."""
    numbers = [
        f"alignment   {decimal(found.original_alignment)}"
        + (f" → {decimal(found.alignment)}" if found.verdict == "recaptioned" else "")
        + (f"   (threshold {found.min_align:g})" if found.min_align is not None else ""),
        f"gain        image {decimal(found.gain_image)}, text {decimal(found.gain_text)}"
        + (
            f"   (more than {percent(found.gain_rank)} of the kept samples)"
            if found.gain_rank is not None
            else ""
        ),
    ]
    if found.visits:
        each = ", ".join(
            f"{name.replace('_', '-')} {value:.2f}" for name, value in found.visits.items()
        )
        numbers.append(f"visits      per epoch: {each}")
    captions = [f"caption     {shown(found.caption)}"]
    if found.original_caption != found.caption:
        captions.append(f"was         {shown(found.original_caption)}")
    lines = [
        f"{shown(found.id)}: {found.verdict}",
        found.why,
        "",
        *captions,
        *numbers,
        f"arrived     as number {found.row + 1:,}"
        + (f", from {shown(found.source)}" if found.source else ""),
    ]
    for space in ("image", "text"):
        neighbors = getattr(found, f"{space}_neighbors")
        if neighbors:
            lines += ["", f"nearest in {space} space when it arrived (cosine distance)"]
            lines += [
                f"  {decimal(near.distance)}  {shown(near.id)}  {_cut(near.caption)}"
                for near in neighbors
            ]
    return "\n".join(lines)


def picture_strip(found: Explanation, pictures: Pictures, side: int = 224) -> Image.Image:
    """The sample and its nearest pictures in a row, with captions and distances under them."""
    entries = [(found.id, found.verdict, found.caption)]
    entries += [(n.id, f"distance {n.distance:.3f}", n.caption) for n in found.image_neighbors]
    margin, words = 16, 84
    width = margin + len(entries) * (side + margin)
    strip = Image.new("RGB", (width, side + words + 2 * margin), "white")
    draw = ImageDraw.Draw(strip)
    bold, small = _font("DejaVuSans-Bold.ttf", 13), _font("DejaVuSans.ttf", 12)
    for number, (name, label, caption) in enumerate(entries):
        left = margin + number * (side + margin)
        picture = pictures.image(name, side)
        if picture is None:
            draw.rectangle((left, margin, left + side, margin + side), fill="#eef0f4")
            draw.text((left + 12, margin + 12), "no picture", fill="#566070", font=small)
        else:
            picture = ImageOps.contain(picture, (side, side))
            at = (left + (side - picture.width) // 2, margin + (side - picture.height) // 2)
            strip.paste(picture, at)
        top = margin + side + 6
        draw.text((left, top), label, fill="#1c2430", font=bold)
        for line, text in enumerate(_wrapped(draw, shown(caption), small, side)[:3], start=1):
            draw.text((left, top + 4 + 18 * line), text, fill="#566070", font=small)
    return strip


def _explanation(
    dataset: GrownDataset,
    row: int,
    captions: dict[str, str],
    place: int | None,
    visits: dict[str, np.ndarray],
    ranks: np.ndarray,
) -> Explanation:

    def notes(space: str) -> list[NeighborNote]:
        near = dataset.neighbors(row, space)
        return [NeighborNote(name, distance, captions.get(name, "")) for name, distance in near]

    return Explanation(
        id=dataset.ids[row],
        row=row,
        source=str(dataset.sources[row]),
        verdict=str(dataset.verdicts[row]),
        reason=str(dataset.reasons[row]),
        why=_why(dataset, row),
        caption=dataset.captions[row],
        original_caption=dataset.original_captions[row],
        alignment=_known(dataset.alignment[row]),
        original_alignment=_known(dataset.original_alignment[row]),
        min_align=dataset.min_align,
        gain_image=_known(dataset.gains[row, 0]),
        gain_text=_known(dataset.gains[row, 1]) if dataset.has_text else None,
        gain_rank=None if place is None else _known(ranks[place]),
        visits=None
        if place is None
        else {name: float(values[place]) for name, values in visits.items()},
        image_neighbors=notes("image"),
        text_neighbors=notes("text"),
    )


def _why(dataset: GrownDataset, row: int) -> str:
    """One sentence for the reader."""
    verdict, reason = str(dataset.verdicts[row]), str(dataset.reasons[row])
    before = decimal(dataset.original_alignment[row])
    after = decimal(dataset.alignment[row])
    threshold = f"{dataset.min_align:g}" if dataset.min_align is not None else "the threshold"
    if reason == "seed":
        return "It belongs to the trusted start set, which is never filtered."
    if verdict == "recaptioned":
        return (
            f"Its own caption did not fit ({before} is under {threshold}), the new one does "
            f"({after}), so it was kept with the new caption."
        )
    if verdict == "kept" and reason == "aligned":
        return f"Picture and caption fit: {after} is not under {threshold}."
    if verdict == "dropped" and reason == "alignment below min_align":
        return f"Picture and caption do not fit: {before} is under {threshold}."
    if verdict == "dropped" and reason == "alignment and recaption below min_align":
        return (
            f"Picture and caption do not fit ({before} is under {threshold}), "
            "and neither does the new caption that was offered."
        )
    return f"{verdict.capitalize()}: {reason}."


def _known(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None


def _cut(text: str, most: int = 90) -> str:
    text = shown(text)
    return text if len(text) <= most else text[: most - 1] + "…"


def _font(name: str, size: int) -> ImageFont.FreeTypeFont:
    """A font that matplotlib brings along, so that it is there on every machine."""
    return ImageFont.truetype(str(Path(get_data_path(), "fonts", "ttf", name)), size)


def _wrapped(
    draw: ImageDraw.ImageDraw, text: str, font: ImageFont.FreeTypeFont, width: int
) -> list[str]:
    """``text`` in lines of at most ``width`` pixels, words broken where they are too long."""
    lines = [""]
    for word in text.split():
        if lines[-1] and draw.textlength(f"{lines[-1]} {word}", font=font) <= width:
            lines[-1] += f" {word}"
            continue
        lines.append("")
        for letter in word:
            if lines[-1] and draw.textlength(lines[-1] + letter, font=font) > width:
                lines.append("")
            lines[-1] += letter
    return lines[1:]
