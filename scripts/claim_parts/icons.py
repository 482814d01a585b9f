"""Icons and the names that their artists gave them: the data of the experiment.

One npm package, pinned and verified, holds some 240 artists' sets as SVG. A set belongs wholly to
one part (source, pretraining, seeds, test), so what is tested was drawn by hands that no model has
seen.
"""

import io
import json
import re
import tarfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from making.sample_parts.packages import npm_tarball
from PIL import Image

from infogrowth.errors import UserError
from infogrowth.randomness import generator

PACKAGE = "@iconify/json"
# Words at the end of a name that tell how it was drawn, not what: sets that publish no list of
# their styles use the same ones.
STYLES = frozenset(
    word
    for kind in (
        "outline outlined solid filled fill regular bold thin light duotone twotone line linear",
        "broken rounded round sharp baseline stroke bulk two tone alt o color mini micro duo",
    )
    for word in kind.split()
)


@dataclass(frozen=True)
class Icon:
    """One drawing: its id (``set/name``), the words of its name, and its SVG."""

    id: str
    caption: str
    svg: str


def fetch(version: str, sha512: str, cache: Path) -> Path:
    """The verified tarball in `cache`, downloaded by npm when it is not there yet.

    Raises:
        UserError: npm is missing or fails, or the bytes are not those that the hash names.
    """
    return npm_tarball(PACKAGE, version, sha512, cache / f"iconify-json-{version}.tgz")


def read_sets(archive: Path, sets: Sequence[str]) -> dict[str, list[Icon]]:
    """The icons of each set, in the order of their names.

    Raises:
        UserError: the package holds no such set.
    """
    wanted = {f"package/json/{name}.json": name for name in sets}
    found: dict[str, list[Icon]] = {}
    with tarfile.open(archive) as tar:
        for member in tar:
            if member.name in wanted and (stream := tar.extractfile(member)) is not None:
                found[wanted[member.name]] = _icons(json.load(stream))
    missing = [name for name in sets if name not in found]
    if missing:
        raise UserError(f"{archive} holds no set {missing[0]!r}; correct the configuration")
    return {name: found[name] for name in sets}


def caption(name: str, suffixes: Sequence[str] = ()) -> str:
    """The words of an icon's name, without those at its end that tell its style or its number."""
    for suffix in sorted(filter(None, suffixes), key=len, reverse=True):
        if name.endswith(f"-{suffix}"):
            name = name.removesuffix(f"-{suffix}")
            break
    words = [word for word in re.split(r"[-_\s]+", name) if word]
    while words and (words[-1] in STYLES or words[-1].isdigit()):
        words.pop()
    if words:  # "bag3" is a bag; "h1" and "4k" are what they are
        words[-1] = re.sub(r"(?<=[a-z]{3})\d+$", "", words[-1])
    return " ".join(words)


def _icons(collection: dict[str, Any]) -> list[Icon]:
    suffixes = list(collection.get("suffixes") or ())
    size = collection.get("width", 16), collection.get("height", 16)
    icons = []
    for name, icon in sorted(collection["icons"].items()):
        words = caption(name, suffixes)
        if icon.get("hidden") or not words:
            continue
        box = (icon.get("left", 0), icon.get("top", 0), icon.get("width", size[0]))
        view = " ".join(map(str, (*box, icon.get("height", size[1]))))
        svg = (
            '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
            f'viewBox="{view}">{icon["body"]}</svg>'
        )
        icons.append(Icon(f"{collection['prefix']}/{name}", words, svg))
    return icons


def draw(icon: Icon, size: int) -> bytes:
    """The icon on white, `size` pixels square, as grey PNG."""
    import resvg_py  # no requirement of the project: only this experiment draws

    data = resvg_py.svg_to_bytes(
        svg_string=icon.svg, width=size, background="#ffffff", skip_system_fonts=True
    )
    drawn = Image.open(io.BytesIO(bytes(data))).convert("L")
    drawn.thumbnail((size, size))
    canvas = Image.new("L", (size, size), 255)
    canvas.paste(drawn, ((size - drawn.width) // 2, (size - drawn.height) // 2))
    return png(canvas)


def png(drawing: Image.Image) -> bytes:
    """The drawing as the LMDB holds it."""
    file = io.BytesIO()
    drawing.save(file, "PNG", optimize=False, compress_level=6)
    return file.getvalue()


def swap_captions(captions: dict[str, str], share: float, seed: int) -> dict[str, str]:
    """Wrong captions for a share of the icons: id → the caption of another one of them.

    The captions of the chosen icons change places, each to an icon with no word in common.
    """
    ids = list(captions)
    rng = generator(seed, "claim", "swapped captions")
    chosen = [ids[at] for at in sorted(rng.permutation(len(ids))[: round(share * len(ids))])]
    given = [captions[icon] for icon in chosen]
    order = rng.permutation(len(chosen)).tolist()
    for at, icon in enumerate(chosen):
        for attempt in range(100):
            other = at if attempt == 0 else int(rng.integers(len(chosen)))
            mine, theirs = order[at], order[other]
            fits = _differ(given[theirs], captions[icon])
            if fits and (other == at or _differ(given[mine], captions[chosen[other]])):
                order[at], order[other] = theirs, mine
                break
    swapped = {icon: given[order[at]] for at, icon in enumerate(chosen)}
    return {icon: text for icon, text in swapped.items() if _differ(text, captions[icon])}


def _differ(left: str, right: str) -> bool:
    return not set(left.split()) & set(right.split())


def pick_test_icons(
    candidates: Sequence[Icon], source: Sequence[Icon], count: int, seed: int
) -> list[Icon]:
    """One drawing of each of `count` names that occur at least three times in the source."""
    often = Counter(icon.caption for icon in source)
    rng = generator(seed, "claim", "test names")
    by_name: dict[str, list[Icon]] = {}
    for icon in candidates:
        if often[icon.caption] >= 3:
            by_name.setdefault(icon.caption, []).append(icon)
    names = sorted(by_name)
    if len(names) < count:
        raise UserError(f"only {len(names)} names occur in the source, not {count}: ask for fewer")
    chosen = sorted(names[at] for at in rng.permutation(len(names))[:count])
    return [by_name[name][int(rng.integers(len(by_name[name])))] for name in chosen]
