"""Cleaning: does a caption belong to its image, and if not, is there one that does?

Pure numpy. Paper: "Dataset Growth" (InfoGrowth), cleaning; spec §2 "Clean".
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np

from infogrowth.growth.decisions import Decisions, Reason, Recaption, one_row
from infogrowth.growth.scores import Measure, cosine
from infogrowth.rows import Problem, as_matrix, row_products, unit_rows

LABEL_BLOCK_ROWS = 512  # samples looked up together; within the block pairs are compared directly
_ROUNDING = 1e-9  # far above what a float64 matrix product of unit rows can be off


def is_below(alignment: np.ndarray, min_align: float) -> np.ndarray:
    """Which alignments fall short. Compared as float32, so 0.4 meets 0.4; NaN never falls short."""
    return alignment.astype(np.float32) < np.float32(min_align)


def clean_pairs(
    batch: Decisions,
    min_align: float,
    recaptions: Mapping[str, Recaption] | None,
    min_recaption_align: float,
    measure: Measure = cosine,
) -> np.ndarray:
    """Clean N image–caption pairs; returns which of them pass, (N,) bool.

    A sample under `min_align` takes its recaption if that reaches `min_recaption_align`; a sample
    that aligns is never recaptioned, and an alignment equal to its threshold passes. Alignments,
    reasons, captioners and new captions with their features are entered in `batch`. `measure` says
    how well captions fit; where it cannot (NaN) a sample does not pass, unless all do (seeds).
    """
    image, text = batch.features["image"], batch.features["text"]
    alignment = measure(image, text, batch.ids)
    alignment[~batch.usable] = np.nan
    unknown = batch.usable & np.isnan(alignment) & (min_align > -np.inf)
    low = is_below(alignment, min_align)
    batch.original_alignment, batch.alignment = alignment, alignment.copy()
    batch.reason[batch.usable & ~low] = Reason.ALIGNED
    batch.reason[low] = Reason.LOW_ALIGNMENT
    batch.reason[unknown] = Reason.SCORE_MISSING
    if recaptions:
        _recaption(batch, np.flatnonzero(low), min_recaption_align, recaptions, measure)
    return batch.usable & ~unknown & (~low | batch.recaptioned)


def _recaption(
    batch: Decisions,
    low_rows: np.ndarray,
    min_recaption_align: float,
    recaptions: Mapping[str, Recaption],
    measure: Measure,
) -> None:
    """Give the samples `low_rows` their recaptions where these align well enough."""
    image, tried = batch.features["image"], {}
    for row in low_rows.tolist():
        recaption = recaptions.get(batch.ids[row])
        if recaption is None:
            continue
        feature, batch.reason[row] = _recaption_feature(recaption, image.shape[1], batch.ids[row])
        batch.captioner[row] = recaption.captioner
        if feature is not None:
            tried[row] = recaption.caption, feature
    if not tried:
        return
    rows, ids = np.array(list(tried)), [batch.ids[row] for row in tried]
    features = np.concatenate([feature for _, feature in tried.values()])
    alignment = measure(image[rows], features, ids, recaptions=True)
    batch.recaption_alignment[rows] = alignment
    fits = alignment.astype(np.float32) >= np.float32(min_recaption_align)
    taken = rows[fits]
    batch.captions = list(batch.captions)
    for row in taken.tolist():
        batch.captions[row] = tried[row][0]
    batch.features["text"][taken] = features[fits]
    batch.alignment[taken] = alignment[fits]
    batch.recaptioned[taken] = True
    batch.reason[taken] = Reason.RECAPTIONED


def _recaption_feature(
    recaption: Recaption, dimension: int, sample_id: str
) -> tuple[np.ndarray | None, Reason]:
    """The recaption's unit row (1, D), or None and why there is none."""
    if not recaption.caption:
        return None, Reason.RECAPTION_WITHOUT_CAPTION
    if recaption.text_feature is None:
        return None, Reason.RECAPTION_WITHOUT_FEATURE
    what = f"The recaption feature of sample {sample_id!r}"
    matrix = as_matrix(one_row(recaption.text_feature), what)
    if matrix.shape[1] != dimension:
        return None, Reason.RECAPTION_MISFIT
    unit, problem = unit_rows(matrix)
    if problem[0] == Problem.NONE:
        return unit, Reason.LOW_RECAPTION
    return None, Reason[f"RECAPTION_{Problem(int(problem[0])).name}"]


# --- single-modal data: class labels in place of captions ------------------------------------


def clean_labels(
    batch: Decisions,
    rows: slice,
    min_align: float,
    passed: Reason,
    kept_labels: Sequence[Any],
    class_counts: Mapping[Any, int],
    known_ids: Collection[str],
) -> np.ndarray:
    """Which of the n samples `rows` of `batch` join the dataset, (n,) bool.

    The paper's second setting: features of images only, with a class label as the caption. The
    alignment of a sample is here the share of its nearest kept neighbors that carry its label, out
    of as many as could: min(k, kept samples of that class). The first sample of a class cannot
    disagree with anything and has alignment 1.

    `batch.neighbors` holds the nearest samples from before the block; those that join within the
    block are looked at one by one, as whether a sample joins depends on which ones did before it.
    Final neighbors, alignments and reasons are entered in `batch`. `kept_labels`, `class_counts`
    and `known_ids` are those of the dataset.
    """
    ids, labels, usable = batch.ids[rows], batch.captions[rows], batch.usable[rows]
    found, reasons = batch.neighbors["image"].part(rows), batch.reason[rows]
    count, k = len(kept_labels), found.positions.shape[1]
    near = _near_pairs(batch.features["image"][rows], usable, found.products[:, -1])
    alignment = np.full(len(ids), np.nan)
    counts, joined, joined_ids = Counter(class_counts), np.empty(0, np.int64), set[str]()
    for row, (sample, label) in enumerate(zip(ids, labels, strict=True)):
        if usable[row]:
            within = np.flatnonzero(near[row, joined] > -np.inf)
            positions = np.concatenate([found.positions[row], count + within])
            products = np.concatenate([found.products[row], near[row, joined[within]]])
            order = np.lexsort((positions, -products))[:k]
            found.positions[row], found.products[row] = positions[order], products[order]
            nearest = [
                kept_labels[at] if at < count else labels[joined[at - count]]
                for at in positions[order].tolist() if at >= 0
            ]  # fmt: skip
            possible = min(counts[label], k)
            alignment[row] = nearest.count(label) / possible if possible else 1.0
        aligned = bool(usable[row] and not is_below(alignment[row], min_align))
        if sample in known_ids or sample in joined_ids:
            reasons[row] = Reason.DUPLICATE_ID
        elif aligned:
            reasons[row] = passed
            joined = np.append(joined, row)
            joined_ids.add(sample)
            counts[label] += 1
        elif usable[row]:
            reasons[row] = Reason.LABEL_DISAGREES
    batch.alignment[rows] = batch.original_alignment[rows] = alignment
    joins = np.zeros(len(ids), bool)
    joins[joined] = True
    return joins


def _near_pairs(rows: np.ndarray, usable: np.ndarray, to_beat: np.ndarray) -> np.ndarray:
    """Cosines (n, n) of each row with the earlier ones; -inf where they cannot be among the
    nearest, as they do not reach `to_beat` (n,): few are computed in full precision."""
    wide = rows.astype(np.float64)
    reachable = wide @ wide.T >= to_beat[:, None] - _ROUNDING
    reachable &= np.tri(len(rows), k=-1, dtype=bool) & usable & usable[:, None]
    later, earlier = np.nonzero(reachable)
    cosines = np.full(reachable.shape, -np.inf)
    cosines[later, earlier] = row_products(rows[later], rows[earlier])
    return cosines
