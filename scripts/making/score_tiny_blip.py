"""Score an encoder, and a captioner, on the bundled sample, with 95 % intervals.

    python scripts/making/score_tiny_blip.py --encoder tiny --captioner tiny

How well does alignment tell right captions from swapped ones? And with the wordings of concepts
that make_sample.py --training_set leaves in train.json: is the concept of an image, or of a
caption, the nearest one? All figures are of the pairs after the seeds; the threshold is
`--min-align auto` of the seeds. Intervals: percentiles of 1,000 resamples of the pairs.
"""

import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import infogrowth.threads  # noqa: F401 - before torch

import numpy as np
import torch
from PIL import Image

from infogrowth.annotations import load_annotations
from infogrowth.cli import run_script
from infogrowth.config import option
from infogrowth.data.images import decode_image
from infogrowth.data.sources import open_source
from infogrowth.encoders.loading import load_captioner, load_encoder
from infogrowth.encoders.models import DualEncoder
from infogrowth.evaluation.truth import auroc, detection
from infogrowth.files import read_json
from infogrowth.growth.thresholds import choose_min_align
from infogrowth.randomness import generator

BATCH = 100
RESAMPLES = 1000

# (rows (n,) of the scored pairs) -> one figure
Figure = Callable[[np.ndarray], float]


@dataclass(frozen=True, kw_only=True)
class ScoreConfig:
    """Options of scripts/making/score_tiny_blip.py."""

    encoder: str = option("tiny", "encoder to score: a BLIP folder, a checkpoint, or a name")
    captioner: str | None = option(None, "captioner to score as well")
    data: str = option("processed_data", "folder with sample/ and its truth")
    concepts: str = option("output/tiny_blip/train.json", "captions with a concept each, if there")
    output: str | None = option(None, "JSON file for the figures as well")


def score(config: ScoreConfig) -> int:
    """Print how well an encoder separates the sample's right captions from swapped ones."""
    data = Path(config.data)
    samples = list(open_source(data / "sample"))
    truth = read_json(data / "sample_truth.json", "the truth file")
    seeds = set(read_json(data / "sample_seeds.json", "the seed file"))
    encoder = load_encoder(config.encoder)
    pictures = [decode_image(sample.data) for sample in samples if sample.data]
    images = encode_images(encoder, pictures)
    captions = [sample.caption for sample in samples]
    texts = in_batches(captions, encoder.encode_texts)
    trusted = np.array([sample.id in seeds for sample in samples])
    min_align = float(choose_min_align(images[trusted], texts[trusted]))

    scored = np.flatnonzero(~trusted)
    images, texts = images[scored], texts[scored]
    pictures = [pictures[i] for i in scored]
    truths = [truth[samples[i].id] for i in scored]
    swapped = np.array([one["swapped"] for one in truths])
    figures = alignment_figures((images * texts).sum(axis=1), swapped, min_align)
    if Path(config.concepts).is_file():
        names, vectors = concept_vectors(config.concepts, encoder)
        own = np.array([names.get(one["concept"], -1) for one in truths])
        true_texts = in_batches([one["true_caption"] for one in truths], encoder.encode_texts)
        figures |= concept_figures(images, true_texts, vectors, own)
    else:
        print(f"no {config.concepts}: figures over concepts are left out (make_sample.py makes it)")
    if config.captioner:
        written = write_captions(config.captioner, [pictures[i] for i in np.flatnonzero(swapped)])
        figures |= caption_figures(written, truths, swapped)
    report(config, figures, len(scored), min_align)
    return 0


def alignment_figures(
    alignment: np.ndarray, swapped: np.ndarray, min_align: float
) -> dict[str, Figure]:
    """How alignment sees the swapped captions; ``(N,)`` both."""
    below = alignment < min_align
    return {
        "AUROC, right against swapped": lambda rows: auroc(alignment[rows], ~swapped[rows]),
        "swapped captions found: precision": lambda rows: detection(below[rows], swapped[rows])[0],
        "swapped captions found: recall": lambda rows: detection(below[rows], swapped[rows])[1],
        "wrong captions before": lambda rows: swapped[rows].mean(),
        "wrong captions among those kept": lambda rows: swapped[rows][~below[rows]].mean(),
        "kept": lambda rows: (~below[rows]).mean(),
        "right captions kept": lambda rows: (~below[rows])[~swapped[rows]].mean(),
    }


def concept_vectors(path: str, encoder: DualEncoder) -> tuple[dict[str, int], np.ndarray]:
    """Each concept's number, and the mean ``(K, D)`` of its captions' features as a unit row."""
    wordings: dict[str, dict[str, None]] = {}
    for entry in load_annotations(path):
        wordings.setdefault(entry["concept"], {}).update(dict.fromkeys(entry["caption"]))
    # A concept has hundreds of wordings; a few dozen give its mean as well.
    chosen = {concept: list(texts)[::4][:48] for concept, texts in wordings.items()}
    features = in_batches(
        [text for texts in chosen.values() for text in texts], encoder.encode_texts
    )
    ends = np.cumsum([len(texts) for texts in chosen.values()])
    means = np.stack([part.mean(axis=0) for part in np.split(features, ends[:-1])])
    numbers = {concept: number for number, concept in enumerate(chosen)}
    return numbers, means / np.linalg.norm(means, axis=1, keepdims=True)


def concept_figures(
    images: np.ndarray, true_texts: np.ndarray, vectors: np.ndarray, own: np.ndarray
) -> dict[str, Figure]:
    """Whether the nearest concept is the right one: of images and of their true captions."""
    by_image = (images @ vectors.T).argmax(axis=1) == own
    by_text = (true_texts @ vectors.T).argmax(axis=1) == own
    return {
        f"image R@1 over {len(vectors)} concepts": lambda rows: by_image[rows].mean(),
        f"caption R@1 over {len(vectors)} concepts": lambda rows: by_text[rows].mean(),
    }


def caption_figures(
    written: Sequence[str], truths: Sequence[dict], swapped: np.ndarray
) -> dict[str, Figure]:
    """How many captions written for the swapped pairs' images name what is drawn.

    A caption's name stands before its first comma; right is any name that a true caption of the
    sample has for the concept.
    """
    names: dict[str, set[str]] = {}
    for one in truths:
        names.setdefault(one["concept"], set()).add(name_of(one["true_caption"]))
    right = np.full(len(truths), np.nan)
    for row, text in zip(np.flatnonzero(swapped), written, strict=True):
        right[row] = name_of(text) in names[truths[row]["concept"]]
    return {"written captions that name the thing": lambda rows: np.nanmean(right[rows])}


def name_of(caption: str) -> str:
    """What a caption calls the thing: its words before the first comma, in lower case."""
    return " ".join(caption.lower().split(",")[0].replace("-", " ").split())


def report(config: ScoreConfig, figures: dict[str, Figure], pairs: int, min_align: float) -> None:
    """Print the figures with their intervals as a table, and write them where asked."""
    everything = np.arange(pairs)
    draws = [generator(0, "resample", i).integers(pairs, size=pairs) for i in range(RESAMPLES)]
    rows = {}
    for name, figure in figures.items():
        low, high = np.quantile([figure(draw) for draw in draws], [0.025, 0.975])
        rows[name] = [round(float(value), 4) for value in (figure(everything), low, high)]
    print(f"{config.encoder} on {pairs} pairs, threshold {min_align:.3f} (auto, from the seeds)")
    print("| figure | value | 95 % interval |\n| --- | --- | --- |")
    for name, (value, low, high) in rows.items():
        print(f"| {name} | {value:.3f} | {low:.3f} … {high:.3f} |")
    if config.output:
        text = json.dumps({"pairs": pairs, "min_align": round(min_align, 4), **rows}, indent=1)
        Path(config.output).write_text(f"{text}\n", encoding="utf-8")


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
    return torch.cat(parts).float().numpy()


if __name__ == "__main__":
    sys.exit(run_script(ScoreConfig, score))
