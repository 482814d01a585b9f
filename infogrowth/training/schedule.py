"""Learning rate and contrastive ramp as pure functions of where training is.

The formulas are BLIP's. One departure: warm-up counts optimizer steps of the whole run, where the
paper's code counts them inside epoch 0 only and so jumps when the first epoch is short.
"""

import math
from dataclasses import dataclass
from typing import Literal

Decay = Literal["step", "cosine"]


@dataclass(frozen=True)
class Schedule:
    """Warm-up of the learning rate over the first steps, then decay by epoch; the ramp of alpha.

    Args:
        decay: ``step`` (times ``decay_rate`` per epoch) or ``cosine`` (half of one over the run).
        warmup_steps: optimizer steps, counted over the whole run.
        alpha: the momentum model's final share in the contrastive targets.
        ramp_epochs: epochs over which alpha rises from 0 (BLIP: 2 in pretraining, 1 in retrieval).
    """

    decay: Decay
    init_lr: float
    min_lr: float
    max_epoch: int
    decay_rate: float = 1.0
    warmup_lr: float = 0.0
    warmup_steps: int = 0
    alpha: float = 0.4
    ramp_epochs: int = 0

    def rate(self, epoch: int, step: int) -> float:
        """The rate at optimizer step ``step`` (counted over the whole run) in ``epoch``."""
        if step < self.warmup_steps:  # a line from warmup_lr at step 0
            rise = (self.init_lr - self.warmup_lr) * step / self.warmup_steps
            return min(self.init_lr, self.warmup_lr + rise)
        if self.decay == "cosine":
            height = 0.5 * (1 + math.cos(math.pi * epoch / self.max_epoch))
            return (self.init_lr - self.min_lr) * height + self.min_lr
        return max(self.min_lr, self.init_lr * self.decay_rate**epoch)

    def ramped_alpha(self, epoch: int, batch: int, batches_per_epoch: int) -> float:
        """The momentum model's share at ``batch`` of ``batches_per_epoch`` in ``epoch``."""
        if self.ramp_epochs < 1 or batches_per_epoch < 1:
            return self.alpha
        done = epoch * batches_per_epoch + batch
        return self.alpha * min(1.0, done / (self.ramp_epochs * batches_per_epoch))
