"""Single-modal cleaning: does an image's class label agree with its nearest kept neighbors?

The paper's second setting ("Dataset Growth", single-modal data): features of images only, with a
class label as the caption. The alignment of a sample is here the share of its nearest kept
neighbors that carry its label, out of as many as could: min(k, kept samples of that class). The
first sample of a class cannot disagree with anything and has alignment 1.

Whether a sample is kept depends on which samples before it were kept. A block is therefore solved
as a fixed point: assume all are kept, look, correct, until nothing changes. After each round at
least one more sample from the front is final, so it ends, and at the one-by-one answer.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from infogrowth.growth.cleaning import is_below
from infogrowth.growth.decisions import REASON_CODE, Decisions, Reason
from infogrowth.neighbors.base import Neighbors, merge_neighbors
from infogrowth.neighbors.rows import row_products

LABEL_BLOCK_ROWS = 512  # samples solved together: pairs within a block are compared directly

_ROUNDING = 1e-9  # far above what a float64 matrix product of unit rows can be off


def clean_labels(
    batch: Decisions,
    rows: slice,
    min_align: float,
    passed: Reason,
    kept_labels: Sequence[Any],
    class_counts: Mapping[Any, int],
    repeated: Callable[[list[str], np.ndarray], np.ndarray],
) -> np.ndarray:
    """Which of the n samples `rows` of `batch` join the dataset, (n,) bool.

    `batch.neighbors` holds their nearest samples from before the block; final neighbors, alignments
    and reasons are entered there. `kept_labels` are the labels of the dataset's samples in order,
    `class_counts` how many of each; `repeated(ids, aligned)` returns whose id is in the dataset
    already, or joins it earlier in the block.
    """
    ids, labels, usable = batch.ids[rows], batch.captions[rows], batch.usable[rows]
    entered, count = batch.neighbors["image"].part(rows), len(kept_labels)
    before = Neighbors(entered.positions.copy(), entered.products.copy())
    classes = {label: code for code, label in enumerate(dict.fromkeys(labels))}
    codes = np.array([classes[label] for label in labels])
    before_codes = np.array(
        [classes.get(kept_labels[at], -1) if at >= 0 else -1 for at in before.positions.flat],
        np.int64,
    ).reshape(before.positions.shape)
    counts = np.array([class_counts[label] for label in classes])
    order, products = _ordered_pairs(batch.features["image"][rows], usable, before)
    joins, changed = usable.copy(), True
    while changed:
        within, joined_codes = _nearest_within(order, products, joins, codes, before, count)
        found = merge_neighbors([before, within], before.positions.shape[1])
        found_codes = np.where(
            found.positions >= count,
            _codes_at(found.positions - count, joined_codes),
            _codes_before(found.positions, count, before_codes),
        )
        agreement = _agreement(codes, found_codes, joins, counts, before.positions.shape[1])
        agreement[~usable] = np.nan
        aligned = usable & ~is_below(agreement, min_align)
        again = repeated(ids, aligned)
        changed = bool((joins != (aligned & ~again)).any())
        joins = aligned & ~again
    entered.positions[:], entered.products[:] = found.positions, found.products
    batch.alignment[rows] = batch.original_alignment[rows] = agreement
    reasons = batch.reason_codes[rows]
    reasons[aligned] = REASON_CODE[passed]
    reasons[usable & ~aligned] = REASON_CODE[Reason.LABEL_DISAGREES]
    reasons[again] = REASON_CODE[Reason.DUPLICATE_ID]
    return joins


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
    rank = np.cumsum(eligible, axis=1) - 1
    sample, column = np.nonzero(eligible & (rank < before.positions.shape[1]))
    position = count + np.cumsum(joins) - 1
    positions = np.full(before.positions.shape, -1, np.int64)
    nearest = np.full(before.positions.shape, -np.inf)
    positions[sample, rank[sample, column]] = position[order[sample, column]]
    nearest[sample, rank[sample, column]] = products[sample, column]
    return Neighbors(positions, nearest), labels[joins]


def _codes_at(positions: np.ndarray, codes: np.ndarray) -> np.ndarray:
    return (
        codes[np.clip(positions, 0, len(codes) - 1)] if len(codes) else np.full(positions.shape, -1)
    )


def _codes_before(positions: np.ndarray, count: int, labels: np.ndarray) -> np.ndarray:
    """Label codes of those merged neighbors that were kept before the block, -1 for the others.

    They keep their order in the merging, so the j-th of them has the j-th of their `labels`."""
    is_before = (positions >= 0) & (positions < count)
    rank = np.cumsum(is_before, axis=1) - 1
    return np.where(is_before, np.take_along_axis(labels, np.maximum(rank, 0), axis=1), -1)


def _agreement(
    labels: np.ndarray, codes: np.ndarray, joins: np.ndarray, class_counts: np.ndarray, k: int
) -> np.ndarray:
    same = (codes == labels[:, None]).sum(axis=1)
    joining = np.zeros((len(labels), len(class_counts)), np.int64)
    joining[np.arange(len(labels)), labels] = joins
    earlier = np.cumsum(joining, axis=0)[np.arange(len(labels)), labels] - joins
    possible = np.minimum(class_counts[labels] + earlier, k)
    return np.where(possible > 0, same / np.maximum(possible, 1), 1.0)
