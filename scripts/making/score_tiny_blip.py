"""Score an encoder on the bundled sample: does alignment tell right captions from swapped ones?

    python scripts/making/score_tiny_blip.py --encoder infogrowth/assets/tiny_blip

Prints one JSON object. With --captioner it also writes a caption for every swapped pair's picture
and counts those that the encoder finds well aligned.
"""

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import infogrowth.threads  # noqa: F401 - before torch

import numpy as np
import torch
from PIL import Image

from infogrowth.cli import run_script
from infogrowth.config import option
from infogrowth.data.images import decode_image
from infogrowth.data.sources import open_source
from infogrowth.encoders.loading import load_captioner, load_encoder
from infogrowth.encoders.protocols import DualEncoder
from infogrowth.evaluation.truth import auroc, detection
from infogrowth.files import read_json
from infogrowth.growth.thresholds import choose_min_align

BATCH = 100


@dataclass(frozen=True, kw_only=True)
class ScoreConfig:
    """Options of scripts/making/score_tiny_blip.py."""

    encoder: str = option("tiny", "encoder to score: a BLIP folder, a checkpoint, or a name")
    captioner: str | None = option(None, "captioner to score as well")
    data: str = option("processed_data", "folder with sample/ and its truth")


def score(config: ScoreConfig) -> int:
    """Print how well an encoder's alignment tells the sample's right captions from swapped ones."""
    data = Path(config.data)
    samples = list(open_source(data / "sample"))
    truth = read_json(data / "sample_truth.json", "the truth file")
    seeds = set(read_json(data / "sample_seeds.json", "the seed file"))
    swapped = np.array([truth[sample.id]["swapped"] for sample in samples])
    trusted = np.array([sample.id in seeds for sample in samples])
    encoder = load_encoder(config.encoder)
    pictures = [decode_image(sample.data) for sample in samples if sample.data]
    images = encode_images(encoder, pictures)
    texts = in_batches([sample.caption for sample in samples], encoder.encode_texts)
    alignment = (images * texts).sum(axis=1)
    min_align = choose_min_align(images[trusted], texts[trusted])
    found = detection(alignment < min_align, swapped)
    result: dict[str, Any] = {
        "pairs": len(samples),
        "swapped": int(swapped.sum()),
        "auroc": round(auroc(alignment, ~swapped), 4),
        "min_align": round(float(min_align), 4),
        "noise_precision": round(found.precision, 4),
        "noise_recall": round(found.recall, 4),
    }
    if config.captioner:
        rows = np.flatnonzero(swapped).tolist()
        written = write_captions(config.captioner, [pictures[row] for row in rows])
        again = (images[rows] * in_batches(written, encoder.encode_texts)).sum(axis=1)
        result["recaptions_above_min_align"] = round(float((again >= min_align).mean()), 4)
        result["examples"] = {
            truth[samples[row].id]["true_caption"]: text
            for row, text in list(zip(rows, written, strict=True))[:20]
        }
    print(json.dumps(result, indent=1, ensure_ascii=False))
    return 0


def encode_images(encoder: DualEncoder, pictures: list[Image.Image]) -> np.ndarray:
    """Unit features (N, D) float32 of RGB pictures."""
    return in_batches(
        [encoder.preprocess(picture) for picture in pictures],
        lambda part: encoder.encode_images(torch.stack(part)),
    )


def write_captions(name: str, pictures: list[Image.Image]) -> list[str]:
    """A caption for every picture."""
    captioner = load_captioner(name)
    ready = [captioner.preprocess(picture) for picture in pictures]
    starts = range(0, len(ready), BATCH)
    return [text for i in starts for text in captioner.caption(ready[i : i + BATCH])]


def in_batches(items: list, encode: Callable[[list], torch.Tensor]) -> np.ndarray:
    """``encode`` over ``items``, some at a time, as one array."""
    parts = [encode(items[i : i + BATCH]) for i in range(0, len(items), BATCH)]
    return torch.cat(parts).numpy()


if __name__ == "__main__":
    sys.exit(run_script(ScoreConfig, score))
