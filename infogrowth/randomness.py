"""Random generators named by what they are for, the same on every rank and every machine.

A generator is a pure function of ``(seed, names…)``: no global state is read or touched, so a
resumed run asks for the same names and gets the same numbers.
"""

import hashlib
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import torch


def stream_key(seed: int, *stream: int | str) -> int:
    """A 128-bit key for ``(seed, stream)``; different names give independent keys."""
    text = repr((int(seed), *(int(s) if not isinstance(s, str) else s for s in stream)))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=16).digest(), "little")


def generator(seed: int, *stream: int | str) -> np.random.Generator:
    """A counter-based (Philox) numpy generator, for example ``generator(0, "sampler", epoch)``."""
    return np.random.Generator(np.random.Philox(key=stream_key(seed, *stream)))


def torch_generator(
    seed: int, *stream: int | str, device: "str | torch.device" = "cpu"
) -> "torch.Generator":
    """A torch generator for the same naming scheme, on ``device``."""
    import torch

    return torch.Generator(device=device).manual_seed(stream_key(seed, *stream) % 2**63)
