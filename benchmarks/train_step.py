"""A pretraining step against a straightforward one, in one run, from image files to weights.

    python benchmarks/train_step.py                                   # tiny model, on a CPU
    python benchmarks/train_step.py --vit base --image_size 224 --batch_size 75 \\
        --queue_size 57600 --precision bf16 --num_workers 12          # ViT-B/16 on a GPU

The straightforward step is the paper's way of doing the same work: float32, negatives drawn row by
row with ``.item()``, texts padded to their full length, the image projected again for each text
that it meets, momentum updated parameter by parameter, an unfused optimizer, one loader worker. On
a GPU the share of its peak is printed too: what the matrix products of the step need, over what
the device could do meanwhile. Then what bounds our step: its rate with a batch that is on the
device already, the loader's rate alone, and how long the device was busy.
"""

import copy
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import infogrowth.threads  # noqa: F401 - before torch

import numpy as np
import torch
from PIL import Image
from torch.autograd import DeviceType
from torch.profiler import profile, supported_activities
from torch.utils.flop_counter import FlopCounterMode

from infogrowth import distributed
from infogrowth.blip.config import preset
from infogrowth.blip.pretrain import BlipPretrain
from infogrowth.cli import run_script
from infogrowth.config import option
from infogrowth.data.datasets import PairDataset
from infogrowth.data.loading import Batch
from infogrowth.data.transforms import TrainingTransform
from infogrowth.growth.sampling import GainSampler
from infogrowth.randomness import generator
from infogrowth.training.epoch import TrainingState, adamw, on_device, optimizer_step
from infogrowth.training.loader import EpochLoader
from infogrowth.training.options import Precision, PrecisionName, RunOptions, Schedule, Vit

# What draws the negatives of a step.
DRAW = "infogrowth.blip.momentum.sample_negatives"
TEXT_LENGTH = 30
IMAGES = 512
EPOCH = 200  # batches: workers have as much ahead of them as in a real run
# Dense matrix products per second at bf16, by a part of the device's name.
PEAKS = {"H100": 989e12, "H200": 989e12, "A100": 312e12, "L4": 121e12, "4090": 165e12}


@dataclass(frozen=True)
class Config:
    """Options of the benchmark."""

    vit: Vit = option("tiny", "size of the model")
    image_size: int = option(64, "pixels a side")
    batch_size: int = option(32, "pairs per step")
    queue_size: int = option(512, "past features that serve as candidates")
    steps: int = option(6, "timed steps per round")
    rounds: int = option(3, "rounds, the two ways in turn; the best round of each counts")
    num_workers: int = option(1, "loader workers of our step")
    device: str = option("auto", "auto, cpu or cuda")
    precision: PrecisionName = option("auto", "of our step")
    compile: bool = option(False, "torch.compile in our step")


class NumberTokens:
    """The step's texts without a vocabulary: captions of 9 to 22 tokens, 13 on average.

    Padded to the longest of the batch, as our training does, or to the full length.
    """

    def __init__(self, longest: bool = True) -> None:
        self.longest = longest
        self.lengths = 9 + generator(0, "lengths").gamma(2.0, 2.0, IMAGES).astype(int).clip(0, 13)

    def __call__(self, captions: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
        rows = torch.tensor([int(caption) for caption in captions])
        lengths = torch.from_numpy(self.lengths)[rows][:, None]
        position = torch.arange(int(lengths.max()) if self.longest else TEXT_LENGTH)
        ids = 1000 + (rows[:, None] * 30 + position) % 20_000
        ids[:, 0] = 101
        ids = ids.where(position < lengths - 1, 102).where(position < lengths, 0)
        return ids, (ids > 0).long()


class StraightforwardBlip(BlipPretrain):
    """The same model computed the straightforward way."""

    @torch.no_grad()
    def update_momentum(self) -> None:
        for online, momentum in self.momentum_pairs:
            pairs = zip(online.parameters(), momentum.parameters(), strict=True)
            for source, target in pairs:
                target.data = target.data * self.momentum + source.data * (1.0 - self.momentum)

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


def negatives_row_by_row(weights_BC: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """As ``sample_negatives``, each draw read back from the device."""
    drawn = [int(torch.multinomial(row, 1, generator=generator)) for row in weights_BC]
    return torch.tensor(drawn, device=weights_BC.device)


def losses(
    model: torch.nn.Module, batch: Batch, alpha: float, negatives: torch.Generator
) -> dict[str, torch.Tensor]:
    """As in train/pretrain_gain.py."""
    inputs = (batch["image"], batch["ids"], batch["mask"], alpha)
    return model(*inputs, sample_ids=batch["index"], generator=negatives)


def make_images(directory: Path) -> None:
    """A folder of JPEG noise at web size, so that decoding costs what it costs."""
    random = generator(0, "images")
    directory.mkdir()
    for number in range(IMAGES):
        small = random.integers(0, 256, (24, 32, 3), dtype=np.uint8)
        image = Image.fromarray(small).resize((400, 300), Image.Resampling.BICUBIC)
        image.save(directory / f"{number:05d}.jpg", quality=90)


def open_loader(
    config: Config, images: Path, workers: int, device: torch.device, longest: bool
) -> EpochLoader:
    """Batches from the folder, augmented."""
    numbers = [n % IMAGES for n in range(EPOCH * config.batch_size)]
    annotations = [{"image": f"{n:05d}", "caption": f"{n}"} for n in numbers]
    transform = TrainingTransform(config.image_size, normalize=False)
    dataset = PairDataset(annotations, str(images), transform)
    gains = generator(0, "gains").random((len(numbers), 2))
    sampler = GainSampler(gains, mode="proportional")
    return EpochLoader(dataset, sampler, NumberTokens(longest), config.batch_size, workers, device)


def endless(loader: EpochLoader) -> Any:
    """Epoch after epoch."""
    for epoch in range(10**6):
        yield from loader.epoch(epoch)


class Ours:
    """The project's own training loop, step by step."""

    def __init__(
        self, config: Config, images: Path, model: BlipPretrain, device: torch.device
    ) -> None:
        if config.compile:
            model.compile_encoders()
        loader = open_loader(config, images, config.num_workers, device, not config.compile)
        self._state = TrainingState(
            model,
            adamw(model, 1e-4, 0.05),
            Schedule("step", 1e-4, 1e-6, 1, ramp_epochs=2),
            loader,
            Precision(config.precision, device),
            RunOptions(output_dir="unused", max_epoch=1, init_lr=1e-4),
        )
        model.train()
        self._stream = endless(loader)
        self._resident: Batch | None = None

    def step(self) -> None:
        """From the image files to new weights."""
        optimizer_step(self._state, [next(self._stream)])

    def step_alone(self) -> None:
        """With a batch that is on the device already."""
        if self._resident is None:
            self._resident = on_device(next(self._stream), self._state.device)
        optimizer_step(self._state, [self._resident])


def loader_rate(config: Config, images: Path, workers: int, device: torch.device) -> float:
    """Pairs per second that so many workers hand over, to a consumer that only takes them."""
    stream = endless(open_loader(config, images, workers, device, longest=True))
    for _ in range(max(2, workers)):  # the first come all at once
        next(stream)
    batches, started = max(2 * workers, 8), time.perf_counter()
    for _ in range(batches):
        next(stream)
    return batches * config.batch_size / (time.perf_counter() - started)


def profiled(step: Callable[[], Any], device: torch.device) -> tuple[dict[str, float], str]:
    """Of one step: seconds, kernels and how long the device ran them; the costliest as a table."""
    with profile(activities=supported_activities()) as profiler:
        seconds = timed(step, 1, device)
    events = profiler.key_averages()
    launched = [
        event
        for event in events
        if event.device_type != DeviceType.CPU and not event.is_user_annotation  # named blocks
    ]
    figures = {
        "seconds": seconds,
        "kernels": sum(event.count for event in launched),
        "device_seconds": sum(event.self_device_time_total for event in launched) / 1e6,
        "operators": sum(e.count for e in events if e.key.startswith("aten::")),
    }
    order = "self_cpu_time_total" if device.type == "cpu" else "self_device_time_total"
    return figures, events.table(sort_by=order, row_limit=15, max_name_column_width=60)


def straightforward(config: Config, images: Path, model: BlipPretrain, device: Any) -> Any:
    """A function that makes one straightforward step."""
    model.train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, weight_decay=0.05, foreach=False)
    stream = endless(open_loader(config, images, 1, device, longest=False))
    negatives = torch.Generator(device=device).manual_seed(0)

    def step() -> float:
        optimizer.zero_grad()
        with mock.patch(DRAW, negatives_row_by_row):
            parts = losses(model, on_device(next(stream), device), 0.4, negatives)
        sum(parts.values()).backward()
        optimizer.step()
        return sum(part.item() for part in parts.values())

    return step


def flops_per_step(model: BlipPretrain, config: Config, device: torch.device) -> int:
    """Operations of the matrix products of one forward and backward pass."""
    ids, mask = NumberTokens()([str(row) for row in range(config.batch_size)])
    images = torch.randn(config.batch_size, 3, config.image_size, config.image_size)
    batch = {"image": images, "ids": ids, "mask": mask, "index": torch.arange(config.batch_size)}
    with FlopCounterMode(display=False) as counter:
        negatives = torch.Generator(device=device)
        sum(losses(model, on_device(batch, device), 0.4, negatives).values()).backward()
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
    size = preset(config.vit, image_size=config.image_size, vocab_size=30524)
    models = {
        "straightforward": StraightforwardBlip(size, queue_size=config.queue_size).to(device),
        "ours": BlipPretrain(size, queue_size=config.queue_size).to(device),
    }
    flops = flops_per_step(copy.deepcopy(models["ours"]), config, device)
    with tempfile.TemporaryDirectory() as folder:
        images = Path(folder) / "images"
        make_images(images)
        mine = Ours(config, images, models["ours"], device)
        ways = {
            "straightforward": straightforward(config, images, models["straightforward"], device),
            "ours": mine.step,
            "step alone": mine.step_alone,
        }
        for step in ways.values():
            timed(step, 2, device)  # warm-up: workers, allocator, compiler
        seconds = dict.fromkeys(ways, float("inf"))
        for _ in range(config.rounds):
            for name, step in ways.items():
                seconds[name] = min(seconds[name], timed(step, config.steps, device))
        loader = loader_rate(config, images, max(1, config.num_workers), device)
        report(config, device, seconds, loader, flops)
        figures, table = profiled(mine.step_alone, device)
    print(", ".join(f"{name} {value:.4g}" for name, value in figures.items()))
    print(table)
    return 0


def report(
    config: Config, device: torch.device, seconds: dict[str, float], loader: float, flops: int
) -> None:
    """Print the table."""
    precision = Precision(config.precision, device).name
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    print(f"{config.vit} {config.image_size} px, batch {config.batch_size}, on {where}")
    print(f"ours: {precision}, {config.num_workers} workers; {torch.get_num_threads()} threads")
    rates = {name: config.batch_size * config.steps / value for name, value in seconds.items()}
    for name, value in (rates | {"loader alone": loader}).items():
        print(f"{name:>16}: {value:8.1f} samples/s")
    print(f"{'bound by':>16}: {bound_by(rates['step alone'], loader)}")
    print(f"{'ratio':>16}: {seconds['straightforward'] / seconds['ours']:8.2f}×")
    peak = next((p for name, p in PEAKS.items() if name in where), None)
    rate = flops * config.steps / seconds["ours"]
    share = f" = {100 * rate / peak:.1f} % of bf16 peak" if peak else ""
    print(f"{'ours':>16}: {rate / 1e12:8.3f} TFLOP/s of matrix products{share}")


def bound_by(step: float, loader: float) -> str:
    """Which of two rates keeps the other waiting."""
    return "the step" if step < loader else "the loader"


if __name__ == "__main__":
    sys.exit(run_script(Config, run))
