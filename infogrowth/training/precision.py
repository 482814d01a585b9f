"""Number formats of the forward pass, and the per-step random state that dropout draws from."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Literal

import torch

from infogrowth.randomness import stream_key

PrecisionName = Literal["auto", "fp32", "bf16", "fp16"]
_TYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


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
        if self.name == "fp32":
            return nullcontext()
        return torch.autocast(self.device.type, dtype=_TYPES[self.name])


@contextmanager
def step_randomness(device: torch.device, seed: int, *stream: int | str) -> Iterator[None]:
    """Within the block torch's global state is a function of ``(seed, stream)``; then as before.

    Dropout and stochastic depth can only draw from the global state. Seeding it per forward pass
    means that no random state has to be saved: a resumed run names the same pass and draws the
    same numbers.
    """
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(stream_key(seed, *stream) % 2**63)
        yield
