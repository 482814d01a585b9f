"""What a run records about itself: log.jsonl, TensorBoard, a progress bar, config and versions.

Rank 0 writes; on the other ranks everything here is silent. A resumed run first drops what was
logged after its checkpoint, because it will live through those steps again.
"""

import json
import logging
import platform
import time
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


class Logger:
    """The log of one training run; a context manager.

    At once it writes config.yaml (the effective configuration; it loads with ``--config``) and
    versions.json into the run's output folder.

    Args:
        state: the run, resumed where it is to be resumed.
    """

    def __init__(self, state: "TrainingState") -> None:
        config, step = state.config, state.progress.step
        self._state = state
        directory = Path(config.output_dir)
        self._main = distributed.is_main()
        self._done, self._planned = state.batches()
        self._started = self._last = time.monotonic()
        self._done_at_start, self._samples = self._done, 0
        self._writer: Any = None
        if not self._main:
            return
        with atomic_write(directory / "config.yaml", "w") as file:
            file.write(yaml.safe_dump(asdict(config), sort_keys=False, allow_unicode=True))
        atomic_write_json(directory / "versions.json", versions(state.device), indent=2)
        _drop_after(directory / "log.jsonl", step)
        self._file = open(directory / "log.jsonl", "a", encoding="utf-8")  # noqa: SIM115
        if config.tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(str(directory / "tensorboard"), purge_step=step + 1)
        self._bar = tqdm(
            total=self._planned or None,
            initial=self._done,
            unit="batch",
            disable=None if logger.isEnabledFor(logging.INFO) else True,
        )

    def __enter__(self) -> "Logger":
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        """Flush everything to disk; at the end of a run say where everything is."""
        if self._main:
            self._bar.close()
            self._file.close()
            if self._writer is not None:
                self._writer.close()
        progress = self._state.progress
        if kind is None:
            logger.info(
                "done: %d epochs, %d optimizer steps, %d samples seen; everything is in %s",
                progress.epoch,
                progress.step,
                progress.samples_seen,
                self._state.config.output_dir,
            )

    def batches_done(self, batches: int, samples: int) -> None:
        """Count forward passes of this rank, and samples of all ranks."""
        self._done += batches
        self._samples += samples
        if self._main:
            self._bar.update(batches)

    def step(self, record: dict[str, Any]) -> None:
        """Log an optimizer step: its record gets kind, samples_per_s and time."""
        now = time.monotonic()
        rate = self._samples / max(now - self._last, 1e-9)
        self._last, self._samples = now, 0
        self._write({"kind": "step", **record, "samples_per_s": round(rate, 2)})
        if self._main:
            losses = " ".join(
                f"{key.removeprefix('loss_')} {value:.4f}"
                for key, value in record.items()
                if key.startswith("loss")
            )
            logger.info(
                "epoch %d step %d  %s  lr %.2e  %.1f samples/s  %s left",
                record["epoch"],
                record["step"],
                losses,
                record["lr"],
                rate,
                self._time_left(now),
            )
            self._plot(record, "train")
            self._plot({"samples_per_s": rate, "step": record["step"]}, "speed")

    def validation(self, state: "TrainingState", recalls: dict[str, float]) -> None:
        """Log the recalls of a validation, in per cent."""
        progress = state.progress
        where = {"step": progress.step, "samples_seen": progress.samples_seen}
        self._write({"kind": "val", "epoch": progress.epoch, **where, **recalls})
        if self._main:
            logger.info("validation at step %d: mean recall %.2f", progress.step, recalls["r_mean"])
            self._plot({**where, **recalls}, "val")

    def epoch(self, record: dict[str, Any]) -> None:
        """Log a finished epoch: mean losses, an evaluation."""
        self._write({"kind": "epoch", **record})
        if self._main:
            self._plot(record, "epoch")

    def _write(self, record: dict[str, Any]) -> None:
        if self._main:
            self._file.write(json.dumps({**record, "time": round(time.time(), 3)}) + "\n")
            self._file.flush()

    def _plot(self, record: dict[str, Any], group: str) -> None:
        if self._writer is None:
            return
        for key, value in record.items():
            if isinstance(value, int | float) and key not in ("epoch", "step", "samples_seen"):
                self._writer.add_scalar(f"{group}/{key}", value, record["step"])

    def _time_left(self, now: float) -> str:
        done_here = max(self._done - self._done_at_start, 1)
        left = (now - self._started) / done_here * max(self._planned - self._done, 0)
        hours, seconds = divmod(int(left), 3600)
        return f"{hours}:{seconds // 60:02d}:{seconds % 60:02d}"


def _drop_after(path: Path, step: int) -> None:
    """Drop from a log.jsonl what came after ``step``, and a line that a kill left torn."""
    if not path.is_file():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            continue
        if record["step"] <= step:
            kept.append(line)
    with atomic_write(path, "w") as file:
        file.write("".join(f"{line}\n" for line in kept))


def versions(device: torch.device) -> dict[str, Any]:
    """What the run ran on: Python, libraries, device, ranks."""
    found: dict[str, Any] = {"infogrowth": __version__, "python": platform.python_version()}
    for library in _LIBRARIES:
        try:
            found[library] = version(library)
        except PackageNotFoundError:
            found[library] = None
    found["torch"] = torch.__version__  # names the build (+cpu, +cu…) too
    is_gpu = device.type == "cuda"
    found["device"] = torch.cuda.get_device_name(device) if is_gpu else platform.machine()
    found["world_size"] = distributed.world_size()
    return found
