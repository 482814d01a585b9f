"""The training loop of both trainings: one page that says what happens in which order.

Per optimizer step: forward passes over ``gradient_accumulation`` batches, a look at the losses
(stop when they are not finite), the optimizer step, progress, perhaps a log line, perhaps a
checkpoint. Everything random is named by (seed, rank, forward pass), so a checkpoint needs no
random state, and a resumed run is the uninterrupted one.

Gradient accumulation: the gradient is the mean over the batches of the step. Each forward pass
still updates the momentum encoders (with unchanged weights in between) and writes the queue, as
if the batches were steps of their own; in-batch negatives come from one batch.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field
from itertools import islice
from typing import Any, Protocol

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from infogrowth import distributed
from infogrowth.blip.momentum import MomentumBlip
from infogrowth.errors import UserError
from infogrowth.randomness import torch_generator
from infogrowth.training.checkpointing import Checkpoints
from infogrowth.training.journal import Journal
from infogrowth.training.loading import Batch, EpochBatches
from infogrowth.training.precision import Precision, step_randomness
from infogrowth.training.schedule import Schedule, ramped_alpha


class Losses(Protocol):
    """What a model's forward pass returns: named parts and their sum."""

    @property
    def total(self) -> torch.Tensor: ...


# (model, batch, alpha, generator of negatives) -> losses
Forward = Callable[[nn.Module, Batch, float, torch.Generator], Losses]


@dataclass(frozen=True)
class LoopSettings:
    """How long and how often; see the YAML files for the words."""

    seed: int
    max_epoch: int
    alpha: float
    ramp_epochs: int
    part_names: tuple[str, ...]
    gradient_accumulation: int = 1
    clip_grad_norm: float | None = None
    log_every: int = 50
    checkpoint_every: int = 0
    max_steps: int | None = None


@dataclass
class Progress:
    """Where training is; a checkpoint holds it, and nothing else is needed to go on."""

    epoch: int = 0
    batch: int = 0  # batches of this epoch that are done, per rank
    step: int = 0  # optimizer steps of the run
    forwards: int = 0  # forward passes of the run, per rank
    samples_seen: int = 0  # over all ranks
    epoch_steps: int = 0
    epoch_losses: list[float] = field(default_factory=list)  # sums over the steps of the epoch
    best: dict[str, Any] = field(default_factory=dict)  # the task's own: best epoch so far


class Trainer:
    """A run of training, from wherever ``progress`` stands to its end.

    Args:
        model: on its device; wrapped for several ranks here.
        forward: the task's losses on a batch.
        after_epoch: called on all ranks when an epoch is done, before its checkpoint; returns
            what to log with the epoch.
    """

    def __init__(
        self,
        model: MomentumBlip,
        forward: Forward,
        optimizer: torch.optim.Optimizer,
        schedule: Schedule,
        batches: EpochBatches,
        precision: Precision,
        checkpoints: Checkpoints,
        settings: LoopSettings,
        after_epoch: Callable[["Trainer"], dict[str, Any]] = lambda trainer: {},
    ) -> None:
        self.model, self.forward, self.optimizer = model, forward, optimizer
        self.schedule, self.batches, self.precision = schedule, batches, precision
        self.checkpoints, self.settings, self.after_epoch = checkpoints, settings, after_epoch
        self.progress = Progress()
        self.extra_state: dict[str, Any] = {}  # plain values to keep in every checkpoint
        self.device = precision.device
        self._replicated = self._over_ranks(model)

    def run(self, journal: Journal) -> None:
        """Train to the last epoch, or to ``max_steps``.

        Raises:
            UserError: the loss is not finite, or a sample cannot be read.
        """
        while self.progress.epoch < self.settings.max_epoch and not self._stopped():
            self._run_epoch(journal)

    def planned_batches(self) -> int:
        """Forward passes of the whole run on one rank."""
        return sum(self.batches.count(epoch) for epoch in range(self.settings.max_epoch))

    def done_batches(self) -> int:
        """Forward passes that are done, on one rank."""
        before = sum(self.batches.count(epoch) for epoch in range(self.progress.epoch))
        return before + self.progress.batch

    def state_dict(self) -> dict[str, Any]:
        """Everything that the next step depends on, as tensors and plain values."""
        return {
            **self.extra_state,
            "model": self.model.state_dict(),
            "config": self.model.config.as_dict(),  # the shape, where official files have it
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.precision.scaler.state_dict(),
            "sampler": self.batches.state_dict(self.progress.batch),
            "progress": asdict(self.progress),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go back to a checkpoint.

        Raises:
            UserError: it belongs to another model, annotation file, sampler or seed.
        """
        try:
            self.model.load_state_dict(state["model"])
            self.optimizer.load_state_dict(state["optimizer"])
        except (RuntimeError, ValueError, KeyError) as error:
            reason = " ".join(str(error).split())[:300]
            raise UserError(
                f"the checkpoint does not fit this configuration's model: {reason}"
            ) from error
        if self.precision.scaler.is_enabled() and state["scaler"]:
            self.precision.scaler.load_state_dict(state["scaler"])
        self.progress = Progress(**state["progress"])
        self.progress.batch = self.batches.load_state_dict(state["sampler"])

    def save(self) -> None:
        """Write a checkpoint (rank 0; weights, optimizer and queues are equal on all ranks)."""
        if distributed.is_main():
            self.checkpoints.save(self.state_dict(), self.progress.step)

    def _run_epoch(self, journal: Journal) -> None:
        progress, settings = self.progress, self.settings
        total = self.batches.count(progress.epoch)
        self.model.train()
        batches = self.batches.epoch(progress.epoch, start=progress.batch)
        for window in _windows(batches, settings.gradient_accumulation):
            rate = self.schedule.rate(progress.epoch, progress.step)
            losses = self._optimize(window, rate, total)
            self._count(window, losses)
            journal.batches_done(len(window), _samples(window))
            if progress.step % settings.log_every == 0 or progress.step == 1:
                journal.step(self._record(losses, rate))
            if self._stopped():
                break
            at_mark = settings.checkpoint_every and progress.step % settings.checkpoint_every == 0
            if at_mark and progress.batch < total:
                self.save()
        if progress.batch >= total:
            self._finish_epoch(journal)
        else:
            self.save()

    def _finish_epoch(self, journal: Journal) -> None:
        progress = self.progress
        means = [value / max(progress.epoch_steps, 1) for value in progress.epoch_losses]
        rate = self.optimizer.param_groups[0]["lr"]
        record = {**self._record(means, rate), "steps": progress.epoch_steps}
        journal.epoch({**record, **self.after_epoch(self)})
        progress.epoch, progress.batch = progress.epoch + 1, 0
        progress.epoch_steps, progress.epoch_losses = 0, []
        self.batches.sampler.set_epoch(progress.epoch)
        self.save()

    def _optimize(self, window: list[Batch], rate: float, batches_per_epoch: int) -> list[float]:
        """One optimizer step over the batches of ``window``; returns its mean losses."""
        progress, settings = self.progress, self.settings
        readings = []
        for offset, batch in enumerate(window):
            with self._unsynced(offset < len(window) - 1):
                readings.append(
                    self._forward_backward(batch, offset, len(window), batches_per_epoch)
                )
        losses = torch.stack(readings).mean(dim=0)
        means = distributed.all_reduce_mean(losses).tolist()
        if not all(math.isfinite(value) for value in means):
            self._give_up(means)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        scaler = self.precision.scaler
        if settings.clip_grad_norm is not None:
            scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.model.parameters(), settings.clip_grad_norm)
        scaler.step(self.optimizer)
        scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        progress.step += 1
        return means

    def _forward_backward(
        self, batch: Batch, offset: int, window: int, batches_per_epoch: int
    ) -> torch.Tensor:
        """One forward and backward pass; returns [total, parts…] without gradient."""
        progress, settings = self.progress, self.settings
        stream = (distributed.rank(), progress.forwards + offset)
        alpha = ramped_alpha(
            settings.alpha,
            progress.epoch,
            progress.batch + offset,
            batches_per_epoch,
            settings.ramp_epochs,
        )
        negatives = torch_generator(settings.seed, "negatives", *stream, device=self.device)
        # Backward too: a checkpointed block runs forward again in it.
        with step_randomness(self.device, settings.seed, "dropout", *stream):
            with self.precision.autocast():
                losses = self.forward(self._replicated, batch, alpha, negatives)
            self.precision.scaler.scale(losses.total / window).backward()
        parts = [getattr(losses, name) for name in settings.part_names]
        return torch.stack([losses.total, *parts]).detach()

    def _count(self, window: list[Batch], losses: list[float]) -> None:
        progress = self.progress
        progress.batch += len(window)
        progress.forwards += len(window)
        progress.samples_seen += _samples(window)
        progress.epoch_steps += 1
        sums = progress.epoch_losses or [0.0] * len(losses)
        progress.epoch_losses = [a + b for a, b in zip(sums, losses, strict=True)]

    def _record(self, losses: list[float], rate: float) -> dict[str, Any]:
        names = ("loss", *(f"loss_{name}" for name in self.settings.part_names))
        return {
            "epoch": self.progress.epoch,
            "step": self.progress.step,
            "samples_seen": self.progress.samples_seen,
            "lr": rate,
            **dict(zip(names, losses, strict=True)),
        }

    def _give_up(self, losses: list[float]) -> None:
        names = ("total", *self.settings.part_names)
        told = ", ".join(f"{name} {value:g}" for name, value in zip(names, losses, strict=True))
        raise UserError(
            f"the loss is not finite at step {self.progress.step + 1} of epoch "
            f"{self.progress.epoch} ({told}); the weights were not updated: resume from the last "
            "checkpoint with a lower init_lr, clip_grad_norm, or another precision"
        )

    def _stopped(self) -> bool:
        limit = self.settings.max_steps
        return limit is not None and self.progress.step >= limit

    def _over_ranks(self, model: nn.Module) -> nn.Module:
        if distributed.world_size() == 1:
            return model
        ids = [self.device.index] if self.device.type == "cuda" else None
        # Queues are equal on all ranks by construction: no buffer needs sending round.
        return DistributedDataParallel(model, device_ids=ids, broadcast_buffers=False)

    def _unsynced(self, more_to_come: bool) -> AbstractContextManager:
        """Gradients are exchanged once per optimizer step, with its last batch."""
        if more_to_come and isinstance(self._replicated, DistributedDataParallel):
            return self._replicated.no_sync()
        return nullcontext()


def adamw(model: nn.Module, rate: float, weight_decay: float) -> torch.optim.AdamW:
    """AdamW over all trained parameters in one group, as BLIP has it; fused kernels."""
    trained = [p for p in model.parameters() if p.requires_grad]
    return torch.optim.AdamW(trained, lr=rate, weight_decay=weight_decay, fused=True)


def _windows(batches: Iterator[Batch], size: int) -> Iterator[list[Batch]]:
    """Batches in groups of ``size``, the last of an epoch perhaps smaller."""
    while window := list(islice(batches, size)):
        yield window


def _samples(window: list[Batch]) -> int:
    return sum(len(batch["caption"]) for batch in window) * distributed.world_size()
