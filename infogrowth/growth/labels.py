"""Single-modal cleaning: does an image's class label agree with its nearest kept neighbors?

The paper's second setting ("Dataset Growth", single-modal data): features of images only, with a
class label in the caption's place. The alignment of a sample is here the share of its nearest kept
neighbors that carry its label, out of as many as could: min(k, kept samples of that class). The
first sample of a class cannot disagree with anything and has alignment 1.

Whether a sample is kept depends on which samples before it were kept. A block is therefore solved
as a fixed point: assume all are kept, look, correct, until nothing changes. After each round at
least one more sample from the front is final, so it ends, and at the one-by-one answer.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from infogrowth.neighbors.base import Neighbors, merge_neighbors
from infogrowth.neighbors.rows import row_products

BLOCK_ROWS = 512  # samples solved together: pairs within a block are compared directly

_ROUNDING = 1e-9  # far above what a float64 matrix product of unit rows can be off


@dataclass(frozen=True)
class Settled:
    """A block of N samples: `agreement` (N,) float64, `joins` (N,) bool, and their neighbors."""

    agreement: np.ndarray
    joins: np.ndarray
    neighbors: Neighbors


def settle_labels(
    labels: np.ndarray,
    rows: np.ndarray,
    usable: np.ndarray,
    before: Neighbors,
    before_labels: np.ndarray,
    class_counts: np.ndarray,
    count: int,
    choose: Callable[[np.ndarray], np.ndarray],
) -> Settled:
    """Solve a block of N samples.

    `labels` (N,) codes in [0, C); `rows` (N, D) unit rows, `usable` (N,) bool; `before` are the
    nearest of the `count` samples kept before the block and `before_labels` (N, k) their codes
    (-1: none, or a class that is not in the block); `class_counts` (C,) kept samples of each class.
    `choose` turns agreements (N,) into which samples join (N,) bool; sample i's answer may depend
    on the samples up to i only.
    """
    order, products = _ordered_pairs(rows, usable, before)
    joins = usable.copy()
    while True:
        within, within_labels = _nearest_within(order, products, joins, labels, before, count)
        neighbors = merge_neighbors([before, within], before.positions.shape[1])
        codes = np.where(
            neighbors.positions >= count,
            _codes_at(neighbors.positions - count, within_labels),
            _codes_before(neighbors.positions, count, before_labels),
        )
        agreement = _agreement(labels, codes, joins, class_counts, before.positions.shape[1])
        agreement[~usable] = np.nan
        chosen = choose(agreement)
        if (chosen == joins).all():
            return Settled(agreement, joins, neighbors)
        joins = chosen


def _ordered_pairs(
    rows: np.ndarray, usable: np.ndarray, before: Neighbors
) -> tuple[np.ndarray, np.ndarray]:
    """For each sample the earlier samples of the block, nearest first: (order, products), (N, N).

    Only pairs that can beat the k-th neighbor from before the block are computed; the product of
    the others is -inf.
    """
    wide = rows.astype(np.float64)
    estimate = wide @ wide.T
    reachable = estimate >= before.products[:, -1:] - _ROUNDING
    reachable &= np.tri(len(rows), k=-1, dtype=bool) & usable & usable[:, None]
    products = np.full(estimate.shape, -np.inf)
    later, earlier = np.nonzero(reachable)
    products[later, earlier] = row_products(rows[later], rows[earlier])
    order = np.argsort(-products, axis=1, kind="stable")
    return order, np.take_along_axis(products, order, axis=1)


def _nearest_within(
    order: np.ndarray,
    products: np.ndarray,
    joins: np.ndarray,
    labels: np.ndarray,
    before: Neighbors,
    count: int,
) -> tuple[Neighbors, np.ndarray]:
    """The nearest samples of the block that join, at the positions they would get; and the labels
    (number joining,) at these positions."""
    eligible = joins[order] & (products > -np.inf)
    place = np.cumsum(eligible, axis=1) - 1
    sample, column = np.nonzero(eligible & (place < before.positions.shape[1]))
    position = count + np.cumsum(joins) - 1
    positions = np.full(before.positions.shape, -1, np.int64)
    nearest = np.full(before.positions.shape, -np.inf)
    positions[sample, place[sample, column]] = position[order[sample, column]]
    nearest[sample, place[sample, column]] = products[sample, column]
    return Neighbors(positions, nearest), labels[joins]


def _codes_at(places: np.ndarray, codes: np.ndarray) -> np.ndarray:
    return codes[np.clip(places, 0, len(codes) - 1)] if len(codes) else np.full(places.shape, -1)


def _codes_before(positions: np.ndarray, count: int, labels: np.ndarray) -> np.ndarray:
    """Label codes of those merged neighbors that were kept before the block, -1 for the others.

    They keep their order in the merging, so the j-th of them has the j-th of their `labels`."""
    is_before = (positions >= 0) & (positions < count)
    place = np.cumsum(is_before, axis=1) - 1
    return np.where(is_before, np.take_along_axis(labels, np.maximum(place, 0), axis=1), -1)


def _agreement(
    labels: np.ndarray, codes: np.ndarray, joins: np.ndarray, class_counts: np.ndarray, k: int
) -> np.ndarray:
    same = (codes == labels[:, None]).sum(axis=1)
    joining = np.zeros((len(labels), len(class_counts)), np.int64)
    joining[np.arange(len(labels)), labels] = joins
    earlier = np.cumsum(joining, axis=0)[np.arange(len(labels)), labels] - joins
    possible = np.minimum(class_counts[labels] + earlier, k)
    return np.where(possible > 0, same / np.maximum(possible, 1), 1.0)
