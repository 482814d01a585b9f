"""Time and size of `infogrowth report` on a growth folder of made features and pictures.

    python benchmarks/report.py --samples 100000

Prints one line of JSON: samples, seconds (the whole command, start-up included), megabytes of the
page, and the most memory used.
"""

import argparse
import io
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image

from infogrowth.data.image_stores import LmdbWriter
from infogrowth.growth.decisions import SCHEMA

PICTURES = 500  # different pictures; every sample has one of them


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--samples", type=int, default=100_000)
    parser.add_argument("--dimension", type=int, default=256)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        make_growth(root, arguments.samples, arguments.dimension)
        started = time.perf_counter()
        command = ["report", str(root / "growth"), "-o", str(root / "report.html"), "--quiet"]
        subprocess.run([sys.executable, "-m", "infogrowth", *command], check=True)
        seconds = time.perf_counter() - started
        size = (root / "report.html").stat().st_size
    memory = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024
    result = {"samples": arguments.samples, "seconds": round(seconds, 1)}
    print(json.dumps(result | {"page_MB": round(size / 1e6, 2), "memory_MB": round(memory)}))


def make_growth(root: Path, samples: int, dimension: int) -> None:
    """A growth folder of the public layout, with an LMDB of photograph-like pictures."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    random = np.random.default_rng(0)
    ids = [f"{number:09d}" for number in range(samples)]
    pictures = [_picture(random) for _ in range(min(PICTURES, samples))]
    with LmdbWriter(root / "lmdb", map_size=1 << 30) as writer:
        for n, name in enumerate(ids):
            writer.put(name, pictures[n % len(pictures)])
    rows = np.arange(samples)
    alignment = random.normal(0.6, 0.15, samples).clip(-1, 1)
    verdict = np.where(alignment < 0.4, "dropped", "kept")
    recaptioned = (verdict == "dropped") & (random.random(samples) < 0.5)
    verdict = np.where(recaptioned, "recaptioned", verdict)
    kept = np.flatnonzero(verdict != "dropped")
    gain = 0.1 + 0.9 / (1 + rows / 3000) * random.random(samples) + 0.2 * random.random(samples)
    before = np.maximum(0, rows[:, None] - random.integers(1, 5000, (samples, 4)))
    before = kept[np.minimum(np.searchsorted(kept, before), len(kept) - 1)]
    neighbors = [[ids[near] for near in line] for line in before.tolist()]
    distances = np.sort(random.random((samples, 4)) * gain[:, None], axis=1).tolist()
    captions = [f"a picture of something, number {number}, in a dozen words" for number in rows]
    columns = dict.fromkeys(SCHEMA.names, pa.nulls(samples)) | {
        "row": rows,
        "source": np.zeros(samples),
        "source_row": rows,
        "id": ids,
        "verdict": verdict.tolist(),
        "reason": np.where(verdict == "dropped", "alignment below min_align", "aligned").tolist(),
        "alignment": np.where(recaptioned, 0.7, alignment),
        "original_alignment": alignment,
        "gain_image": gain,
        "gain_text": 1.2 * gain,
        "image_neighbors": neighbors,
        "image_distances": distances,
        "text_neighbors": neighbors,
        "text_distances": distances,
        "caption": captions,
        "original_caption": captions,
    }
    growth = root / "growth"
    (growth / "decisions").mkdir(parents=True)
    (growth / "kept").mkdir()
    arrays = [pa.array(columns[field.name]).cast(field.type) for field in SCHEMA]
    pq.write_table(pa.table(arrays, schema=SCHEMA), growth / "decisions/000000.parquet")
    features = random.normal(size=(len(kept), dimension)).astype(np.float32)
    for space in ("image", "text"):
        np.save(growth / f"kept/{space}_000000.npy", features)
    both = {"image": dimension, "text": dimension}
    settings = {"format": 1, "k": 4, "min_align": 0.4, "modality": "pair", "dimension": both}
    settings |= {"encoder": None, "images": str(root / "lmdb")}
    (growth / "growth.json").write_text(json.dumps(settings))
    source = {"kind": "stream", "features": "made", "position": samples, "rows": samples}
    manifest = {"format": 1, "parts": 1, "rows": samples, "sources": [source]}
    manifest |= {"totals": {"dataset": len(kept)}}
    (growth / "manifest.json").write_text(json.dumps(manifest))


def _picture(random: np.random.Generator) -> bytes:
    """Smooth color fields with some grain: compresses about as badly as a photograph."""
    field = Image.fromarray(random.integers(0, 255, (9, 9, 3), dtype=np.uint8))
    pixels = np.asarray(field.resize((256, 256), Image.Resampling.BICUBIC), dtype=np.float32)
    grain = random.normal(0, 14, (256, 256, 1))
    buffer = io.BytesIO()
    Image.fromarray((pixels + grain).clip(0, 255).astype(np.uint8)).save(buffer, "JPEG")
    return buffer.getvalue()


if __name__ == "__main__":
    main()
