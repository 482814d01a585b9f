"""Why one sample was kept, recaptioned or dropped, in words, numbers and images."""

import difflib
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont, ImageOps

from infogrowth.data.names import image_key, strip_extension
from infogrowth.errors import UserError
from infogrowth.growth.decisions import Decision
from infogrowth.report.dataset import GrowthTable, Neighbor
from infogrowth.report.formatting import decimal, percent, shown
from infogrowth.report.galleries import Thumbnails, samples
from infogrowth.report.numbers import expected_visits, ranks_in_percent


@dataclass(frozen=True)
class Explanation:
    """What is known of one decision."""

    sample: Any  # a row of the table; its Index is the position in the stream, from 0
    why: str
    min_align: float | None
    gain_rank: float | None  # percent of the kept samples with a smaller mean gain
    visits: dict[str, float] | None  # expected visits per epoch by sampler, if it is kept
    neighbors: dict[str, list[Neighbor]]  # by space, nearest first

    def as_json(self) -> dict[str, Any]:
        """Plain values for ``--json``: a `Decision` and what is known about it; None is unknown."""
        near = {f"{space}_neighbors": found for space, found in self.neighbors.items()}
        decision = {
            field.name: [asdict(neighbor) for neighbor in near[field.name]]
            if field.name in near
            else _plain(getattr(self.sample, field.name))
            for field in fields(Decision)
        }
        about = {"row": self.sample.Index, "source": self.sample.source, "why": self.why}
        about |= {"min_align": self.min_align, "gain_rank": self.gain_rank, "visits": self.visits}
        return decision | about


def explain(table: GrowthTable, sample_id: str) -> list[Explanation]:
    """Every decision about ``sample_id``, which may have come more than once, in stream order.

    The id is found with or without its extension, as everywhere.

    Raises:
        UserError: no such sample, with the nearest ids.
    """
    ids = table.rows.id
    ways: list[Callable[[str], str]] = [str, strip_extension, image_key]
    matches = (table.rows[ids.map(way) == way(sample_id)] for way in ways)
    found = next((rows for rows in matches if len(rows)), None)
    if found is None:
        # difflib looks at every id; the first hundred thousand are enough for a hint
        close = difflib.get_close_matches(sample_id, ids[:100_000].tolist(), n=3)
        hint = f"; did you mean {' or '.join(map(repr, close))}?" if close else ""
        raise UserError(
            f"sample {sample_id!r} was never processed in {table.name!r}"
            f"{hint or '; samples without features are counted by reason in the report'}"
        )
    kept = table.rows[table.kept]
    visits = expected_visits(table.gains[table.kept]).set_index(kept.index)
    ranks = ranks_in_percent(kept.gain)
    samplers = ["uniform", "proportional", "two_phase"]
    return [
        Explanation(
            sample=sample,
            why=_why(sample, table.min_align),
            min_align=table.min_align,
            gain_rank=float(ranks[sample.Index]) if sample.Index in ranks else None,
            visits=visits.loc[sample.Index, samplers].to_dict() if sample.Index in ranks else None,
            neighbors={space: table.near(sample.Index, space) for space in ("image", "text")},
        )
        for sample in samples(found)
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
    if _plain(sample.recaption_alignment) is not None:
        by = f"by {shown(sample.captioner)}, " if sample.captioner else ""
        rule = f", taken by {sample.recaption_rule}" if sample.recaption_rule else ", not taken"
        lines.append(f"recaption   {by}alignment {decimal(sample.recaption_alignment)}{rule}")
    lines += [f"alignment   {alignment}", f"gain        {gain}"]
    if found.visits:
        each = (f"{name.replace('_', '-')} {value:.2f}" for name, value in found.visits.items())
        lines.append(f"visits      per epoch: {', '.join(each)}")
    source = f", from {shown(sample.source)}" if sample.source else ""
    lines.append(f"arrived     as number {sample.Index + 1:,}{source}")
    for space, neighbors in found.neighbors.items():
        if neighbors:
            lines += ["", f"nearest in {space} space when it arrived (cosine distance)"]
            lines += [
                f"  {decimal(near.distance)}  {shown(near.id)}  {_shortened(near.caption)}"
                for near in neighbors
            ]
    return "\n".join(lines)


def image_strip(found: Explanation, thumbnails: Thumbnails, side: int = 224) -> Image.Image:
    """The sample and its nearest images in a row, with captions and distances under them."""
    entries = [(found.sample.id, found.sample.verdict, found.sample.caption)]
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


def _why(sample: Any, min_align: float | None) -> str:
    """One sentence for the reader."""
    before, after = decimal(sample.original_alignment), decimal(sample.alignment)
    threshold = f"{min_align:g}" if min_align is not None else "the threshold"
    match sample.verdict, sample.reason:
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
    return f"{sample.verdict.capitalize()}: {sample.reason}."


def _plain(value: Any) -> Any:
    """A value of the table; None for what is unknown."""
    return None if value != value or value == "" else value


def _shortened(text: str, limit: int = 90) -> str:
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
