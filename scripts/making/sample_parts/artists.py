"""The drawings: one artist's set as SVG per concept, and its rendering to pixels."""

import io
import re
from dataclasses import dataclass
from pathlib import Path

from PIL import Image
from sample_parts.concepts import Concept, code_of
from sample_parts.packages import PACKAGES, Package, read_bytes, read_member

RENDER_SIZE = 128  # pixels; every stored picture starts from this rendering

# How icon sets call their styles. Thin, light and rounded ones are left out: at 64 pixels they are
# the same drawing again.
_STYLES = {
    **dict.fromkeys(("-fill", "-filled", "-solid", "-bold", "-sharp"), "solid"),
    **dict.fromkeys(("-duotone", "-bold-duotone", "-twotone"), "duotone"),
    **dict.fromkeys(("-outline", "-line", "-linear"), "outline"),
}
# Names that mean another thing in icon sets than among emoji: a computer's mouse, a building crane.
_AMBIGUOUS = frozenset({"mouse", "crane", "seal", "cross", "bow", "stop", "next", "new", "up"})


@dataclass(frozen=True)
class Drawing:
    """One artist's picture of one concept."""

    artist: str
    concept: Concept
    icon: str  # the key in the package
    own_name: str  # how the artist's set names it, in words
    svg: str

    @property
    def name(self) -> str:
        """A unique, readable name, such as "noto/1f34e"."""
        return f"{self.artist}/{self.concept.code}"


def read_drawings(package: Package, concepts: dict[str, Concept], cache: Path) -> list[Drawing]:
    """The artist's drawings of the known concepts, in the concepts' order.

    One of each concept; from a set that is no emoji set one of each concept and style (an outline
    and a filled shape are two drawings).
    """
    if package.font:
        return _read_glyphs(package, concepts, cache)
    icons = read_member(package, cache, "icons.json")
    codes = _codes_by_icon(package, icons["icons"], concepts, cache)
    found: dict[str, dict[str, Drawing]] = {}
    for icon in sorted(codes):
        concept = concepts[codes[icon]]
        body = icons["icons"][icon]
        width = body.get("width", icons.get("width", 16))
        height = body.get("height", icons.get("height", 16))
        svg = (
            '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
            f'viewBox="0 0 {width} {height}">{body["body"]}</svg>'
        )
        plain, style = _name_and_style(package, icon)
        words = re.sub(r"-\d$", "", plain).replace("-", " ")
        drawing = Drawing(package.artist, concept, icon, words, svg)
        found.setdefault(concept.code, {}).setdefault(style, drawing)
    return [drawing for code in concepts if code in found for drawing in found[code].values()]


def _read_glyphs(package: Package, concepts: dict[str, Concept], cache: Path) -> list[Drawing]:
    """The drawings of a font: its glyphs for the concepts that are a single code point."""
    from fontTools.pens.svgPathPen import SVGPathPen  # as resvg_py: only for making the sample
    from fontTools.ttLib import TTFont

    assert package.font is not None
    font = TTFont(io.BytesIO(read_bytes(package, cache, package.font)))
    glyphs, names = font.getGlyphSet(), font.getBestCmap()
    top, bottom = font["hhea"].ascent, font["hhea"].descent
    drawings = []
    for code, concept in concepts.items():
        name = names.get(int(code, 16)) if "-" not in code else None
        if name is None:
            continue
        pen = SVGPathPen(glyphs)
        glyphs[name].draw(pen)
        svg = (
            '<svg xmlns="http://www.w3.org/2000/svg" '
            f'viewBox="0 {-top} {glyphs[name].width} {top - bottom}">'
            f'<path transform="scale(1 -1)" d="{pen.getCommands()}"/></svg>'
        )
        drawings.append(Drawing(package.artist, concept, name, concept.names[0], svg))
    return drawings


def render(drawing: Drawing, size: int = RENDER_SIZE) -> Image.Image:
    """The drawing on white, RGB, ``size`` pixels square, with a small margin."""
    import resvg_py  # not a requirement of the project: only whoever makes a sample needs it

    data = resvg_py.svg_to_bytes(
        svg_string=drawing.svg, width=size, background="#ffffff", skip_system_fonts=True
    )
    image = Image.open(io.BytesIO(bytes(data))).convert("RGB")
    canvas = Image.new("RGB", (size, size), "white")
    image.thumbnail((size, size))
    canvas.paste(image, ((size - image.width) // 2, (size - image.height) // 2))
    return canvas


def _codes_by_icon(
    package: Package, icons: dict[str, object], concepts: dict[str, Concept], cache: Path
) -> dict[str, str]:
    """Icon name → concept code: from the set's own table, else by comparing names."""
    table = {} if package.by_name else read_member(package, cache, "chars.json")
    if table:
        pairs = ((icon, code_of(code)) for code, icon in table.items())
        return {icon: code for icon, code in pairs if code in concepts and icon in icons}
    names = _known_names(concepts, cache)
    plain = ((icon, _name_and_style(package, icon)[0]) for icon in icons)
    matches = ((icon, names.get(_squeezed(re.sub(r"-\d$", "", name)))) for icon, name in plain)
    return {icon: code for icon, code in matches if code}


def _name_and_style(package: Package, icon: str) -> tuple[str, str]:
    """What an icon of a set by name shows, and how: "cat-fill" → ("cat", "solid")."""
    if not package.by_name:
        return icon, ""
    if icon in _AMBIGUOUS:
        return "", ""
    for ending, style in _STYLES.items():
        if icon.endswith(ending):
            return icon.removesuffix(ending), style
    return icon, ""


def _known_names(concepts: dict[str, Concept], cache: Path) -> dict[str, str]:
    """Squeezed name → code, from the concepts' names and from the sets that publish their codes."""
    names: dict[str, str] = {}
    for package in (p for p in PACKAGES if _is_emoji_set(p)):
        for code, icon in read_member(package, cache, "chars.json").items():
            if code_of(code) in concepts:
                names.setdefault(_squeezed(icon), code_of(code))
    for concept in concepts.values():
        for name in concept.names:
            names.setdefault(_squeezed(name), concept.code)
    return names


def _is_emoji_set(package: Package) -> bool:
    return package.name.startswith("@iconify-json/") and not package.by_name


def _squeezed(name: str) -> str:
    """A name with everything but letters and digits taken out: "red-apple" → "redapple"."""
    return re.sub(r"[^a-z0-9]", "", name.lower())
