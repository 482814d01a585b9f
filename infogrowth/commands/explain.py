"""`infogrowth explain`: report why a sample was kept, recaptioned or dropped, and its neighbors."""

import difflib
import json
import logging
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont, ImageOps

from infogrowth.config import option
from infogrowth.data.text import image_key, strip_extension
from infogrowth.errors import UserError
from infogrowth.files import atomic_write
from infogrowth.growth.decisions import Decision, Reason
from infogrowth.report.dataset import GrowthTable, expected_visits, open_growth, ranks_in_percent
from infogrowth.report.formatting import decimal, percent, shown
from infogrowth.report.galleries import Thumbnails

log = logging.getLogger(__name__)

_WHY = {
    Reason.SEED: "It belongs to the trusted start set, which is never filtered.",
    Reason.RECAPTIONED: "Its own caption did not fit ({before} is under {threshold}), the new one "
    "does ({after}), so it was kept with the new caption.",
    Reason.ALIGNED: "Image and caption fit: {after} is not under {threshold}.",
    Reason.LOW_ALIGNMENT: "Image and caption do not fit: {before} is under {threshold}.",
    Reason.LOW_RECAPTION: "Image and caption do not fit ({before} is under {threshold}), and "
    "neither does the new caption.",
}


@dataclass(frozen=True)
class Config:
    """Options of ``infogrowth explain``."""

    growth: str = option(help="growth folder (GROWTH_DIR)", positional=True)
    id: str = option(help="id of the sample, with or without its extension", positional=True)
    json: bool = option(False, "print JSON: a list, as an id may have come several times")
    image: str | None = option(None, "also write the sample and its neighbors as a PNG strip")
    lmdb: str | None = option(None, "LMDB of the images; by default the one the growth used")


def run(config: Config) -> int:
    """Print the explanation; exit status 2 when there is no such sample."""
    table = open_growth(config.growth)
    found = explain(table, config.id)
    if config.image is not None:
        thumbnails = Thumbnails(config.lmdb, table.settings.get("images"))
        if note := thumbnails.note:
            raise UserError(note[:1].lower() + note[1:].rstrip("."))
        with atomic_write(config.image, "wb") as file:
            image_strip(found[-1], thumbnails).save(file, "PNG")
        log.info("wrote %s", config.image)
    if config.json:
        print(json.dumps(found, indent=2, ensure_ascii=False))
    else:
        print("\n\n".join(map(as_text, found)))
    return 0


def explain(table: GrowthTable, sample_id: str) -> list[dict[str, Any]]:
    """Every decision about ``sample_id``, which may have come more than once, in stream order.

    The id is found with or without its extension, as everywhere. Raises UserError: no such sample,
    with the nearest ids.

    Returns:
        ready for JSON, the fields of a `Decision` (None is unknown; neighbors have ``id``,
        ``distance`` and ``caption``) and ``row`` (its position in the stream, from 0), ``source``,
        ``why``, ``min_align``, ``gain_rank`` (percent of the kept samples with a smaller mean gain)
        and, if it is kept, ``visits``: those expected per epoch, by sampler.
    """
    rows, kept = table.rows, table.rows[table.kept]
    ways: list[Callable[[str], str]] = [str, strip_extension, image_key]
    matches = (rows[rows.id.map(way) == way(sample_id)] for way in ways)
    found = next((match for match in matches if len(match)), None)
    if found is None:
        # difflib looks at every id; the first hundred thousand are enough for a hint
        close = difflib.get_close_matches(sample_id, rows.id[:100_000].tolist(), n=3)
        hint = f"; did you mean {' or '.join(map(repr, close))}?" if close else ""
        raise UserError(
            f"sample {sample_id!r} was never processed in {table.name!r}"
            f"{hint or '; samples without features are counted by reason in the report'}"
        )
    visits = expected_visits(table.gains[table.kept]).set_index(kept.index)
    visits = visits[["uniform", "proportional", "two_phase"]]
    ranks = ranks_in_percent(kept.gain)
    explanations = []
    for row, sample in found.to_dict("index").items():
        near = {f"{space}_neighbors": table.near(row, space) for space in ("image", "text")}
        decision = {
            field.name: near.get(field.name, sample.get(field.name)) for field in fields(Decision)
        }
        decision = {name: None if v != v or v == "" else v for name, v in decision.items()}
        why = _WHY.get(sample["reason"], f"{sample['verdict'].capitalize()}: {sample['reason']}.")
        about = {
            "row": row,
            "source": sample["source"],
            "why": why.format(
                before=decimal(decision["original_alignment"]),
                after=decimal(decision["alignment"]),
                threshold="the threshold" if table.min_align is None else f"{table.min_align:g}",
            ),
            "min_align": table.min_align,
            "gain_rank": float(ranks[row]) if row in ranks else None,
            "visits": visits.loc[row].to_dict() if row in ranks else None,
        }
        explanations.append(decision | about)
    return explanations


def as_text(found: dict[str, Any]) -> str:
    """The explanation for a terminal."""
    alignment = decimal(found["original_alignment"])
    if found["verdict"] == "recaptioned":
        alignment += f" → {decimal(found['alignment'])}"
    if found["min_align"] is not None:
        alignment += f"   (threshold {found['min_align']:g})"
    gain = f"image {decimal(found['gain_image'])}, text {decimal(found['gain_text'])}"
    if found["gain_rank"] is not None:
        gain += f"   (more than {percent(found['gain_rank'])} of the kept samples)"
    lines = [f"{shown(found['id'])}: {found['verdict']}", found["why"], ""]
    lines.append(f"caption     {shown(found['caption'] or '')}")
    if found["original_caption"] != found["caption"]:
        lines.append(f"was         {shown(found['original_caption'] or '')}")
    if found["recaption_alignment"] is not None:
        by = f"by {shown(found['captioner'])}, " if found["captioner"] else ""
        rule = found["recaption_rule"]
        taken = f"taken by {rule}" if rule else "not taken"
        lines.append(f"recaption   {by}alignment {decimal(found['recaption_alignment'])}, {taken}")
    lines += [f"alignment   {alignment}", f"gain        {gain}"]
    if found["visits"]:
        each = (f"{name.replace('_', '-')} {n:.2f}" for name, n in found["visits"].items())
        lines.append(f"visits      per epoch: {', '.join(each)}")
    source = f", from {shown(found['source'])}" if found["source"] else ""
    lines.append(f"arrived     as number {found['row'] + 1:,}{source}")
    for space in ("image", "text"):
        if neighbors := found[f"{space}_neighbors"]:
            lines += ["", f"nearest in {space} space when it arrived (cosine distance)"]
            for near in neighbors:
                text = shown(near["caption"])
                text = text if len(text) <= 90 else text[:89] + "…"
                lines.append(f"  {decimal(near['distance'])}  {shown(near['id'])}  {text}")
    return "\n".join(lines)


def image_strip(found: dict[str, Any], thumbnails: Thumbnails, side: int = 224) -> Image.Image:
    """The sample and its nearest images in a row, with captions and distances under them."""
    from matplotlib import get_data_path

    entries = [(found["id"], found["verdict"], found["caption"] or "")]
    entries += [
        (near["id"], f"distance {near['distance']:.3f}", near["caption"])
        for near in found["image_neighbors"]
    ]
    margin, words = 16, 84
    width = margin + len(entries) * (side + margin)
    strip = Image.new("RGB", (width, side + words + 2 * margin), "white")
    draw = ImageDraw.Draw(strip)
    fonts = Path(get_data_path(), "fonts/ttf")  # which matplotlib brings along to every machine
    bold = ImageFont.truetype(str(fonts / "DejaVuSans-Bold.ttf"), 13)
    small = ImageFont.truetype(str(fonts / "DejaVuSans.ttf"), 12)
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
