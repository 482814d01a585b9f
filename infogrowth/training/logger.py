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
# What TensorBoard calls the kinds of records; a record's position is not a curve.
_GROUPS = {"step": "train", "val": "val", "epoch": "epoch"}
_POSITION = ("epoch", "step", "samples_seen")


class Logger:
    """The log of one training run; a context manager.

    At once it writes config.yaml (the effective configuration; it loads with ``--config``) and
    versions.json into the run's output folder.

    Args:
        state: the run, resumed where it is to be resumed.
    """

    def __init__(self, state: "TrainingState") -> None:
        config, step = state.config, state.progress.step
        self._state, directory = state, Path(config.output_dir)
        self._done, self._planned = state.batches()
        self._started = self._last = time.monotonic()
        self._done_at_start, self._samples = self._done, 0
        self._writer: Any = None
        self._main = distributed.is_main()
        if not self._main:
            return
        with atomic_write(directory / "config.yaml", "w") as file:
            yaml.safe_dump(asdict(config), file, sort_keys=False, allow_unicode=True)
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
        """Flush everything to disk; at the end of a run print where everything is."""
        if self._main:
            self._bar.close()
            self._file.close()
            if self._writer is not None:
                self._writer.close()
        progress, directory = self._state.progress, self._state.config.output_dir
        if kind is None:
            logger.info(
                "done: %d epochs, %d optimizer steps, %d samples seen; everything is in %s",
                *(progress.epoch, progress.step, progress.samples_seen, directory),
            )

    def batches_done(self, batches: int, samples: int) -> None:
        """Count forward passes of this rank, and samples of all ranks."""
        self._done += batches
        self._samples += samples
        if self._main:
            self._bar.update(batches)

    def step(self, losses: dict[str, float]) -> None:
        """Log an optimizer step: where training is, its losses, and samples per second."""
        now = time.monotonic()
        rate = self._samples / max(now - self._last, 1e-9)
        self._last, self._samples = now, 0
        record = {**self._state.position(), **losses}
        shown = " ".join(f"{k.removeprefix('loss_')} {value:.4f}" for k, value in losses.items())
        self._record("step", {**record, "samples_per_s": round(rate, 2)})
        each = (now - self._started) / max(self._done - self._done_at_start, 1)
        logger.info(
            "epoch %d step %d  %s  lr %.2e  %.1f samples/s  %s left",
            *(record["epoch"], record["step"], shown, record["lr"], rate),
            tqdm.format_interval(each * max(self._planned - self._done, 0)),
        )

    def validation(self, recalls: dict[str, float]) -> None:
        """Log the recalls of a validation, in per cent."""
        where = {key: self._state.position()[key] for key in _POSITION}
        self._record("val", {**where, **recalls})
        logger.info("validation at step %d: mean recall %.2f", where["step"], recalls["r_mean"])

    def epoch(self, **more: Any) -> None:
        """Log a finished epoch: its mean losses, and ``more`` (an evaluation)."""
        progress = self._state.progress
        means = {k: total / progress.epoch_steps for k, total in progress.epoch_sums.items()}
        steps = {"steps": progress.epoch_steps}
        self._record("epoch", {**self._state.position(), **means, **steps, **more})

    def _record(self, kind: str, record: dict[str, Any]) -> None:
        """A line of log.jsonl, its numbers as points of TensorBoard's curves."""
        if not self._main:
            return
        line = {"kind": kind, **record, "time": round(time.time(), 3)}
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()
        for key, value in record.items() if self._writer is not None else ():
            if isinstance(value, int | float) and key not in _POSITION:
                group = "speed" if key == "samples_per_s" else _GROUPS[kind]
                self._writer.add_scalar(f"{group}/{key}", value, record["step"])


def _drop_after(path: Path, step: int) -> None:
    """Drop from a log.jsonl what came after ``step``, and a line that a kill left torn."""
    if not path.is_file():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            if json.loads(line)["step"] <= step:
                kept.append(f"{line}\n")
        except json.JSONDecodeError:
            continue
    with atomic_write(path, "w") as file:
        file.write("".join(kept))


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
