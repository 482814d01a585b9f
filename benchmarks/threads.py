"""What the waiting of threads costs, on a quiet machine and beside one busy process.

    python benchmarks/threads.py

Each setting is tried in processes of its own, since OpenMP reads it when torch is loaded.
"""

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Callable

SETTINGS: dict[str, dict[str, str]] = {
    "as `import infogrowth` sets them": {},
    "OpenMP's default": {"GOMP_SPINCOUNT": "300000"},
    "OMP_WAIT_POLICY=passive": {"OMP_WAIT_POLICY": "passive"},
    "one thread": {"OMP_NUM_THREADS": "1"},
}
SECONDS = 6.0  # of each measurement, after a warm-up
BUSY = "while True: pass"


def training() -> tuple[Callable[[], object], int]:
    """A step of the tiny model with BLIP's whole objective, 32 pairs."""
    import torch

    from infogrowth.blip.config import preset
    from infogrowth.blip.pretrain import BlipPretrain

    model = BlipPretrain(preset("tiny", image_size=64, vocab_size=30524), queue_size=512).train()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-4)
    random = torch.Generator().manual_seed(0)
    images = torch.randn(32, 3, 64, 64, generator=random)
    ids = torch.randint(1000, 20_000, (32, 13), generator=random)
    rows = torch.arange(32)

    def step() -> None:
        optimizer.zero_grad()
        losses = model(images, ids, torch.ones_like(ids), 0.4, sample_ids=rows, generator=random)
        sum(losses.values()).backward()
        optimizer.step()

    return step, 32


def embedding() -> tuple[Callable[[], object], int]:
    """A batch of 64 images through the bundled tiny BLIP."""
    import torch

    from infogrowth.encoders.loading import load_encoder

    encoder = load_encoder("tiny", torch.device("cpu"))
    images = torch.randn(64, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    return lambda: encoder.encode_images(images), 64


def growth() -> tuple[Callable[[], object], int]:
    """1,024 pairs of 384 columns onto 20,000 kept ones, searched exactly."""
    import numpy as np

    from infogrowth import InfoGrowth

    random = np.random.default_rng(0)
    grown = InfoGrowth(min_align=-1.0, index="exact", device="cpu")
    grown_pairs = 0

    def grow(count: int) -> None:
        nonlocal grown_pairs
        names = [f"{grown_pairs + number:08d}" for number in range(count)]
        grown_pairs += count
        rows = random.standard_normal((2, count, 384), np.float32)
        grown.process(names, names, *rows)

    grow(20_000)
    return lambda: grow(1024), 1024


TASKS = {"training": training, "embedding": embedding, "growth": growth}


def rate(task: str) -> float:
    """Pairs per second of a task in this process."""
    import infogrowth.threads  # noqa: F401 - before torch

    step, pairs = TASKS[task]()
    for _ in range(3):
        step()
    begun, steps = time.perf_counter(), 0
    while time.perf_counter() - begun < SECONDS:
        step()
        steps += 1
    return steps * pairs / (time.perf_counter() - begun)


def measured(task: str, setting: dict[str, str], busy: bool) -> float:
    """The rate of a task in a process of its own."""
    beside = subprocess.Popen([sys.executable, "-c", BUSY]) if busy else None
    try:
        command = [sys.executable, __file__, "--task", task]
        done = subprocess.run(
            command, env=os.environ | setting, check=True, capture_output=True, text=True
        )
    finally:
        if beside:
            beside.kill()
            beside.wait()
    return float(done.stdout.split()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--task", choices=[*TASKS])
    options = parser.parse_args()
    if options.task:
        print(rate(options.task))
        return
    print("pairs/s, quiet / beside one busy process\n")
    print(f"| | {' | '.join(TASKS)} |\n| --- |{' ---: |' * len(TASKS)}")
    for name, setting in SETTINGS.items():
        cells = [
            f"{measured(task, setting, False):,.0f} / {measured(task, setting, True):,.0f}"
            for task in TASKS
        ]
        print(f"| {name} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
