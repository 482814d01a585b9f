"""Why one sample was kept, recaptioned or dropped, in words, numbers and images."""

import difflib
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageOps

from infogrowth.data.names import image_key, strip_extension
from infogrowth.errors import UserError
from infogrowth.growth.decisions import Decision
from infogrowth.report.dataset import GrowthTable, Neighbor
from infogrowth.report.formatting import decimal, percent, shown
from infogrowth.report.galleries import Thumbnails
from infogrowth.report.numbers import expected_visits, ranks_in_percent


@dataclass(frozen=True)
class Explanation:
    """What is known of one decision. Numbers are None where they were not computed."""

    sample: Decision
    row: int  # position in the stream, from 0
    source: str
    why: str
    min_align: float | None
    gain_rank: float | None  # percent of the kept samples with a smaller mean gain
    visits: dict[str, float] | None  # expected visits per epoch by sampler, if it is kept
    neighbors: dict[str, list[Neighbor]]  # by space, nearest first

    def as_json(self) -> dict[str, Any]:
        """Plain values for ``--json``."""
        found = asdict(self)
        neighbors = {f"{space}_neighbors": near for space, near in found.pop("neighbors").items()}
        return {**found.pop("sample"), **found, **neighbors}


def explain(table: GrowthTable, sample_id: str) -> list[Explanation]:
    """Every decision about ``sample_id``, which may have come more than once, in stream order.

    The id is found with or without its extension, as everywhere.

    Raises:
        UserError: no such sample, with the nearest ids.
    """
    rows = [row for row, name in enumerate(table.ids) if name == sample_id]
    if not rows:
        stem = strip_extension(sample_id)
        rows = [row for row, name in enumerate(table.ids) if strip_extension(name) == stem]
    if not rows:
        key = image_key(sample_id)
        rows = [row for row, name in enumerate(table.ids) if image_key(name) == key]
    if not rows:
        # difflib looks at every id; the first hundred thousand are enough for a hint
        close = difflib.get_close_matches(sample_id, table.ids[:100_000], n=3)
        hint = f"; did you mean {' or '.join(map(repr, close))}?" if close else ""
        raise UserError(
            f"sample {sample_id!r} was never processed in {table.name!r}"
            f"{hint or '; samples without features are counted by reason in the report'}"
        )
    kept_rows = np.flatnonzero(table.kept)
    visits = expected_visits(table.gains[kept_rows]).per_epoch
    ranks = ranks_in_percent(table.mean_gain[kept_rows])
    at = {row: index for index, row in enumerate(kept_rows.tolist()) if row in rows}
    return [
        Explanation(
            sample=table.decision(row),
            row=row,
            source=str(table.sources[row]),
            why=_why(table.decision(row), table.min_align),
            min_align=table.min_align,
            gain_rank=float(ranks[at[row]]) if row in at else None,
            visits={name: float(v[at[row]]) for name, v in visits.items()} if row in at else None,
            neighbors={space: table.neighbors(row, space) for space in ("image", "text")},
        )
        for row in rows
    ]


def as_text(found: Explanation) -> str:
    """The explanation for a terminal."""
    sample = found.sample
    alignment = decimal(sample.original_alignment)
    if sample.verdict == "recaptioned":
        alignment += f" → {decimal(sample.alignment)}"
    if found.min_align is not None:
        alignment += f"   (threshold {found.min_align:g})"
    gain = f"image {decimal(sample.gain_image)}, text {decimal(sample.gain_text)}"
    if found.gain_rank is not None:
        gain += f"   (more than {percent(found.gain_rank)} of the kept samples)"
    lines = [f"{shown(sample.id)}: {sample.verdict}", found.why, ""]
    lines.append(f"caption     {shown(sample.caption)}")
    if sample.original_caption != sample.caption:
        lines.append(f"was         {shown(sample.original_caption)}")
    if sample.recaption_alignment is not None:
        by = f"by {shown(sample.captioner)}, " if sample.captioner else ""
        rule = f", taken by {sample.recaption_rule}" if sample.recaption_rule else ", not taken"
        lines.append(f"recaption   {by}alignment {decimal(sample.recaption_alignment)}{rule}")
    lines += [f"alignment   {alignment}", f"gain        {gain}"]
    if found.visits:
        each = (f"{name.replace('_', '-')} {value:.2f}" for name, value in found.visits.items())
        lines.append(f"visits      per epoch: {', '.join(each)}")
    source = f", from {shown(found.source)}" if found.source else ""
    lines.append(f"arrived     as number {found.row + 1:,}{source}")
    for space, neighbors in found.neighbors.items():
        if neighbors:
            lines += ["", f"nearest in {space} space when it arrived (cosine distance)"]
            lines += [
                f"  {decimal(near.distance)}  {shown(near.id)}  {_cut(near.caption)}"
                for near in neighbors
            ]
    return "\n".join(lines)


def image_strip(found: Explanation, thumbnails: Thumbnails, side: int = 224) -> Image.Image:
    """The sample and its nearest images in a row, with captions and distances under them."""
    entries = [(found.sample.id, str(found.sample.verdict), found.sample.caption)]
    entries += [(n.id, f"distance {n.distance:.3f}", n.caption) for n in found.neighbors["image"]]
    margin, words = 16, 84
    width = margin + len(entries) * (side + margin)
    strip = Image.new("RGB", (width, side + words + 2 * margin), "white")
    draw = ImageDraw.Draw(strip)
    bold, small = _font("DejaVuSans-Bold.ttf", 13), _font("DejaVuSans.ttf", 12)
    for number, (name, label, caption) in enumerate(entries):
        left = margin + number * (side + margin)
        image = thumbnails.image(name, side)
        if image is None:
            draw.rectangle((left, margin, left + side, margin + side), fill="#eef0f4")
            draw.text((left + 12, margin + 12), "no image", fill="#566070", font=small)
        else:
            image = ImageOps.contain(image, (side, side))
            at = (left + (side - image.width) // 2, margin + (side - image.height) // 2)
            strip.paste(image, at)
        top = margin + side + 6
        draw.text((left, top), label, fill="#1c2430", font=bold)
        for line, text in enumerate(_wrapped(draw, shown(caption), small, side)[:3], start=1):
            draw.text((left, top + 4 + 18 * line), text, fill="#566070", font=small)
    return strip


def _why(sample: Decision, min_align: float | None) -> str:
    """One sentence for the reader."""
    before, after = decimal(sample.original_alignment), decimal(sample.alignment)
    threshold = f"{min_align:g}" if min_align is not None else "the threshold"
    match str(sample.verdict), str(sample.reason):
        case _, "seed":
            return "It belongs to the trusted start set, which is never filtered."
        case "recaptioned", _:
            return (
                f"Its own caption did not fit ({before} is under {threshold}), the new one does "
                f"({after}), so it was kept with the new caption."
            )
        case "kept", "aligned":
            return f"Image and caption fit: {after} is not under {threshold}."
        case "dropped", "alignment below min_align":
            return f"Image and caption do not fit: {before} is under {threshold}."
        case "dropped", "alignment and recaption below min_align":
            return (
                f"Image and caption do not fit ({before} is under {threshold}), "
                "and neither does the new caption."
            )
    return f"{str(sample.verdict).capitalize()}: {sample.reason}."


def _cut(text: str, limit: int = 90) -> str:
    text = shown(text)
    return text if len(text) <= limit else text[: limit - 1] + "…"


def _font(name: str, size: int) -> ImageFont.FreeTypeFont:
    """A font that matplotlib brings along, so that it is there on every machine."""
    from matplotlib import get_data_path  # for the strip alone

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
