"""Score an encoder on the bundled sample: does alignment tell right captions from swapped ones?

    python scripts/score_tiny_blip.py --encoder infogrowth/assets/tiny_blip

Prints one JSON object. With --captioner it also writes a caption for every swapped pair's picture
and counts those that the encoder finds well aligned.
"""

import json
import sys
import tarfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from infogrowth.cli import run_script
from infogrowth.config import option
from infogrowth.data.images import decode_image
from infogrowth.encoders.loading import load_captioner, load_encoder
from infogrowth.evaluation.truth import auroc, detection
from infogrowth.files import read_json
from infogrowth.growth.cleaning import automatic_min_align

BATCH = 100


@dataclass(frozen=True, kw_only=True)
class ScoreConfig:
    """Options of scripts/score_tiny_blip.py."""

    encoder: str = option("tiny", "encoder to score: a BLIP folder, a checkpoint, or a name")
    captioner: str | None = option(None, "captioner to score as well")
    data: str = option("processed_data", "folder with sample/ and its truth")


def score(config: ScoreConfig) -> int:
    """Print how well an encoder's alignment tells the sample's right captions from swapped ones."""
    pictures, captions = read_sample(Path(config.data) / "sample")
    truth = read_json(Path(config.data) / "sample_truth.json", "the truth file")
    seeds = set(read_json(Path(config.data) / "sample_seeds.json", "the seed file"))
    keys = sorted(captions)
    swapped = np.array([truth[key]["swapped"] for key in keys])
    encoder = load_encoder(config.encoder, "cpu")
    images = encode_images(encoder, [pictures[key] for key in keys])
    alignment = (images * encode_texts(encoder, [captions[key] for key in keys])).sum(axis=1)
    min_align = automatic_min_align(alignment[[key in seeds for key in keys]])
    found = detection(alignment < min_align, swapped)
    result: dict[str, Any] = {
        "pairs": len(keys),
        "swapped": int(swapped.sum()),
        "auroc": round(auroc(alignment, ~swapped), 4),
        "min_align": round(float(min_align), 4),
        "precision": round(found.precision, 4),
        "recall": round(found.recall, 4),
    }
    if config.captioner:
        rows = np.flatnonzero(swapped)
        written = write_captions(config.captioner, [pictures[keys[row]] for row in rows])
        again = (images[rows] * encode_texts(encoder, written)).sum(axis=1)
        result["recaptions_above_min_align"] = round(float((again >= min_align).mean()), 4)
        result["examples"] = {
            truth[keys[row]]["true_caption"]: text
            for row, text in list(zip(rows, written, strict=True))[:12]
        }
    print(json.dumps(result, indent=1, ensure_ascii=False))
    return 0


def read_sample(folder: Path) -> tuple[dict[str, bytes], dict[str, str]]:
    """Encoded pictures and captions by key."""
    pictures, captions = {}, {}
    for shard in sorted(folder.glob("*.tar")):
        with tarfile.open(shard) as tar:
            for member in tar:
                key, _, ending = member.name.rpartition(".")
                data = tar.extractfile(member).read()  # type: ignore[union-attr]
                if ending == "txt":
                    captions[key] = data.decode()
                elif ending != "json":
                    pictures[key] = data
    return pictures, captions


def encode_images(encoder: Any, pictures: list[bytes]) -> np.ndarray:
    """Unit features (N, D) float32 of encoded pictures."""
    return _in_batches(
        pictures,
        lambda part: encoder.encode_images(
            torch.stack([encoder.preprocess(decode_image(data)) for data in part])
        ),
    )


def encode_texts(encoder: Any, captions: list[str]) -> np.ndarray:
    """Unit features (N, D) float32 of captions."""
    return _in_batches(captions, encoder.encode_texts)


def write_captions(name: str, pictures: list[bytes]) -> list[str]:
    """A caption for every picture."""
    captioner = load_captioner(name, "cpu")
    written: list[str] = []
    for start in range(0, len(pictures), BATCH):
        part = pictures[start : start + BATCH]
        images = torch.stack([captioner.preprocess(decode_image(data)) for data in part])
        written += captioner.caption(images)
    return written


def _in_batches(items: list, encode: Any) -> np.ndarray:
    parts = [encode(items[i : i + BATCH]) for i in range(0, len(items), BATCH)]
    return torch.cat([torch.as_tensor(part) for part in parts]).numpy()


if __name__ == "__main__":
    sys.exit(run_script(ScoreConfig, score))
