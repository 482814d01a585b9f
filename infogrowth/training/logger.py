"""What a run records about itself: log.jsonl, TensorBoard, a progress bar, config and versions.

Rank 0 writes; on the other ranks everything here is silent. A resumed run first drops what was
logged after its checkpoint, because it will live through those steps again.
"""

import json
import logging
import platform
import time
from contextlib import ExitStack, closing, suppress
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import yaml
from tqdm import tqdm

from infogrowth import __version__, distributed
from infogrowth.files import atomic_write, atomic_write_json

if TYPE_CHECKING:
    from infogrowth.training.epoch import TrainingState

logger = logging.getLogger(__name__)

_LIBRARIES = ("torch", "torchvision", "transformers", "timm", "fairscale", "numpy", "pillow")
# What TensorBoard calls the kinds of records.
_GROUPS = {"step": "train", "val": "val", "epoch": "epoch"}


class Logger(ExitStack):
    """The log of one training run; a context manager, which flushes everything to disk.

    At once it writes config.yaml (the effective configuration; it loads with ``--config``) and
    versions.json into the run's output folder.

    Args:
        state: the run, resumed where it is to be resumed.
    """

    def __init__(self, state: "TrainingState") -> None:
        super().__init__()
        config, progress = state.config, state.progress
        self._state, directory = state, Path(config.output_dir)
        self._started = self._last = time.monotonic()
        self._first_batch, self._last_samples = progress.forwards, progress.samples_seen
        self._batches = progress.forwards + state.batches_left()
        self._writer: Any = None
        self._main = distributed.is_main()
        if not self._main:
            return
        with atomic_write(directory / "config.yaml", "w") as file:
            yaml.safe_dump(asdict(config), file, sort_keys=False, allow_unicode=True)
        atomic_write_json(directory / "versions.json", versions(state.device), indent=2)
        _drop_after(directory / "log.jsonl", progress.step)
        self._file = self.enter_context((directory / "log.jsonl").open("a", encoding="utf-8"))
        if config.tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            writer = SummaryWriter(str(directory / "tensorboard"), purge_step=progress.step + 1)
            self._writer = self.enter_context(closing(writer))
        bar = tqdm(
            total=self._batches or None,
            initial=progress.forwards,
            unit="batch",
            disable=None if logger.isEnabledFor(logging.INFO) else True,
        )
        self._bar = self.enter_context(closing(bar))

    def advance(self) -> None:
        """Move the progress bar to where training is."""
        if self._main:
            self._bar.update(self._state.progress.forwards - self._bar.n)

    def step(self, losses: dict[str, float]) -> None:
        """Log an optimizer step: where training is, its losses, and samples per second."""
        progress, now = self._state.progress, time.monotonic()
        rate = (progress.samples_seen - self._last_samples) / max(now - self._last, 1e-9)
        self._last, self._last_samples = now, progress.samples_seen
        self._record("step", **losses, samples_per_s=round(rate, 2))
        shown = " ".join(f"{k.removeprefix('loss_')} {value:.4f}" for k, value in losses.items())
        each = (now - self._started) / max(progress.forwards - self._first_batch, 1)
        logger.info(
            "epoch %d step %d  %s  lr %.2e  %.1f samples/s  %s left",
            *(progress.epoch, progress.step, shown, self._state.rate, rate),
            tqdm.format_interval(each * max(self._batches - progress.forwards, 0)),
        )

    def validation(self, recalls: dict[str, float]) -> None:
        """Log the recalls of a validation, in per cent."""
        self._record("val", **recalls)
        step = self._state.progress.step
        logger.info("validation at step %d: mean recall %.2f", step, recalls["r_mean"])

    def epoch(self, **more: Any) -> None:
        """Log a finished epoch: its mean losses, and ``more`` (an evaluation)."""
        progress = self._state.progress
        means = {k: total / progress.epoch_steps for k, total in progress.epoch_sums.items()}
        self._record("epoch", **means, steps=progress.epoch_steps, **more)

    def done(self) -> None:
        """Print where everything is, at the end of a run."""
        progress, directory = self._state.progress, self._state.config.output_dir
        logger.info(
            "done: %d epochs, %d optimizer steps, %d samples seen; everything is in %s",
            *(progress.epoch, progress.step, progress.samples_seen, directory),
        )

    def _record(self, kind: str, **values: Any) -> None:
        """A line of log.jsonl, its numbers as points of TensorBoard's curves."""
        if not self._main:
            return
        progress = self._state.progress
        position = {key: getattr(progress, key) for key in ("epoch", "step", "samples_seen")}
        if kind != "val":
            values = {"lr": self._state.rate, **values}
        line = {"kind": kind, **position, **values, "time": round(time.time(), 3)}
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()
        for key, value in values.items() if self._writer is not None else ():
            if isinstance(value, int | float):
                group = "speed" if key == "samples_per_s" else _GROUPS[kind]
                self._writer.add_scalar(f"{group}/{key}", value, progress.step)


def _drop_after(path: Path, step: int) -> None:
    """Drop from a log.jsonl what came after ``step``, and a line that a kill left torn."""
    if not path.is_file():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        with suppress(json.JSONDecodeError):
            if json.loads(line)["step"] <= step:
                kept.append(f"{line}\n")
    with atomic_write(path, "w") as file:
        file.writelines(kept)


def versions(device: torch.device) -> dict[str, Any]:
    """What the run ran on: Python, libraries, device, ranks."""
    found: dict[str, Any] = {"infogrowth": __version__, "python": platform.python_version()}
    for library in _LIBRARIES:
        with suppress(PackageNotFoundError):
            found[library] = version(library)
    found["torch"] = torch.__version__  # names the build (+cpu, +cu…) too
    is_gpu = device.type == "cuda"
    found["device"] = torch.cuda.get_device_name(device) if is_gpu else platform.machine()
    found["world_size"] = distributed.world_size()
    return found
