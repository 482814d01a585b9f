"""The parts of the experiment on disk: images in an LMDB, captions in annotation files, the truth.

DRAWINGS/lmdb_{source,pretraining,seeds,test}    drawings, keys `set/name`
DRAWINGS/{source,pretraining,seeds,test}.json    [{"image", "caption"}], as their artists wrote
DRAWINGS/{source,test}.parquet                   the drawings instead of their LMDB, to travel
SOURCE/source_{00..09}.json                      the source's portions, in the order of its sets
SOURCE/truth.json                                {id: true caption} of the swapped ones
"""

import io
import math
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from claim_parts.icons import Icon, draw, fetch, pick_test_icons, png, read_sets, swap_captions
from PIL import Image
from tqdm import tqdm

from infogrowth.data.image_stores import LmdbImages, LmdbWriter
from infogrowth.errors import UserError
from infogrowth.files import atomic_write_json, read_json
from infogrowth.randomness import generator

PARTS = ("source", "pretraining", "seeds", "test")


def draw_parts(
    folder: Path,
    packages: Path,
    archive: tuple[str, str],
    sets: dict[str, Sequence[str]],
    pairs: int | None,
    test_names: int,
    size: int,
    seed: int,
) -> dict[str, int]:
    """Draw every part once; what is there already is kept.

    Args:
        packages: where the downloaded package is kept.
        archive: version and sha512 of the package of icons.
        sets: the artists' sets of each part.
        pairs: at most so many pairs in the source and in the pretraining part: icons are left out
            at random, evenly over the sets. None takes all.

    Returns:
        How many pairs each part holds.

    Raises:
        UserError: the package cannot be had, a set is not in it, or the folder holds other parts.
    """
    plan = {
        "archive": list(archive), "sets": {k: list(v) for k, v in sets.items()}, "pairs": pairs,
        "test_names": test_names, "size": size, "seed": seed,
    }  # fmt: skip
    if (counts := _finished(folder, plan)) is not None:
        for part in PARTS:
            _unpack(folder, part)
        return counts
    package = fetch(*archive, packages)
    drawings = read_sets(package, [name for part in PARTS for name in sets[part]])
    icons = {part: [i for name in sets[part] for i in drawings[name]] for part in PARTS}
    for part in PARTS[:3]:
        icons[part] = _at_most(icons[part], pairs, seed, part)
    icons["test"] = pick_test_icons(icons["test"], icons["source"], test_names, seed)
    for part in PARTS:
        failed = _draw_all(folder / f"lmdb_{part}", icons[part], size)
        icons[part] = [icon for icon in icons[part] if icon.id not in failed]
        _annotations(folder / f"{part}.json", ((i.id, i.caption) for i in icons[part]))
    names = {icon.caption: icon.id for icon in reversed(icons["seeds"])}  # the encoder's yardstick
    first = sorted(names.items(), key=lambda item: item[1])[:test_names]
    _annotations(folder / "seeds_val.json", ((image, text) for text, image in first))
    return _finish(folder, plan, {part: len(icons[part]) for part in PARTS})


def swap_source(
    drawings: Path, folder: Path, swapped: float, portions: int, seed: int
) -> dict[str, int]:
    """Write the source's portions, a share of whose captions changed places, and the truth.

    Returns:
        How many captions are wrong.

    Raises:
        UserError: the folder holds other portions.
    """
    plan = {"swapped": swapped, "portions": portions, "seed": seed}
    if (counts := _finished(folder, plan)) is not None:
        return counts
    captions = {pair["image"]: pair["caption"] for pair in read_json(drawings / "source.json")}
    wrong = swap_captions(captions, swapped, seed)
    for number, portion in enumerate(np.array_split(np.array(list(captions)), portions)):
        rows = ((icon, wrong.get(icon, captions[icon])) for icon in portion.tolist())
        _annotations(folder / f"source_{number:02d}.json", rows)
    atomic_write_json(folder / "truth.json", {icon: captions[icon] for icon in wrong})
    return _finish(folder, plan, {"wrong_captions": len(wrong)})


def _finished(folder: Path, plan: dict[str, Any]) -> dict[str, int] | None:
    """The counts of a folder that was made by this plan; None where none was."""
    if not (folder / "parts.json").exists():
        return None
    known = read_json(folder / "parts.json")
    for name, value in plan.items():
        if known["plan"].get(name) != value:
            raise UserError(f"{folder} was made with another {name}: name another --output")
    counts: dict[str, int] = known["counts"]
    return counts


def _finish(folder: Path, plan: dict[str, Any], counts: dict[str, int]) -> dict[str, int]:
    atomic_write_json(folder / "parts.json", {"plan": plan, "counts": counts})
    return counts


def pack(folder: Path, drawings: Path, source: Path, grown: Path, output: Path) -> None:
    """Copy what trainings need into `output`, small enough to send to another machine.

    Neighboring drawings resemble each other, so that all pixels compressed as one column take a
    fifth of the PNG files.
    """
    marks = [drawings / "parts.json", source / "parts.json"]
    annotations = [drawings / "test.json", *grown.glob("grown_*.json"), *grown.glob("arms/*.json")]
    for path in [folder / "vocab.txt", *marks, *annotations]:
        (output / path.relative_to(folder)).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, output / path.relative_to(folder))
    for part in ("source", "test"):
        images = LmdbImages(drawings / f"lmdb_{part}")
        keys = sorted(images.keys())
        opened = (Image.open(io.BytesIO(images.read(key))) for key in keys)
        pixels = [drawing.convert("L").tobytes() for drawing in opened]
        pq.write_table(
            pa.table({"image": keys, "pixels": pixels}), output / drawings.name / f"{part}.parquet",
            compression="zstd", compression_level=15, use_dictionary=False,
            row_group_size=len(keys), data_page_size=1 << 27,
        )  # fmt: skip


def _unpack(folder: Path, part: str) -> None:
    packed, images = folder / f"{part}.parquet", folder / f"lmdb_{part}"
    if images.exists() or not packed.exists():
        return
    table = pq.read_table(packed)
    with LmdbWriter(images) as writer:
        for key, pixels in zip(*(column.to_pylist() for column in table.columns), strict=True):
            size = math.isqrt(len(pixels))
            writer.put(key, png(Image.frombytes("L", (size, size), pixels)))


def _annotations(path: Path, pairs: Iterable[tuple[str, str]]) -> None:
    atomic_write_json(path, [{"image": image, "caption": text} for image, text in pairs])


def _at_most(icons: list[Icon], pairs: int | None, seed: int, part: str) -> list[Icon]:
    if pairs is None or pairs >= len(icons):
        return icons
    chosen = generator(seed, "claim", part).permutation(len(icons))[:pairs]
    return [icons[at] for at in sorted(chosen)]


def _draw_all(path: Path, icons: Sequence[Icon], size: int) -> set[str]:
    """Draw what the LMDB does not hold yet; returns the ids of SVGs that cannot be drawn."""
    failed = set()
    with LmdbWriter(path) as writer:
        for icon in tqdm(icons, desc=path.name, unit="icon", mininterval=2):
            if writer.get(icon.id) is None:
                try:
                    writer.put(icon.id, draw(icon, size))
                except ValueError:
                    failed.add(icon.id)
    return failed
