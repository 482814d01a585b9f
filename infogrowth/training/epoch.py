"""One epoch of training, the same for both programs in train/.

Per optimizer step: forward passes over ``gradient_accumulation`` batches, the optimizer step,
progress, perhaps a log line, perhaps a checkpoint. The losses are looked at one step late, when the
device is already busy with the next (a run stops when they are not finite), but always before a
checkpoint. Everything random is named by (seed, rank, forward pass), so a checkpoint needs no
random state, and a resumed run is the uninterrupted one.

Gradient accumulation: the gradient is the mean over the batches of the step. Each forward pass
still updates the momentum encoders (with unchanged weights in between) and writes the queue, as
if the batches were steps of their own; in-batch negatives come from one batch.
"""

import math
import sys
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from functools import cache
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import nn

from infogrowth import distributed
from infogrowth.blip.momentum import MomentumBlip
from infogrowth.data.loading import Batch
from infogrowth.data.transforms import normalized
from infogrowth.errors import UserError, shorten
from infogrowth.randomness import stream_key, torch_generator
from infogrowth.training import checkpoints
from infogrowth.training.loader import EpochLoader
from infogrowth.training.logger import Logger
from infogrowth.training.options import Precision, RunOptions, Schedule


@dataclass
class Progress:
    """Where training is; plain values."""

    epoch: int = 0
    batch: int = 0  # batches of this epoch that are done, per rank
    step: int = 0  # optimizer steps of the run
    forwards: int = 0  # forward passes of the run, per rank
    samples_seen: int = 0  # over all ranks
    epoch_steps: int = 0
    epoch_sums: dict[str, float] = field(default_factory=dict)  # losses over those steps
    best: dict[str, Any] = field(default_factory=dict)  # the program's own: best epoch so far


class TrainingState:
    """Everything that the next step depends on; a checkpoint is its :meth:`state_dict`.

    Args:
        model: on its device; wrapped for several ranks here.
    """

    def __init__(
        self,
        model: MomentumBlip,
        optimizer: torch.optim.Optimizer,
        schedule: Schedule,
        loader: EpochLoader,
        precision: Precision,
        config: RunOptions,
    ) -> None:
        self.model, self.optimizer, self.schedule, self.loader = model, optimizer, schedule, loader
        self.precision, self.device, self.config = precision, precision.device, config
        self.checkpoints = Path(config.output_dir) / "checkpoints"
        self.progress = Progress()
        self.parallel = distributed.data_parallel(model, self.device, config.compress_gradients)

    @property
    def rate(self) -> float:
        """The learning rate of the last optimizer step."""
        return self.optimizer.param_groups[0]["lr"]

    @property
    def steps_left(self) -> int:
        """Optimizer steps until ``max_steps``."""
        last = self.config.max_steps
        return (sys.maxsize if last is None else last) - self.progress.step

    @property
    def finished(self) -> bool:
        """Whether nothing is left to do."""
        return self.steps_left <= 0 or self.progress.epoch >= self.config.max_epoch

    @property
    def epoch_done(self) -> bool:
        """Whether all batches of this epoch were trained on."""
        return self.progress.batch >= self.loader.count(self.progress.epoch)

    def batches_left(self) -> int:
        """Forward passes of one rank until ``max_epoch`` or ``max_steps`` ends the run."""
        progress, window = self.progress, self.config.gradient_accumulation
        left, steps, done = 0, self.steps_left, progress.batch
        for epoch in range(progress.epoch, self.config.max_epoch):
            if steps <= 0:
                break
            batches = self.loader.count(epoch) - done
            left += min(batches, steps * window)
            steps, done = steps - math.ceil(batches / window), 0
        return left

    def next_epoch(self) -> None:
        """Go to the start of the next epoch."""
        progress = self.progress
        progress.epoch, progress.batch = progress.epoch + 1, 0
        progress.epoch_steps, progress.epoch_sums = 0, {}
        self.loader.sampler.set_epoch(progress.epoch)

    def state_dict(self) -> dict[str, Any]:
        """Tensors and plain values; weights, optimizer and queues are equal on all ranks."""
        return {
            "model": self.model.state_dict(),
            "config": self.model.config.as_dict(),  # the model's, where official files have it
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.precision.scaler.state_dict(),
            "sampler": self.loader.state_dict(self.progress.batch),
            "progress": asdict(self.progress),
            "run": asdict(self.config),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go back to a checkpoint.

        Raises:
            UserError: it belongs to another model, annotation file, sampler or seed.
        """
        try:
            self.model.load_state_dict(state["model"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.progress = Progress(**state["progress"])
        except (RuntimeError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"the checkpoint is of another model: {shorten(error, 300)}") from error
        if self.precision.scaler.is_enabled() and state["scaler"]:
            self.precision.scaler.load_state_dict(state["scaler"])
        self.progress.batch = self.loader.load_state_dict(state["sampler"])


def adamw(model: nn.Module, rate: float, weight_decay: float) -> torch.optim.AdamW:
    """AdamW over all trained parameters in one group, as BLIP has it; fused kernels."""
    trained = [p for p in model.parameters() if p.requires_grad]
    return torch.optim.AdamW(trained, lr=rate, weight_decay=weight_decay, fused=True)


def train_one_epoch(
    state: TrainingState,
    logger: Logger,
    validate: Callable[[], dict[str, float]] | None = None,
    validate_every: int = 1,
) -> None:
    """Train from where ``state`` is to the end of its epoch, or to ``max_steps``.

    Args:
        validate: recalls in per cent, which are logged after every ``validate_every`` optimizer
            steps and after the run's last.

    Raises:
        UserError: the loss is not finite, or a sample cannot be read.
    """
    progress, config = state.progress, state.config
    last_losses: Callable[[], Any] = dict
    state.model.train()
    batches = state.loader.epoch(progress.epoch, start=progress.batch)
    while window := list(islice(batches, config.gradient_accumulation)):
        losses = optimizer_step(state, window)
        logger.advance()
        last_losses()
        step, ends = progress.step, state.steps_left <= 0 or state.epoch_done
        ends_run = state.steps_left <= 0 or (ends and progress.epoch + 1 >= config.max_epoch)
        log_now = step % config.log_every == 0 or step == 1
        save_now = config.checkpoint_every and step % config.checkpoint_every == 0
        validate_now = validate is not None and (step % validate_every == 0 or ends_run)
        if log_now or save_now or validate_now or ends:
            losses()
        if log_now:
            logger.step(losses())
        if validate is not None and validate_now:
            logger.validation(validate())
        if ends:
            return
        if save_now:
            checkpoints.save(state)
        last_losses = losses


def optimizer_step(state: TrainingState, window: list[Batch]) -> Callable[[], dict[str, float]]:
    """One optimizer step over the batches of ``window``; what reads its losses, means over them and
    all ranks (see :func:`_read_later`). Nothing is read back from the device here.
    """
    progress, scaler = state.progress, state.precision.scaler
    no_sync = getattr(state.parallel, "no_sync", nullcontext)
    readings = []
    for number, batch in enumerate(window, start=1):
        # Ranks exchange gradients once a step.
        with nullcontext() if number == len(window) else no_sync():
            readings.append(forward_backward(state, batch, len(window)))
    for group in state.optimizer.param_groups:
        group["lr"] = state.schedule.rate(progress.epoch, progress.step)
    if state.config.clip_grad_norm is not None:
        scaler.unscale_(state.optimizer)
        nn.utils.clip_grad_norm_(state.model.parameters(), state.config.clip_grad_norm)
    scaler.step(state.optimizer)
    scaler.update()
    state.optimizer.zero_grad(set_to_none=True)
    progress.step += 1
    progress.epoch_steps += 1
    values = torch.stack([torch.stack(list(reading.values())) for reading in readings]).mean(dim=0)
    return _read_later(list(readings[0]), distributed.all_reduce_mean(values), progress)


def forward_backward(
    state: TrainingState, batch: Batch, window: int = 1
) -> dict[str, torch.Tensor]:
    """One forward and backward pass: ``loss``, which is the sum of the model's, and these, on the
    device and without gradient.

    Args:
        window: how many batches the optimizer step has.
    """
    progress, seed = state.progress, state.config.seed
    stream = (distributed.rank(), progress.forwards)
    batches = state.loader.count(progress.epoch)
    alpha = state.schedule.ramped_alpha(progress.epoch, progress.batch, batches)
    negatives = torch_generator(seed, "negatives", *stream, device=state.device)
    batch = on_device(batch, state.device)
    # Dropout and stochastic depth can only draw from torch's global state: here it is a function of
    # the forward pass, so none has to be saved. Backward too: a checkpointed block runs forward
    # again in it.
    with torch.random.fork_rng([state.device] if state.device.type == "cuda" else []):
        torch.manual_seed(stream_key(seed, "dropout", *stream) % 2**63)
        with state.precision.autocast():
            parts = state.parallel(
                batch["image"],
                batch["ids"],
                batch["mask"],
                alpha,
                sample_ids=batch["index"],
                class_ids=batch.get("class"),
                generator=negatives,
            )
            total: torch.Tensor = sum(parts.values())  # type: ignore[assignment]
        state.precision.scaler.scale(total / window).backward()
    progress.batch += 1
    progress.forwards += 1
    progress.samples_seen += len(batch["image"]) * distributed.world_size()
    named = {"loss": total, **{f"loss_{name}": value for name, value in parts.items()}}
    return {name: value.detach() for name, value in named.items()}


def on_device(batch: Batch, device: torch.device) -> Batch:
    """The batch with its tensors on ``device``; images that came as pixels are normalised there."""
    moved = {
        key: value.to(device, non_blocking=True) if torch.is_tensor(value) else value
        for key, value in batch.items()
    }
    if moved["image"].dtype == torch.uint8:
        moved["image"] = normalized(moved["image"])
    return moved


def _read_later(
    names: list[str], values: torch.Tensor, progress: Progress
) -> Callable[[], dict[str, float]]:
    """Send the losses of the step just made to the host; the function that reads them there waits
    for what the device was given before, and not since. When first called it adds them to the
    epoch's sums, or raises a UserError if they are not finite."""
    host = torch.empty(values.shape, dtype=values.dtype, pin_memory=values.is_cuda)
    host.copy_(values, non_blocking=True)
    arrived = torch.cuda.Event() if values.is_cuda else None
    if arrived is not None:
        arrived.record()
    where = f"step {progress.step} of epoch {progress.epoch}"

    @cache
    def read() -> dict[str, float]:
        if arrived is not None:
            arrived.synchronize()
        found = dict(zip(names, host.tolist(), strict=True))
        if not all(math.isfinite(value) for value in found.values()):
            shown = ", ".join(f"{name} {value:g}" for name, value in found.items())
            raise UserError(
                f"the loss is not finite at {where} ({shown}); no checkpoint was written since: "
                "resume from the last with a lower init_lr, clip_grad_norm, or another precision"
            )
        for name, value in found.items():
            progress.epoch_sums[name] = progress.epoch_sums.get(name, 0.0) + value
        return found

    return read
