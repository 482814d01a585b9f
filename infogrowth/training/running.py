"""One training run from outside: find the checkpoint, keep a journal, train, say where it is."""

import logging
from pathlib import Path

from infogrowth import distributed
from infogrowth.config import config_as_dict
from infogrowth.training.checkpointing import load_checkpoint
from infogrowth.training.journal import Journal, save_circumstances
from infogrowth.training.loop import Trainer
from infogrowth.training.settings import RunOptions

log = logging.getLogger(__name__)

# Keys that may change between a checkpoint and its resume without a word.
_FREE = {
    *("resume", "device", "num_workers", "log_every", "checkpoint_every", "keep_checkpoints"),
    *("max_steps", "tensorboard", "output_dir", "compile", "vit_grad_ckpt", "vit_ckpt_layer"),
}


def carry_out(trainer: Trainer, config: RunOptions) -> None:
    """Train from the checkpoint that ``config.resume`` means to the end.

    Raises:
        UserError: no such checkpoint, one that does not fit, or a loss that is not finite.
    """
    found = trainer.checkpoints.find(config.resume)
    if found is not None:
        state = load_checkpoint(found)
        trainer.load_state_dict(state)
        _tell_changes(state["run"], config)
        progress = trainer.progress
        log.info("resumed %s: epoch %d, step %d", found, progress.epoch, progress.step)
    trainer.extra_state = {"run": config_as_dict(config)}
    save_circumstances(config.output_dir, config, trainer.device)
    journal = Journal(
        config.output_dir,
        resumed_at=trainer.progress.step,
        tensorboard=config.tensorboard,
        planned_batches=trainer.planned_batches(),
        done_batches=trainer.done_batches(),
    )
    try:
        trainer.run(journal)
    finally:
        journal.close()
    distributed.barrier()
    progress = trainer.progress
    log.info(
        "done: %d epochs, %d optimizer steps, %d samples seen; everything is in %s",
        progress.epoch,
        progress.step,
        progress.samples_seen,
        Path(config.output_dir),
    )


def _tell_changes(before: dict, config: RunOptions) -> None:
    now = config_as_dict(config)
    changed = [key for key in now if key not in _FREE and before.get(key, now[key]) != now[key]]
    for key in changed:
        log.warning("%s was %s in the checkpoint, is %s now", key, before[key], now[key])
