"""Unit rows as rows of small integers, whose products are the same bits on every device.

A row is turned by a fixed orthogonal matrix (random signs, then Hadamard matrices), so that no
column stands out, multiplied by `scale` and rounded to int8. Sums of products of such integers stay
below 2²⁴, where float32 is exact too: no order of summation, block size or device changes them.
By Cauchy–Schwarz, a product divided by scale² is as near to the cosine as the two roundings were
long: |q·x − q̂·x̂| ≤ |x − x̂| + |q − q̂| |x̂|.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch.nn.functional import pad

from infogrowth.randomness import generator

REACH = 5.75  # standard deviations of a random coordinate that a code can hold
FIXED_POINT = 2.0**16  # rows are turned as integers, in float32 without rounding
ROUNDING = 1 + 2.0**-16  # what float32 adds to the length of an error
PORTION = 512  # rows coded at once, in the cache


class Coder:
    """Codes of unit rows (M, dimension), whose products are cosines times `unit`."""

    def __init__(self, dimension: int, device: torch.device) -> None:
        self.width = -(-dimension // 64) * 64
        self._dimension = dimension
        self._scale = 127 * self.width**0.5 / REACH
        self.unit = self._scale**2
        self._block = min(self.width & -self.width, 256)  # a power of two that divides it
        signs = torch.from_numpy(generator(0, "codes").choice([-1.0, 1.0], (self._block, 1)))
        hadamard = torch.ones((1, 1))
        while len(hadamard) < self._block:
            hadamard = torch.kron(hadamard, torch.tensor([[1.0, 1.0], [1.0, -1.0]]))
        self._turn = (signs.float() * hadamard).to(device)

    def encode(self, rows_MD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Codes (M, width) int8, and how far they are from the rows (M,) float32, rounded up."""
        fixed = pad((rows_MD * FIXED_POINT).round_(), (0, self.width - self._dimension))
        turned = (fixed.view(-1, self._block) @ self._turn).view(fixed.shape)
        turned *= self._scale / FIXED_POINT / self._block**0.5
        codes = turned.round().clamp_(-127, 127)
        error = torch.linalg.vector_norm(turned - codes, dim=1) / self._scale
        return codes.to(torch.int8), (error + self.width**0.5 / FIXED_POINT) * ROUNDING


def multiply(
    left_SD: torch.Tensor, right_RD: torch.Tensor, sizes: list[int] | None = None,
    out_SW: torch.Tensor | None = None,
) -> torch.Tensor:  # fmt: skip
    """Products (S, W) of codes in int32, or of float64 rows. The left ones come in as many parts of
    `sizes` as the right ones in parts of W, and each part is multiplied with its own."""
    sizes = sizes or [len(left_SD)]
    width, device, whole = len(right_RD) // len(sizes), left_SD.device, left_SD.dtype == torch.int8
    if out_SW is None:
        dtype = torch.int32 if whole else left_SD.dtype
        out_SW = torch.empty((len(left_SD), width), dtype=dtype, device=device)
    integers = whole and has_integers(device)
    if whole and not integers:
        left_SD, right_RD = left_SD.float(), right_RD.float()
    rights = right_RD.view(len(sizes), width, -1).transpose(1, 2).unbind()
    for left, right, out in zip(left_SD.split(sizes), rights, out_SW.split(sizes), strict=True):
        if not integers:
            out.copy_(left @ right)
        elif device.type == "cpu" or (len(left) > 16 and width % 8 == 0):  # what cuBLAS multiplies
            torch._int_mm(left, right, out=out)
        else:
            out.copy_(left.float() @ right.float())
    return out_SW


def best_of(keys_NM: torch.Tensor, count: int) -> torch.Tensor:
    """The `count` largest keys of each row, ascending (N, count)."""
    if keys_NM.device.type != "cpu":
        return keys_NM.topk(count).values.flip(1)
    keys = np.partition(keys_NM.numpy(), -count, axis=1)[:, -count:]  # ten times as fast as topk
    return torch.from_numpy(np.sort(keys, axis=1))


def has_integers(device: torch.device) -> bool:
    """Whether this device multiplies int8 faster than float32, and without saturating."""
    supported = getattr(torch.cpu, "_is_vnni_supported", lambda: False)
    return hasattr(torch, "_int_mm") and (device.type == "cuda" or supported())


@contextmanager
def full_precision() -> Iterator[None]:
    """Products in the precision of their factors: training may have allowed less."""
    cuda, cpu = torch.backends.cuda.matmul, torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before: list[tuple[Any, str]] = [(owner, owner.fp32_precision) for owner in (cuda, cpu)]
    for owner, _ in before:
        owner.fp32_precision = "ieee"
    try:
        with torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False):
            yield
    finally:
        for owner, precision in before:
            owner.fp32_precision = precision
