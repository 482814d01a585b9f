"""Checkpoints that survive a kill at any moment: written whole, then pointed at, then the old go.

``OUTPUT_DIR/checkpoints/step_00001200.pth`` holds tensors and plain values only, and the model's
weights under ``model`` by their official names, so it also loads as an official checkpoint.
``latest`` beside it names the newest file that is complete.
"""

import logging
import os
import pickle
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from infogrowth import distributed
from infogrowth.errors import UserError
from infogrowth.files import atomic_write, remove_leftovers

if TYPE_CHECKING:
    from infogrowth.training.epoch import TrainingState
    from infogrowth.training.options import RunOptions

logger = logging.getLogger(__name__)

FORMAT = 1
POINTER = "latest"
# Keys that may change between a checkpoint and its resume without a word.
_FREE = {
    *("resume", "device", "num_workers", "log_every", "checkpoint_every", "keep_checkpoints"),
    *("max_steps", "tensorboard", "output_dir", "compile", "vit_grad_ckpt", "vit_ckpt_layer"),
}


class Checkpoints:
    """The checkpoints of one run.

    Args:
        directory: where they are; made when first needed.
        keep: how many of the newest stay.
    """

    def __init__(self, directory: str | os.PathLike[str], keep: int = 2) -> None:
        if keep < 1:
            raise UserError(f"keep_checkpoints must be at least 1, not {keep}")
        self.directory, self.keep = Path(directory), keep

    def latest(self) -> Path | None:
        """The newest complete checkpoint, or None when there is none.

        Raises:
            UserError: the pointer names a file that is gone.
        """
        pointer = self.directory / POINTER
        if not pointer.is_file():
            return None
        path = self.directory / pointer.read_text(encoding="utf-8").strip()
        if not path.is_file():
            raise UserError(
                f"{pointer} names {path.name}, which is gone; restore it, give --resume PATH, "
                f"or remove {pointer} to start anew"
            )
        return path

    def save(self, state: "TrainingState") -> None:
        """Write a checkpoint on rank 0; the other ranks' state is the same."""
        if distributed.is_main():
            self.write(state.state_dict(), state.progress.step)

    def resume(self, state: "TrainingState", resume: str) -> None:
        """Load the checkpoint that ``resume`` means (see :meth:`find`), if there is one.

        Raises:
            UserError: no such checkpoint, or one that does not fit.
        """
        path = self.find(resume)
        if path is None:
            return
        content = load_checkpoint(path)
        state.load_state_dict(content)
        _report_changes(content["run"], state.config)
        progress = state.progress
        logger.info("resumed %s: epoch %d, step %d", path, progress.epoch, progress.step)

    def write(self, state: dict[str, Any], step: int) -> Path:
        """Write ``state`` as the newest checkpoint."""
        name = f"step_{step:08d}.pth"
        with atomic_write(self.directory / name, "wb") as file:
            torch.save({"format": FORMAT, **state}, file)
        with atomic_write(self.directory / POINTER, "w") as file:
            file.write(f"{name}\n")
        self._remove_old(newest=name)
        return self.directory / name

    def find(self, resume: str) -> Path | None:
        """The checkpoint that ``--resume`` means (auto, none or a path); all ranks agree.

        Raises:
            UserError: no such file; or ``none`` where a run already left checkpoints, which would
                be lost.
        """
        # Rank 0 looks: on another node the pointer may not have arrived yet.
        answer = self._look(resume) if distributed.is_main() else None
        path, error = distributed.broadcast_object(answer)
        if error:
            raise UserError(error)
        return path

    def _look(self, resume: str) -> tuple[Path | None, str | None]:
        try:
            remove_leftovers(self.directory)
            if resume == "auto":
                return self.latest(), None
            if resume != "none":
                path = Path(resume)
                if path.is_dir():
                    inner = path / "checkpoints"
                    path = Checkpoints(inner if inner.is_dir() else path).latest() or path
                if not path.is_file():
                    return None, f"there is no checkpoint at {resume}; check --resume"
                return path, None
            if self.latest():
                return None, (
                    f"{self.directory} holds checkpoints of an earlier run; resume it with "
                    "--resume auto, give another --output_dir, or remove them"
                )
            return None, None
        except UserError as error:
            return None, str(error)

    def _remove_old(self, newest: str) -> None:
        names = sorted(p.name for p in self.directory.glob("step_*.pth") if p.name <= newest)
        for name in names[: -self.keep]:
            (self.directory / name).unlink(missing_ok=True)


def load_checkpoint(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read a checkpoint of ours onto the CPU; nothing in it is executed.

    Raises:
        UserError: damaged, or not a checkpoint of a training run.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, pickle.UnpicklingError, EOFError, OSError, KeyError) as error:
        raise UserError(
            f"the checkpoint {path} cannot be read ({type(error).__name__}); "
            "resume from an earlier one with --resume PATH"
        ) from error
    if not isinstance(state, dict) or state.get("format") != FORMAT or "progress" not in state:
        raise UserError(
            f"{path} is not a checkpoint of a training run; to start from weights alone, give "
            "them as --pretrained"
        )
    return state


def _report_changes(before: dict[str, Any], config: "RunOptions") -> None:
    now = asdict(config)
    changed = [key for key in now if key not in _FREE and before.get(key, now[key]) != now[key]]
    for key in changed:
        logger.warning("%s was %s in the checkpoint, is %s now", key, before[key], now[key])
