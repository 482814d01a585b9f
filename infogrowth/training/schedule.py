"""Learning rate and contrastive ramp as pure functions of where training is.

The formulas are BLIP's. One departure: warm-up counts optimizer steps of the whole run, where the
paper's code counts them inside epoch 0 only and so jumps when the first epoch is short.
"""

import math
from dataclasses import dataclass
from typing import Literal

Decay = Literal["step", "cosine"]


def warmup_rate(step: int, warmup_steps: int, warmup_lr: float, init_lr: float) -> float:
    """A line from ``warmup_lr`` at step 0 to ``init_lr`` at ``warmup_steps``, then flat."""
    return min(init_lr, warmup_lr + (init_lr - warmup_lr) * step / max(warmup_steps, 1))


def step_rate(epoch: int, init_lr: float, min_lr: float, decay_rate: float) -> float:
    """``init_lr`` times ``decay_rate`` once per epoch, not below ``min_lr``."""
    return max(min_lr, init_lr * decay_rate**epoch)


def cosine_rate(epoch: int, max_epoch: int, init_lr: float, min_lr: float) -> float:
    """Half a cosine from ``init_lr`` at epoch 0 to ``min_lr`` at ``max_epoch``."""
    return (init_lr - min_lr) * 0.5 * (1 + math.cos(math.pi * epoch / max_epoch)) + min_lr


def ramped_alpha(
    alpha: float, epoch: int, batch: int, batches_per_epoch: int, ramp_epochs: int
) -> float:
    """The momentum model's share in the contrastive targets, rising from 0 over the first epochs.

    Args:
        alpha: its final value.
        epoch, batch: where training is; ``batch`` of ``batches_per_epoch``.
        ramp_epochs: 2 in pretraining, 1 in retrieval fine-tuning.
    """
    if ramp_epochs < 1 or batches_per_epoch < 1:
        return alpha
    done = epoch * batches_per_epoch + batch
    return alpha * min(1.0, done / (ramp_epochs * batches_per_epoch))


@dataclass(frozen=True)
class Schedule:
    """The learning rate of a run: warm-up over its first steps, then decay by epoch."""

    decay: Decay
    init_lr: float
    min_lr: float
    max_epoch: int
    decay_rate: float = 1.0
    warmup_lr: float = 0.0
    warmup_steps: int = 0

    def rate(self, epoch: int, step: int) -> float:
        """The rate at optimizer step ``step`` (counted over the whole run) in ``epoch``."""
        if step < self.warmup_steps:
            return warmup_rate(step, self.warmup_steps, self.warmup_lr, self.init_lr)
        if self.decay == "cosine":
            return cosine_rate(epoch, self.max_epoch, self.init_lr, self.min_lr)
        return step_rate(epoch, self.init_lr, self.min_lr, self.decay_rate)
