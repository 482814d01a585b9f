"""The parts of the experiment on disk: images in an LMDB, captions in annotation files, the truth.

FOLDER/lmdb_{source,pretraining,seeds,test}    drawings, keys `set/name`
FOLDER/{pretraining,seeds,test}.json           [{"image", "caption"}]
FOLDER/source_{00..09}.json                    the source's portions, in the order of its sets
FOLDER/truth.json                              {id: true caption} of the swapped ones
FOLDER/{source,test}.parquet                   the drawings instead of their LMDB, to travel
"""

import io
import math
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from claim_parts.icons import Icon, draw, fetch, pick_test_icons, png, read_sets, swap_captions
from PIL import Image
from tqdm import tqdm

from infogrowth.data.image_stores import LmdbImages, LmdbWriter
from infogrowth.files import atomic_write_json, read_json
from infogrowth.randomness import generator

PARTS = ("source", "pretraining", "seeds", "test")


def make_parts(
    folder: Path,
    packages: Path,
    archive: tuple[str, str],
    sets: dict[str, Sequence[str]],
    pairs: int | None,
    swapped: float,
    portions: int,
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
        swapped: the share of the source's captions that change places.

    Returns:
        How many pairs each part holds.

    Raises:
        UserError: the package cannot be had, or a set is not in it.
    """
    done = folder / "parts.json"
    plan = {
        "archive": list(archive), "sets": {k: list(v) for k, v in sets.items()}, "pairs": pairs,
        "swapped": swapped, "portions": portions, "test_names": test_names, "size": size,
        "seed": seed,
    }  # fmt: skip
    if done.exists() and (known := read_json(done))["plan"] == plan:
        for part in PARTS:
            _unpack(folder, part)
        return known["counts"]
    package = fetch(*archive, packages)
    drawings = read_sets(package, [name for part in PARTS for name in sets[part]])
    icons = {part: [i for name in sets[part] for i in drawings[name]] for part in PARTS}
    for part in PARTS[:3]:
        icons[part] = _at_most(icons[part], pairs, seed, part)
    icons["test"] = pick_test_icons(icons["test"], icons["source"], test_names, seed)
    wrong = swap_captions(icons["source"], swapped, seed)
    captions = {i.id: wrong.get(i.id, i.caption) for i in icons["source"]}
    for part in PARTS:
        failed = _draw_all(folder / f"lmdb_{part}", icons[part], size)
        icons[part] = [icon for icon in icons[part] if icon.id not in failed]
    for number, portion in enumerate(np.array_split(np.arange(len(icons["source"])), portions)):
        rows = [icons["source"][at] for at in portion]
        _annotations(folder / f"source_{number:02d}.json", ((i.id, captions[i.id]) for i in rows))
    for part in PARTS[1:]:
        _annotations(folder / f"{part}.json", ((i.id, i.caption) for i in icons[part]))
    names = {icon.caption: icon.id for icon in reversed(icons["seeds"])}  # the encoder's yardstick
    first = sorted(names.items(), key=lambda item: item[1])[:test_names]
    _annotations(folder / "seeds_val.json", ((image, text) for text, image in first))
    truth = {icon.id: icon.caption for icon in icons["source"] if icon.id in wrong}
    atomic_write_json(folder / "truth.json", truth)
    counts = {part: len(icons[part]) for part in PARTS} | {"swapped": len(truth)}
    atomic_write_json(done, {"plan": plan, "counts": counts})
    return counts


def pack(folder: Path, output: Path) -> None:
    """Copy what trainings need into `output`, small enough to send to another machine.

    Neighboring drawings resemble each other, so that all pixels compressed as one column take a
    fifth of the PNG files.
    """
    for path in [folder / "vocab.txt", *folder.glob("grown_*.json"), *folder.glob("arms/*.json"),
                 *(folder / "data" / name for name in ("parts.json", "test.json"))]:  # fmt: skip
        (output / path.relative_to(folder)).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, output / path.relative_to(folder))
    for part in ("source", "test"):
        images = LmdbImages(folder / "data" / f"lmdb_{part}")
        keys = sorted(images.keys())
        drawings = (Image.open(io.BytesIO(images.read(key))) for key in keys)
        pixels = [drawing.convert("L").tobytes() for drawing in drawings]
        pq.write_table(
            pa.table({"image": keys, "pixels": pixels}), output / "data" / f"{part}.parquet",
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
