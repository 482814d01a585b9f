"""A small grown dataset with images, made by hand: what was decided is known in every number.

The growth folder is written with pyarrow and numpy from its public layout, the gains by brute
force in float64, so that these tests do not lean on the engine they report about.
"""

import io
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image, ImageDraw

from infogrowth.data.image_stores import LmdbWriter
from infogrowth.growth.decisions import SCHEMA
from infogrowth.growth.ledger import GrowthFolder
from infogrowth.growth.sources import SourceProgress

COLORS = ["crimson", "teal", "goldenrod", "royalblue", "purple", "olive", "coral", "slategray"]
HOSTILE = '<script>window.__injected=1</script>"><img src=x onerror="window.__injected=2">'


@dataclass(frozen=True)
class Made:
    """What a test gets: where things are, and the rows as they were decided."""

    growth: Path
    lmdb: Path
    rows: list[dict]

    def ids(self, verdict: str) -> list[str]:
        return [row["id"] for row in self.rows if row["verdict"] == verdict]


@pytest.fixture(scope="session")
def other_threshold():
    """min_align -> how many of `made`'s samples are kept and recaptioned when grown with it."""

    def counts(min_align: float) -> tuple[int, int]:
        verdicts = [row["verdict"] for row in grow(make_samples(160), min_align)[0]]
        return len(verdicts) - verdicts.count("dropped"), verdicts.count("recaptioned")

    return counts


@pytest.fixture
def write_folder():
    """`write_growth`, for tests that need a growth folder of their own."""
    return write_growth


@pytest.fixture(scope="session")
def made(tmp_path_factory) -> Made:
    """160 samples of 8 looks: 10 seeds, noise, recaptions, near-duplicates, hostile captions."""
    folder = tmp_path_factory.mktemp("made")
    samples = make_samples(160)
    lmdb = folder / "images"
    with LmdbWriter(lmdb) as writer:
        for sample in samples:
            writer.put(sample["id"], sample["jpeg"])
    rows, image, text = grow(samples)
    growth = folder / "growth <b>&amp;"
    write_growth(growth, rows, image, text, images=str(lmdb))
    return Made(growth, lmdb, rows)


def write_growth(growth, rows, image, text, images=None, min_align=0.4, skipped=None):
    """A growth folder of one part with ``rows`` (dicts of SCHEMA's columns)."""
    (growth / "decisions").mkdir(parents=True)
    (growth / "kept").mkdir()
    settings = {
        "format": 1,
        "k": 4,
        "min_align": min_align,
        "min_align_rule": "given",
        "modality": "pair",
        "dimension": {"image": image.shape[1], "text": text.shape[1]},
        "encoder": {"name": "made by hand", "fingerprint": "0"},
        "index": "exact",
        "images": images,
    }
    (growth / "growth.json").write_text(json.dumps(settings))
    pq.write_table(pa.Table.from_pylist(rows, schema=SCHEMA), growth / "decisions/000000.parquet")
    np.save(growth / "kept/image_000000.npy", image.astype(np.float32))
    np.save(growth / "kept/text_000000.npy", text.astype(np.float32))
    seeds = sum(row["reason"] == "seed" for row in rows)
    sources = [
        SourceProgress("seed", "clean/seeds", position=seeds, rows=seeds),
        SourceProgress("stream", "features/a$b_{1}", position=len(rows), rows=len(rows),
               skipped={"not an image": 3, "no <caption>": 1} if skipped is None else skipped),
    ]  # fmt: skip
    totals = {**GrowthFolder(growth).totals, "dataset": len(image)}
    GrowthFolder(growth, settings, 1, len(rows), totals, sources).write_manifest()


def make_samples(count: int) -> list[dict]:
    random = np.random.default_rng(7)
    centers = random.normal(size=(len(COLORS), 24))
    samples = []
    for number in range(count):
        look = int(random.integers(len(COLORS)))
        near = number % 9 == 5 and number > 20
        if near:  # almost the sample before it
            look, base = samples[-1]["look"], samples[-1]["image"]
            image = base + 0.01 * random.normal(size=24)
        else:
            image = centers[look] + 0.7 * random.normal(size=24)
        image = _unit(image)
        noise = number % 7 == 3 and number >= 10
        fits = _unit(centers[(look + 3) % len(COLORS)]) if noise else image
        text = fits + 0.15 * random.normal(size=24)
        caption = f"a {COLORS[(look + 3 * noise) % len(COLORS)]} shape, number {number}"
        samples.append(
            {
                "id": f"{number:06d}",
                "look": look,
                "image": image,
                "text": _unit(text),
                "fit": _unit(image + 0.15 * random.normal(size=24)),
                "caption": caption + (HOSTILE if number in (17, 40, 41, 101) else ""),
                "jpeg": _drawing(random, look),
            }
        )
    samples[40]["id"] = HOSTILE
    return samples


def _unit(vector: np.ndarray) -> np.ndarray:
    return vector / np.linalg.norm(vector)


def _drawing(random: np.random.Generator, look: int) -> bytes:
    image = Image.new("RGB", (160, 120), tuple(random.integers(190, 255, 3).tolist()))
    draw = ImageDraw.Draw(image)
    x, y = random.integers(10, 60, 2).tolist()
    shape = (draw.ellipse, draw.rectangle)[look % 2]
    shape((x, y // 2, x + 80, y // 2 + 70), fill=COLORS[look], outline="black", width=2)
    buffer = io.BytesIO()
    image.save(buffer, "JPEG")
    return buffer.getvalue()


def grow(samples: list[dict], min_align: float = 0.4) -> tuple[list[dict], np.ndarray, np.ndarray]:
    """Spec §2 in plain Python: one sample after the other, every distance in float64."""
    kept: list[tuple[str, np.ndarray, np.ndarray]] = []
    rows = []
    for number, sample in enumerate(samples):
        text, caption = sample["text"], sample["caption"]
        alignment = original = float(sample["image"] @ text)
        verdict, reason = "kept", "seed" if number < 10 else "aligned"
        if number >= 10 and original < min_align:
            verdict, reason = "dropped", "alignment below min_align"
            if number % 2:  # every other one has a recaption
                verdict, reason = "dropped", "alignment and recaption below min_align"
                if float(sample["image"] @ sample["fit"]) >= min_align:
                    text = sample["fit"]
                    alignment = float(sample["image"] @ text)
                    caption = f"new words: a {COLORS[sample['look']]} shape"
                    verdict, reason = "recaptioned", "recaptioned"
        row = {
            "row": number,
            "source": int(number >= 10),
            "source_row": number - 10 * (number >= 10),
        }
        row.update(id=sample["id"], verdict=verdict, reason=reason, alignment=alignment)
        row.update(original_alignment=original, caption=caption, original_caption=sample["caption"])
        for space, vector, column in (("image", sample["image"], 1), ("text", text, 2)):
            near = sorted((1 - float(entry[column] @ vector), entry[0]) for entry in kept)[:4]
            row[f"{space}_neighbors"] = [name for _, name in near]
            row[f"{space}_distances"] = [distance for distance, _ in near]
            row[f"gain_{space}"] = float(np.mean([d for d, _ in near])) if near else 1.0
        rows.append(row)
        if verdict != "dropped":
            kept.append((sample["id"], sample["image"], text))
    return rows, np.array([k[1] for k in kept]), np.array([k[2] for k in kept])
