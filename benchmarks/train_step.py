"""A pretraining step against a straightforward one, in one run, from pictures to weights.

    python benchmarks/train_step.py                                   # tiny model, on a CPU
    python benchmarks/train_step.py --vit base --image_size 224 --batch_size 75 \\
        --queue_size 57600 --precision bf16 --num_workers 12          # ViT-B/16 on a GPU

The straightforward step is the paper's way of doing the same work: float32, negatives drawn row by
row with ``.item()``, texts padded to their full length, the image projected again for each text
that it meets, momentum updated parameter by parameter, an unfused optimizer, one loader worker. On
a GPU the share of its peak is printed too: what the matrix products of the step need, over what
the device could do meanwhile.
"""

import copy
import io
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import infogrowth.threads  # noqa: F401 - before torch

import numpy as np
import torch
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode

from infogrowth import distributed
from infogrowth.blip.config import preset
from infogrowth.blip.pretrain import BlipPretrain
from infogrowth.cli import run_script
from infogrowth.config import option
from infogrowth.data.lmdb_store import LmdbWriter
from infogrowth.data.pairs import PairDataset
from infogrowth.data.transforms import training_transform
from infogrowth.growth.sampling import GainSampler
from infogrowth.randomness import generator
from infogrowth.training.checkpointing import Checkpoints
from infogrowth.training.loading import Batch, EpochBatches
from infogrowth.training.loop import LoopSettings, Trainer, adamw
from infogrowth.training.precision import Precision, PrecisionName
from infogrowth.training.schedule import Schedule
from infogrowth.training.settings import Vit

TEXT_LENGTH = 30
PAIRS = 512
# Dense matrix products per second at bf16, by a part of the device's name.
PEAKS = {"H100": 989e12, "H200": 989e12, "A100": 312e12, "L4": 121e12, "4090": 165e12}


@dataclass(frozen=True)
class Config:
    """Options of the benchmark."""

    vit: Vit = option("tiny", "shape of the model")
    image_size: int = option(64, "pixels a side")
    batch_size: int = option(32, "pairs per step")
    queue_size: int = option(512, "past features that serve as candidates")
    steps: int = option(6, "timed steps per round")
    rounds: int = option(3, "rounds, the two ways in turn; the best round of each counts")
    num_workers: int = option(1, "loader workers of our step")
    device: str = option("auto", "auto, cpu or cuda")
    precision: PrecisionName = option("auto", "of our step")
    compile: bool = option(False, "torch.compile in our step")


class NumberForward:
    """The step's inputs without a tokenizer: captions of 9 to 22 tokens, 13 on average.

    Padded to the longest of the batch, as our training does, or to the full length.
    """

    def __init__(self, device: torch.device, longest: bool = True) -> None:
        self.device, self.longest = device, longest
        self.lengths = 9 + generator(0, "lengths").gamma(2.0, 2.0, PAIRS).astype(int).clip(0, 13)

    def __call__(
        self, model: torch.nn.Module, batch: Batch, alpha: float, negatives: torch.Generator
    ) -> Any:
        rows = batch["index"]
        lengths = torch.from_numpy(self.lengths)[rows][:, None]
        place = torch.arange(int(lengths.max()) if self.longest else TEXT_LENGTH)
        ids = 1000 + (rows[:, None] * 30 + place) % 20_000
        ids[:, 0] = 101
        ids = ids.where(place < lengths - 1, 102).where(place < lengths, 0)
        inputs = (batch["image"], ids, (ids > 0).long(), rows)
        images, ids, mask, rows = (x.to(self.device, non_blocking=True) for x in inputs)
        return model(images, ids, mask, alpha, sample_ids=rows, generator=negatives)


class StraightforwardBlip(BlipPretrain):
    """The same model computed the straightforward way."""

    @torch.no_grad()
    def update_momentum(self) -> None:
        for online, slow in self.momentum_pairs:
            for theirs, mine in zip(online.parameters(), slow.parameters(), strict=True):
                mine.data = mine.data * self.momentum + theirs.data * (1.0 - self.momentum)

    def itm_logits(
        self,
        image_tokens_GLW: torch.Tensor,
        ids_NT: torch.Tensor,
        mask_NT: torch.Tensor,
        image_rows_N: torch.Tensor | None = None,
    ) -> torch.Tensor:
        if image_rows_N is not None:
            image_tokens_GLW = image_tokens_GLW[image_rows_N]
        return super().itm_logits(image_tokens_GLW, ids_NT, mask_NT)


def one_by_one(weights_BG: torch.Tensor, negatives: torch.Generator | None) -> torch.Tensor:
    """A negative per row, each drawn by itself and read back from the device."""
    chosen = [int(torch.multinomial(row, 1, generator=negatives).item()) for row in weights_BG]
    return torch.tensor(chosen, device=weights_BG.device)


def make_pictures(directory: Path) -> None:
    """An LMDB of JPEG noise at web size, so that decoding costs what it costs."""
    random = generator(0, "pictures")
    with LmdbWriter(directory) as writer:
        for number in range(PAIRS):
            small = random.integers(0, 256, (24, 32, 3), dtype=np.uint8)
            picture = Image.fromarray(small).resize((400, 300), Image.Resampling.BICUBIC)
            buffer = io.BytesIO()
            picture.save(buffer, "JPEG", quality=90)
            writer.put(f"{number:05d}", buffer.getvalue())


def open_batches(config: Config, pictures: Path, workers: int, device: torch.device) -> Any:
    """Endless enough batches from the LMDB, augmented."""
    annotations = [{"image": f"{n:05d}", "caption": "a picture"} for n in range(PAIRS)]
    dataset = PairDataset(annotations, str(pictures), training_transform(config.image_size))
    gains = generator(0, "gains").random((PAIRS, 2))
    sampler = GainSampler(gains, mode="proportional")
    return EpochBatches(dataset, sampler, config.batch_size, workers, device)


def endless(batches: EpochBatches) -> Any:
    """Epoch after epoch."""
    for epoch in range(10**6):
        yield from batches.epoch(epoch)


def ours(config: Config, pictures: Path, model: BlipPretrain, device: torch.device) -> Any:
    """A function that makes one step of the project's own training loop."""
    if config.compile:
        model.compile_encoders()
    batches = open_batches(config, pictures, config.num_workers, device)
    trainer = Trainer(
        model=model,
        forward=NumberForward(device, longest=not config.compile),
        optimizer=adamw(model, 1e-4, 0.05),
        schedule=Schedule("step", 1e-4, 1e-6, 1),
        batches=batches,
        precision=Precision(config.precision, device),
        checkpoints=Checkpoints(pictures.parent / "none"),
        settings=LoopSettings(0, 1, 0.4, 2, ("ita", "itm", "lm")),
    )
    model.train()
    stream = endless(batches)
    return lambda: trainer._optimize([next(stream)], 1e-4, 1000)


def straightforward(config: Config, pictures: Path, model: BlipPretrain, device: Any) -> Any:
    """A function that makes one straightforward step."""
    model.choose_negatives = one_by_one
    model.train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, weight_decay=0.05, foreach=False)
    forward = NumberForward(device, longest=False)
    stream = endless(open_batches(config, pictures, 1, device))
    negatives = torch.Generator(device=device).manual_seed(0)

    def step() -> float:
        optimizer.zero_grad()
        losses = forward(model, next(stream), 0.4, negatives)
        losses.total.backward()
        optimizer.step()
        return sum(part.item() for part in (losses.ita, losses.itm, losses.lm))

    return step


def flops_per_step(model: BlipPretrain, config: Config, device: torch.device) -> int:
    """Operations of the matrix products of one forward and backward pass."""
    batch = {
        "image": torch.randn(config.batch_size, 3, config.image_size, config.image_size),
        "index": torch.arange(config.batch_size),
    }
    with FlopCounterMode(display=False) as counter:
        negatives = torch.Generator(device=device)
        losses = NumberForward(device)(model, batch, 0.4, negatives)
        losses.total.backward()
    model.zero_grad(set_to_none=True)
    return counter.get_total_flops()


def timed(step: Any, steps: int, device: torch.device) -> float:
    """Seconds of ``steps`` steps."""
    started = time.perf_counter()
    for _ in range(steps):
        step()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


def run(config: Config) -> int:
    """Time both ways of the same training step, and print their ratio."""
    device = distributed.choose_device(config.device)
    shape = preset(config.vit, image_size=config.image_size, vocab_size=30524)
    models = {
        "straightforward": StraightforwardBlip(shape, queue_size=config.queue_size).to(device),
        "ours": BlipPretrain(shape, queue_size=config.queue_size).to(device),
    }
    flops = flops_per_step(copy.deepcopy(models["ours"]), config, device)
    with tempfile.TemporaryDirectory() as folder:
        pictures = Path(folder) / "lmdb"
        make_pictures(pictures)
        ways = {
            "straightforward": straightforward(config, pictures, models["straightforward"], device),
            "ours": ours(config, pictures, models["ours"], device),
        }
        for step in ways.values():
            timed(step, 2, device)  # warm-up: workers, allocator, compiler
        seconds = dict.fromkeys(ways, float("inf"))
        for _ in range(config.rounds):
            for name, step in ways.items():
                seconds[name] = min(seconds[name], timed(step, config.steps, device))
    report(config, device, seconds, flops)
    return 0


def report(config: Config, device: torch.device, seconds: dict[str, float], flops: int) -> None:
    """Print the table."""
    precision = Precision(config.precision, device).name
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    print(f"{config.vit} {config.image_size} px, batch {config.batch_size}, on {where}")
    print(f"ours: {precision}, {config.num_workers} workers; {torch.get_num_threads()} threads")
    for name, value in seconds.items():
        print(f"{name:>16}: {config.batch_size * config.steps / value:8.1f} samples/s")
    print(f"{'ratio':>16}: {seconds['straightforward'] / seconds['ours']:8.2f}×")
    peak = next((p for name, p in PEAKS.items() if name in where), None)
    rate = flops * config.steps / seconds["ours"]
    share = f" = {100 * rate / peak:.1f} % of bf16 peak" if peak else ""
    print(f"{'ours':>16}: {rate / 1e12:8.3f} TFLOP/s of matrix products{share}")


if __name__ == "__main__":
    sys.exit(run_script(Config, run))
