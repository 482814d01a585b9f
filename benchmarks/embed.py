"""How fast `infogrowth embed` is, and what bounds it: decoding, the model, or their meeting.

python benchmarks/embed.py                               # tiny BLIP, made-up photographs
python benchmarks/embed.py --encoder base --pairs 20000  # BLIP ViT-B/16 224, random weights
python benchmarks/embed.py --encoder NAME --source DIR   # any encoder, real images
"""

import io
import json
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import infogrowth.threads  # noqa: F401 - before torch

import numpy as np
import torch
from PIL import Image

from infogrowth import distributed
from infogrowth.blip.config import preset
from infogrowth.blip.model import BlipDual
from infogrowth.blip.pretrained import save_folder
from infogrowth.blip.text import load_tokenizer
from infogrowth.cli import run_script
from infogrowth.config import option
from infogrowth.data.feature_writer import FeatureWriter
from infogrowth.encoders.dataset import (
    DecodedBatch,
    Pairs,
    SourcePairs,
    decoded_batches,
)
from infogrowth.encoders.embedding import Timing, computed, embed_pairs, threads_for, workers_for
from infogrowth.encoders.loading import load_encoder
from infogrowth.encoders.models import DualEncoder
from infogrowth.files import atomic_write_json
from infogrowth.randomness import generator

_SHARD = 2048
_DIFFERENT_IMAGES = 256


@dataclass(frozen=True)
class Config:
    """Options of the benchmark."""

    encoder: str = option("tiny", help="as for embed; `base` is BLIP ViT-B/16 224, random weights")
    source: str | None = option(None, help="pairs to embed; without it, made-up photographs")
    pairs: int = option(2000, help="how many made-up photographs")
    side: int = option(256, help="their size in pixels, as img2dataset would have stored them")
    batch_size: int = option(64, help="pairs per batch")
    workers: int | Literal["auto"] = option("auto", help="decoding processes")
    device: str = option("auto", help="auto, cpu or cuda")
    json: str | None = option(None, help="write the row to this file too")


class MadeUpImages:
    """A few hundred different JPEGs in memory, over and over: what a photograph costs to decode."""

    def __init__(self, side: int) -> None:
        random = generator(0, "benchmark")
        self._jpegs = [_photograph(random, side) for _ in range(_DIFFERENT_IMAGES)]

    def find(self, name: str) -> bytes:
        return self._jpegs[int(name) % len(self._jpegs)]


def run(config: Config) -> int:
    """Measure embed's pairs per second: decoding alone, the model alone, and both together."""
    with distributed.process_group(config.device) as device, _folders() as (output, models):
        name = random_base(models) if config.encoder == "base" else config.encoder
        encoder = load_encoder(name, device)
        pairs = (
            SourcePairs(config.source)
            if config.source
            else made_up_pairs(config.pairs, config.side)
        )
        workers = workers_for(device) if config.workers == "auto" else config.workers
        decoding = decoding_rate(pairs, encoder, config.batch_size, workers)
        model = model_rate(pairs, encoder, config.batch_size, device)
        identity = {"encoder": {"fingerprint": encoder.fingerprint}}
        destination = FeatureWriter(output, identity, len(pairs.ids), _SHARD)
        result = embed_pairs(pairs, encoder, destination, device, config.batch_size, workers)
        together = result.pairs / result.seconds
        row: dict[str, Any] = {
            "encoder": config.encoder,
            "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
            "threads": threads_for(device),
            "workers": workers,
            "batch_size": config.batch_size,
            "pairs": result.pairs,
            "decode_pairs_per_s": round(decoding, 1),
            "model_pairs_per_s": round(model, 1),
            "embed_pairs_per_s": round(together, 1),
            "share_of_bound": round(together / _bound(decoding, model, device, workers), 3),
            "bound_by": "decoding" if decoding < model else "the model",
        }
    for key, value in row.items():
        print(f"{key:<20} {value}")
    print(json.dumps(row))
    if config.json:
        atomic_write_json(config.json, [row], indent=2)
    return 0


def _bound(decoding: float, model: float, device: torch.device, workers: int) -> float:
    """The best possible rate: the slower of both, or their sum where they share the processor."""
    if device.type == "cuda" and workers:
        return min(decoding, model)
    return 1 / (1 / decoding + 1 / model)


def decoding_rate(table: Pairs, encoder: DualEncoder, batch_size: int, workers: int) -> float:
    """Pairs per second through decoding, preprocessing and tokenizing alone."""
    whole = [(0, range(len(table.ids)))]
    batches = decoded_batches(
        table, encoder.preprocess, encoder.tokenize, whole, batch_size, workers
    )
    started, pairs = time.perf_counter(), 0
    for batch in batches:
        pairs += len(batch.rows)
    return pairs / (time.perf_counter() - started)


def model_rate(table: Pairs, encoder: DualEncoder, batch_size: int, device: torch.device) -> float:
    """Images and texts through the encoder, already decoded, as many as half of the dataset."""
    first = [(0, range(min(2 * batch_size, len(table.ids))))]
    parts = decoded_batches(table, encoder.preprocess, encoder.tokenize, first, batch_size, 0)
    decoded = list(parts)

    def compute(batch: DecodedBatch) -> int:
        encoder.encode_images(batch.images)  # type: ignore[arg-type]
        encoder.encode_tokens(batch.tokens)  # type: ignore[arg-type]
        return len(batch.rows)

    compute(decoded[0])  # kernels are chosen and memory is taken on the first call
    repeated = decoded * max(1, len(table.ids) // (2 * batch_size * len(decoded)))
    started = time.perf_counter()
    pairs = sum(n for _, n in computed(repeated, compute, threads_for(device), Timing()))
    return pairs / (time.perf_counter() - started)


def made_up_pairs(count: int, side: int) -> Pairs:
    """``count`` pairs of photographs of ``side`` pixels."""
    random = generator(1, "benchmark")
    letters = random.integers(97, 123, (2000, 5))
    words = ["".join(map(chr, word)) for word in letters.tolist()]
    captions = [" ".join(words[i] for i in random.integers(0, 2000, 10)) for _ in range(997)]
    entries = [(f"{i:09d}", captions[i % len(captions)], None) for i in range(count)]
    return Pairs(entries, MadeUpImages(side))


def _photograph(random: np.random.Generator, side: int) -> bytes:
    """Smooth shapes with some grain: about as many JPEG bytes per pixel as a real photograph."""
    coarse = Image.fromarray(random.integers(0, 256, (12, 12, 3), dtype=np.uint8))
    smooth = np.asarray(coarse.resize((side, side * 3 // 4), Image.Resampling.BICUBIC), np.int16)
    grain = random.integers(-12, 13, smooth.shape, dtype=np.int16)
    buffer = io.BytesIO()
    Image.fromarray((smooth + grain).clip(0, 255).astype(np.uint8)).save(buffer, "JPEG", quality=92)
    return buffer.getvalue()


def random_base(directory: Path, image_size: int = 224) -> str:
    """BLIP with ViT-B/16 and BERT's number of words, untrained."""
    specials = {0: "[PAD]", 100: "[UNK]", 101: "[CLS]", 102: "[SEP]", 103: "[MASK]"}
    letters = [*"abcdefghijklmnopqrstuvwxyz"]
    pieces = letters + [f"##{a}{b}" for a in letters for b in letters] + [f"##{a}" for a in letters]
    words = dict(enumerate(pieces, start=104)) | specials
    vocabulary = directory / "vocab.txt"
    vocabulary.write_text("".join(f"{words.get(i, f'[unused{i}]')}\n" for i in range(30522)))
    tokenizer = load_tokenizer(vocabulary)
    config = preset("base", image_size=image_size).with_tokenizer(tokenizer)
    save_folder(BlipDual(config), directory / "base", tokenizer)
    return str(directory / "base")


@contextmanager
def _folders() -> Iterator[tuple[Path, Path]]:
    with tempfile.TemporaryDirectory() as top:
        (Path(top) / "models").mkdir()
        yield Path(top) / "features", Path(top) / "models"


if __name__ == "__main__":
    sys.exit(run_script(Config, run))
