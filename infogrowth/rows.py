"""Feature rows: read from any array type, brought to unit length, multiplied row by row in float64.

Every number that decides something comes from here, and none depends on how many rows are
handled at once: sums are folded in one fixed order, the same for numpy, torch, CPU and GPU.
"""

from __future__ import annotations

from enum import IntEnum
from typing import Any

import numpy as np

from infogrowth.errors import UserError

UNIT_TOLERANCE = 2.5e-7
"""A row this near to unit length is left untouched, so bringing rows to unit length twice changes
nothing: rounding a unit row to float32 moves its norm by at most 6e-8."""

_FOLD_ELEMENTS = 1 << 17  # float64 elements handled at once: 1 MB, so the fold stays in the cache


class Problem(IntEnum):
    """What is wrong with a feature row."""

    NONE = 0
    NOT_FINITE = 1
    ZERO = 2


def fold_sum(products: Any) -> Any:
    """Sum each row of `products` (N, D) -> (N,), in place, by adding the upper half to the lower.

    Only element-wise additions in a fixed order: the result has the same bits for any number of
    rows and on any device. Takes numpy arrays and torch tensors.
    """
    width = products.shape[1]
    while width > 1:
        half = width // 2
        products[:, :half] += products[:, width - half : width]
        width -= half
    return products[:, 0]


def row_products(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Dot product of each row of `left` (N, D) with the same row of `right` -> (N,) float64."""
    count, dimension = left.shape
    products = np.empty(count, np.float64)
    step = max(1, _FOLD_ELEMENTS // max(1, dimension))
    for start in range(0, count, step):
        rows = slice(start, start + step)
        products[rows] = fold_sum(np.multiply(left[rows], right[rows], dtype=np.float64))
    return products


def as_matrix(values: Any, what: str) -> np.ndarray:
    """Read `values` as a two-dimensional floating array on the CPU.

    Takes numpy arrays, nested lists and torch tensors of any device and precision. Raises
    UserError when they are not numbers or not (samples, dimension); `what` names them there.
    """
    if hasattr(values, "detach"):  # a torch tensor, without importing torch
        values = values.detach().cpu()
        values = values.float() if "bfloat16" in str(values.dtype) else values
        values = values.numpy()
    try:
        matrix = np.asarray(values)
        if matrix.dtype not in (np.float16, np.float32, np.float64):
            if matrix.dtype.kind not in "fiub":
                raise ValueError(f"of type {matrix.dtype}")
            matrix = matrix.astype(np.float64)
        if matrix.ndim != 2 or matrix.shape[1] == 0:
            raise ValueError(f"of shape {matrix.shape}")
    except (TypeError, ValueError) as error:
        raise UserError(
            f"{what} must be an array of numbers (samples, dimension), one row per sample, not "
            f"{error}."
        ) from None
    return matrix


def unit_rows(matrix: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Bring the rows of `matrix` (N, D) to unit length.

    Returns (rows (N, D) float32, problems (N,) int8 of `Problem`). Lengths are taken in float64
    and the quotient is rounded to float32 once. Rows that are not finite or zero come back as
    zeros, with their problem reported.
    """
    rows = np.empty(matrix.shape, np.float32)
    problems = np.zeros(len(matrix), np.int8)
    step = max(1, _FOLD_ELEMENTS // matrix.shape[1])
    for start in range(0, len(matrix), step):
        part = slice(start, start + step)
        rows[part], problems[part] = _unit_rows_at_once(matrix[part])
    return rows, problems


def unit_pairs(image: Any, text: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Image and text features (N, D) at unit length, as :func:`unit_rows` brings them there, and of
    which samples both can be used (N,) bool."""
    (image, image_problems), (text, text_problems) = unit_rows(image), unit_rows(text)
    return image, text, (image_problems == 0) & (text_problems == 0)


def _unit_rows_at_once(matrix: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    problems = np.zeros(len(matrix), np.int8)
    with np.errstate(over="ignore", invalid="ignore", under="ignore"):
        squares = fold_sum(np.square(matrix, dtype=np.float64))
        odd = ~(np.isfinite(squares) & (squares > 1e-200))
        if odd.any():  # not finite, zero, or float64 values whose squares leave float64's range
            matrix = matrix.astype(np.float64)
            largest = np.abs(matrix[odd]).max(axis=1)
            problems[odd] = np.where(
                np.isfinite(largest),
                np.where(largest == 0, Problem.ZERO, Problem.NONE),
                Problem.NOT_FINITE,
            )
            usable = problems[odd] == Problem.NONE
            scaled = np.where(usable[:, None], matrix[odd] / largest[:, None], 0)
            matrix[odd] = scaled
            squares[odd] = fold_sum(np.square(scaled))
            squares[problems != Problem.NONE] = 1
    norms = np.sqrt(squares)
    rows = matrix.astype(np.float32)
    stretch = np.abs(norms - 1) > UNIT_TOLERANCE
    if stretch.all():
        rows[:] = matrix / norms[:, None]
    elif stretch.any():
        rows[stretch] = matrix[stretch] / norms[stretch, None]
    return rows, problems
