"""Products that take less time than float32 ones of all columns, and still miss no winner.

Each form keeps a smaller copy of the rows. The product of a query with it, plus a bound that is
proven below, is no less than their cosine. Rows that this leaves in question are multiplied again.

* `HalfRows`: 16-bit floats, where the device multiplies them faster (GPUs, recent CPUs).
* `LeadingRows`: the M leading principal directions, and the length of the rest. With q = q₁ + q₂
  and x = x₁ + x₂, q·x ≤ q₁·x₁ + |q₂| |x₂| (Cauchy–Schwarz): M + 1 columns in place of D. Half of
  the columns of real embeddings leave one row in a thousand in question.
"""

from __future__ import annotations

from typing import Protocol

import torch

from infogrowth.neighbors.store import RowStore

SHARE_OF_LENGTH = 0.945  # of the squared length that the leading directions must hold on average
MAX_SHARE = 0.6  # of the columns, beyond which the bound does not pay


def summation_error(dimension: int) -> float:
    """How far a float32 dot product of unit rows can be off, summed in any order (Higham)."""
    unit = 2.0**-24
    return dimension * unit / (1 - dimension * unit) * (1 + 1e-5)


class FastRows(Protocol):
    """A copy of rows for fast products."""

    store: RowStore

    def extend(self, rows_MD: torch.Tensor) -> None:
        """Add a copy of float32 unit rows."""

    def queries(self, queries_ND: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Queries to be multiplied with the copies (N, W), and how far a cosine can lie above the
        product (N,) float32."""


class HalfRows:
    """Rows in float16 or bfloat16."""

    def __init__(self, dimension: int, dtype: torch.dtype, device: torch.device) -> None:
        self.store = RowStore(dimension, dtype, device)
        self._rounding = 0.0  # the largest distance of a row from its copy

    def extend(self, rows_MD: torch.Tensor) -> None:
        halves_MD = rows_MD.to(self.store.dtype)
        self._rounding = max(self._rounding, float(_rounding(rows_MD, halves_MD).max()))
        self.store.extend(halves_MD)

    def queries(self, queries_ND: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """q·x = q̂·x̂ + q̂·(x − x̂) + (q − q̂)·x, and the score is q̂·x̂ summed in float32 (tensor
        cores truncate, which doubles the error) and rounded to 16 bits."""
        halves_ND = queries_ND.to(self.store.dtype)
        rounding_N = _rounding(queries_ND, halves_ND)
        half_unit = torch.finfo(self.store.dtype).eps / 2
        bound_N = (self._rounding * (1 + rounding_N) + rounding_N) * (1 + 1e-5)
        bound_N += 2 * summation_error(self.store.width) + 1.02 * half_unit / (1 - half_unit)
        return halves_ND, bound_N


class LeadingRows:
    """The leading principal directions of rows, learned from `rows_MD`."""

    def __init__(self, rows_MD: torch.Tensor) -> None:
        rows_MD = rows_MD.double()
        self._dimension = rows_MD.shape[1]
        values, vectors_DD = torch.linalg.eigh(rows_MD.T @ rows_MD)
        held = values.flip(0).cumsum(0) / values.sum()
        leading = int((held < SHARE_OF_LENGTH).sum()) + 1
        width = -(-(leading + 1) // 8) * 8  # products with a multiple of 8 columns are faster
        self.pays = width <= MAX_SHARE * self._dimension
        self._basis_DM = vectors_DD.flip(1)[:, : width - 1].contiguous()
        self.store = RowStore(width, torch.float32, rows_MD.device)

    def extend(self, rows_MD: torch.Tensor) -> None:
        self.store.extend(self._split(rows_MD))

    def queries(self, queries_ND: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The error is that of a float32 sum, and of its terms' rounding to float32."""
        bound = 2 * summation_error(self._dimension)
        return self._split(queries_ND), torch.full((len(queries_ND),), bound)

    def _split(self, rows_MD: torch.Tensor) -> torch.Tensor:
        """The share in the leading directions and the length of the rest, rounded upwards."""
        leading_MM = rows_MD.double() @ self._basis_DM
        rest_M = rows_MD.double().square().sum(1) - leading_MM.square().sum(1)
        rest_M = rest_M.clamp(min=0).add(1e-12).sqrt().mul(1 + 2.0**-20)
        return torch.cat([leading_MM, rest_M[:, None]], 1).float()


def _rounding(rows_MD: torch.Tensor, halves_MD: torch.Tensor) -> torch.Tensor:
    """Length of what rounding took from each row (M,)."""
    return torch.linalg.vector_norm(rows_MD - halves_MD.float(), dim=1) * (1 + 1e-5)
