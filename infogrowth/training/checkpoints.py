"""Checkpoints that survive a kill at any moment: written whole, then pointed at, then the old go.

``OUTPUT_DIR/checkpoints/step_00001200.pth`` holds tensors and plain values only, and the model's
weights under ``model`` by their official names, so it also loads as an official checkpoint.
``latest`` beside it names the newest file that is complete.
"""

import logging
import os
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from infogrowth import distributed
from infogrowth.blip.weights import read_plain
from infogrowth.errors import UserError
from infogrowth.files import atomic_write, remove_leftovers

if TYPE_CHECKING:
    from infogrowth.training.epoch import TrainingState

logger = logging.getLogger(__name__)

FORMAT = 1
POINTER = "latest"
# Keys that may change between a checkpoint and its resume without a word.
_FREE = {
    *("resume", "device", "num_workers", "log_every", "checkpoint_every", "keep_checkpoints"),
    *("max_steps", "tensorboard", "output_dir", "compile", "vit_grad_ckpt", "vit_ckpt_layer"),
}


def save(state: "TrainingState") -> None:
    """Write the newest checkpoint and remove those that are no longer kept, on rank 0: the other
    ranks' state is the same."""
    if not distributed.is_main():
        return
    path = state.checkpoints / f"step_{state.progress.step:08d}.pth"
    with atomic_write(path, "wb") as file:
        torch.save({"format": FORMAT, **state.state_dict()}, file)
    with atomic_write(path.with_name(POINTER), "w") as file:
        file.write(f"{path.name}\n")
    newest_last = sorted(other for other in path.parent.glob("step_*.pth") if other <= path)
    for old in newest_last[: -state.config.keep_checkpoints]:
        old.unlink(missing_ok=True)


def resume(state: "TrainingState") -> None:
    """Load the checkpoint that the option ``resume`` means, if there is one.

    Raises:
        UserError: no such checkpoint, or one that does not fit.
    """
    # Rank 0 looks: on another node the pointer may not have arrived yet.
    path = distributed.on_main(lambda: find(state.checkpoints, state.config.resume))
    if path is None:
        return
    content = load_checkpoint(path)
    state.load_state_dict(content)
    before, now = content["run"], asdict(state.config)
    for key in now.keys() & before.keys() - _FREE:
        if before[key] != now[key]:
            logger.warning("%s was %s in the checkpoint, is %s now", key, before[key], now[key])
    progress = state.progress
    logger.info("resumed %s: epoch %d, step %d", path, progress.epoch, progress.step)


def find(directory: Path, wanted: str) -> Path | None:
    """The checkpoint that ``--resume`` means: auto (of ``directory``), none or a path.

    Raises:
        UserError: no such file; or ``none`` where a run already left checkpoints, which would be
            lost.
    """
    remove_leftovers(directory)
    if wanted == "auto":
        return latest(directory)
    if wanted == "none":
        if latest(directory):
            raise UserError(
                f"{directory} holds an earlier run: give --resume auto, or another --output_dir"
            )
        return None
    path = Path(wanted)
    if path.is_dir():
        path = latest(path / "checkpoints") or latest(path) or path
    if not path.is_file():
        raise UserError(f"there is no checkpoint at {wanted}; check --resume")
    return path


def latest(directory: Path) -> Path | None:
    """The newest complete checkpoint, or None when there is none.

    Raises:
        UserError: the pointer names a file that is gone.
    """
    pointer = directory / POINTER
    if not pointer.is_file():
        return None
    path = directory / pointer.read_text(encoding="utf-8").strip()
    if not path.is_file():
        raise UserError(
            f"{pointer} names {path.name}, which is gone: give --resume PATH, or remove {POINTER}"
        )
    return path


def load_checkpoint(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read a checkpoint of ours onto the CPU; nothing in it is executed.

    Raises:
        UserError: damaged, or not a checkpoint of a training run.
    """
    state = read_plain(path)
    if not isinstance(state, dict) or state.get("format") != FORMAT or "progress" not in state:
        raise UserError(f"{path} is no checkpoint of a run: give weights alone as --pretrained")
    return state
