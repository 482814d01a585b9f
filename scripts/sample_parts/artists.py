"""The drawings: one artist's set as SVG per concept, and its rendering to pixels."""

import io
import re
from dataclasses import dataclass
from pathlib import Path

from PIL import Image
from sample_parts.concepts import Concept, code_of
from sample_parts.packages import PACKAGES, Package, read_member

RENDER_SIZE = 128  # pixels; every stored picture starts from this rendering


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
    """The artist's drawings of the known concepts, in the concepts' order."""
    icons = read_member(package, cache, "icons.json")
    codes = _codes_by_icon(package, icons["icons"], concepts, cache)
    found: dict[str, Drawing] = {}
    for icon in sorted(codes):
        concept = concepts[codes[icon]]
        body = icons["icons"][icon]
        width = body.get("width", icons.get("width", 16))
        height = body.get("height", icons.get("height", 16))
        svg = (
            '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
            f'viewBox="0 0 {width} {height}">{body["body"]}</svg>'
        )
        words = re.sub(r"-\d$", "", icon).replace("-", " ")
        found.setdefault(concept.code, Drawing(package.artist, concept, icon, words, svg))
    return [found[code] for code in concepts if code in found]


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
    table = read_member(package, cache, "chars.json")
    if table:
        pairs = ((icon, code_of(code)) for code, icon in table.items())
        return {icon: code for icon, code in pairs if code in concepts and icon in icons}
    names = _known_names(concepts, cache)
    matches = ((icon, names.get(_squeezed(re.sub(r"-\d$", "", icon)))) for icon in icons)
    return {icon: code for icon, code in matches if code}


def _known_names(concepts: dict[str, Concept], cache: Path) -> dict[str, str]:
    """Squeezed name → code, from the concepts' names and from the sets that publish their codes."""
    names: dict[str, str] = {}
    for package in (p for p in PACKAGES if p.name.startswith("@iconify-json/")):
        for code, icon in read_member(package, cache, "chars.json").items():
            if code_of(code) in concepts:
                names.setdefault(_squeezed(icon), code_of(code))
    for concept in concepts.values():
        for name in concept.names:
            names.setdefault(_squeezed(name), concept.code)
    return names


def _squeezed(name: str) -> str:
    """A name with everything but letters and digits taken out: "red-apple" → "redapple"."""
    return re.sub(r"[^a-z0-9]", "", name.lower())
