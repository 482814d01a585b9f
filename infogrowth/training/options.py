"""The options that both programs in train/ have, and what is a function of them: the learning rate,
the contrastive ramp, and the number format of the forward pass."""

import math
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch

from infogrowth.config import option

Vit = Literal["tiny", "base", "large"]
Decay = Literal["step", "cosine"]
PrecisionName = Literal["auto", "fp32", "bf16", "fp16"]
share = partial(option, min=0, max=1)


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """Options of a training run; the names are those of the YAML files and the flags."""

    output_dir: str = option(help="folder for checkpoints, logs and the trained model")
    resume: str = option("auto", "auto (from the last checkpoint, if any), none, or a checkpoint")
    seed: int = option(0, "names every random stream: weights, order, augmentation, dropout")
    device: str = option("auto", "auto, cpu, cuda or cuda:N")
    precision: PrecisionName = option("auto", "forward pass; auto is bf16 on a GPU, fp32 on a CPU")
    compile: bool = option(False, "torch.compile the transformers")
    num_workers: int = option(4, "decoding processes per rank; the order is the same", min=0)
    vit_grad_ckpt: bool = option(False, "recompute image transformer blocks to save memory")
    vit_ckpt_layer: int = option(0, "how many of its last blocks to recompute; 0 is all", min=0)
    max_words: int = option(30, "words of a caption that are kept", min=1)
    queue_size: int = option(57600, "past features that serve as contrastive candidates", min=0)
    momentum: float = share(0.995, "of the momentum encoders")
    alpha: float = share(0.4, "of the momentum model in the contrastive targets")
    max_epoch: int = option(help="epochs", min=1)
    init_lr: float = option(help="learning rate after warm-up", min=0)
    min_lr: float = option(0.0, "learning rate that decay does not go below", min=0)
    weight_decay: float = option(0.05, "of AdamW", min=0)
    gradient_accumulation: int = option(1, "forward passes per optimizer step", min=1)
    compress_gradients: bool = option(False, "ranks exchange gradients in bf16: half the traffic")
    clip_grad_norm: float | None = option(None, "largest gradient norm; none: any", min=1e-9)
    log_every: int = option(50, "optimizer steps between log lines", min=1)
    checkpoint_every: int = option(0, "optimizer steps between checkpoints; 0: epoch ends", min=0)
    keep_checkpoints: int = option(2, "how many of the newest checkpoints stay", min=1)
    max_steps: int | None = option(None, "stop after so many optimizer steps of the run")
    tensorboard: bool = option(True, "write TensorBoard events")


@dataclass(frozen=True)
class Schedule:
    """Warm-up of the learning rate over the first steps, then decay by epoch; the ramp of alpha.

    The formulas are BLIP's. One departure: warm-up counts optimizer steps of the whole run, where
    the paper's code counts them inside epoch 0 only and so jumps when the first epoch is short.

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


class Precision:
    """What a run computes in: weights stay float32, the forward pass may be cast down.

    Args:
        name: ``fp32``, ``bf16``, ``fp16`` (with gradient scaling), or ``auto``: bf16 on a GPU that
            has it, fp32 otherwise. A CPU is 6–15 times slower in bf16, so ``auto`` never picks
            it there.
        device: where the model is.
    """

    def __init__(self, name: PrecisionName, device: torch.device) -> None:
        self.device = device
        if name == "auto":
            has_bf16 = device.type == "cuda" and torch.cuda.is_bf16_supported(
                including_emulation=False  # before Ampere it is slower than fp32
            )
            name = "bf16" if has_bf16 else "fp32"
        self.name = name
        self.scaler = torch.amp.GradScaler(device.type, enabled=name == "fp16")

    def autocast(self) -> AbstractContextManager:
        """The block of a forward pass."""
        dtype = torch.float16 if self.name == "fp16" else torch.bfloat16
        return torch.autocast(self.device.type, dtype=dtype, enabled=self.name != "fp32")
