"""What a run tells about itself: log.jsonl, TensorBoard, a progress bar, config and versions.

Rank 0 writes; on the other ranks everything here is silent. A resumed run first forgets what was
logged after its checkpoint, because it will live through those steps again.
"""

import json
import logging
import platform
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
import yaml
from tqdm import tqdm

from infogrowth import __version__, distributed
from infogrowth.config import config_as_dict
from infogrowth.errors import UserError
from infogrowth.files import atomic_write, atomic_write_json

log = logging.getLogger(__name__)

_LIBRARIES = ("torch", "torchvision", "transformers", "timm", "fairscale", "numpy", "pillow")


class Journal:
    """The log of one training run.

    Args:
        directory: the run's output folder.
        resumed_at: optimizer steps done by the checkpoint that training goes on from.
        tensorboard: also write TensorBoard events.
        planned_batches: forward passes of the whole run on one rank, for the time left.
    """

    def __init__(
        self,
        directory: str | Path,
        resumed_at: int = 0,
        tensorboard: bool = True,
        planned_batches: int = 0,
        done_batches: int = 0,
    ) -> None:
        self._main = distributed.is_main()
        self._path = Path(directory) / "log.jsonl"
        self._planned, self._done = planned_batches, done_batches
        self._started = self._last = time.monotonic()
        self._first_batches, self._samples = done_batches, 0
        self._writer: Any = None
        if not self._main:
            return
        forget_after(self._path, resumed_at)
        self._file = open(self._path, "a", encoding="utf-8")  # noqa: SIM115 - closed by close()
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(
                str(Path(directory) / "tensorboard"), purge_step=resumed_at + 1
            )
        self._bar = tqdm(
            total=planned_batches or None,
            initial=done_batches,
            unit="batch",
            disable=None if log.isEnabledFor(logging.INFO) else True,
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
            log.info(
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

    def epoch(self, record: dict[str, Any]) -> None:
        """Log a finished epoch: mean losses, or an evaluation."""
        self._write({"kind": "epoch", **record})
        if self._main:
            self._plot(record, "epoch")

    def close(self) -> None:
        """Flush everything to disk."""
        if self._main:
            self._bar.close()
            self._file.close()
            if self._writer is not None:
                self._writer.close()

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
        lived = self._done - self._first_batches
        left = (now - self._started) / max(lived, 1) * max(self._planned - self._done, 0)
        hours, seconds = divmod(int(left), 3600)
        return f"{hours}:{seconds // 60:02d}:{seconds % 60:02d}"


def forget_after(path: Path, step: int) -> None:
    """Drop from a log.jsonl what came after ``step``, and a line that a kill left torn."""
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
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


def read_log(path: str | Path) -> list[dict[str, Any]]:
    """The records of a log.jsonl.

    Raises:
        UserError: there is none.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except FileNotFoundError as error:
        raise UserError(f"there is no training log at {path}") from error
    return [json.loads(line) for line in lines]


def save_circumstances(directory: str | Path, config: Any, device: torch.device) -> None:
    """Write config.yaml (effective; it loads with --config) and versions.json beside the run."""
    if not distributed.is_main():
        return
    with atomic_write(Path(directory) / "config.yaml", "w") as file:
        file.write(yaml.safe_dump(config_as_dict(config), sort_keys=False, allow_unicode=True))
    atomic_write_json(Path(directory) / "versions.json", versions(device), indent=2)


def versions(device: torch.device) -> dict[str, Any]:
    """What the run ran on: Python, libraries, device, ranks."""
    found: dict[str, Any] = {"infogrowth": __version__, "python": platform.python_version()}
    for library in _LIBRARIES:
        try:
            found[library] = version(library)
        except PackageNotFoundError:
            found[library] = None
    found["torch"] = torch.__version__  # tells the build (+cpu, +cu…) too
    is_gpu = device.type == "cuda"
    found["device"] = torch.cuda.get_device_name(device) if is_gpu else platform.machine()
    found["world_size"] = distributed.world_size()
    return found
