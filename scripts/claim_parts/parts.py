"""The parts of the experiment on disk: images in an LMDB, captions in annotation files, the truth.

FOLDER/lmdb_{source,pretraining,seeds,test}    drawings, keys `set/name`
FOLDER/{pretraining,seeds,test}.json           [{"image", "caption"}]
FOLDER/source_{00..09}.json                    the source's portions, in the order of its sets
FOLDER/truth.json                              {"swapped": {id: true caption}, "names": …}
"""

from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from claim_parts.icons import Icon, draw, fetch, pick_test_icons, read_sets, swap_captions
from tqdm import tqdm

from infogrowth.data.lmdb_store import LmdbWriter
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
