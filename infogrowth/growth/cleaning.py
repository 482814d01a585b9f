"""Cleaning: does a caption belong to its image, and if not, is there one that does?

Pure numpy, no neighbors. Paper: "Dataset Growth" (InfoGrowth), cleaning; spec §2 "Clean".
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from infogrowth.errors import UserError
from infogrowth.growth.decisions import REASON_CODE, Decisions, Reason, Recaption
from infogrowth.neighbors.rows import Trouble, as_matrix, row_products, unit_rows

_SWAPS = 32  # swapped partners tried per seed when min_align is chosen from the seeds


def is_below(alignment: np.ndarray, min_align: float) -> np.ndarray:
    """Which alignments fall short. Compared as float32, so 0.4 meets 0.4; NaN never falls short."""
    return alignment.astype(np.float32) < np.float32(min_align)


def clean_pairs(
    batch: Decisions, min_align: float, recaptions: Mapping[str, Recaption] | None
) -> np.ndarray:
    """Clean N image–caption pairs; returns which of them pass, (N,) bool.

    A sample under `min_align` takes its recaption if that reaches `min_align`; a sample that aligns
    is never recaptioned, and an alignment equal to `min_align` passes. Alignments, reasons and new
    captions with their features are entered in `batch`.
    """
    image, text = batch.features["image"], batch.features["text"]
    alignment = row_products(image, text)
    alignment[~batch.usable] = np.nan
    low = is_below(alignment, min_align)
    batch.original_alignment, batch.alignment = alignment, alignment.copy()
    batch.reason_codes[batch.usable & ~low] = REASON_CODE[Reason.ALIGNED]
    batch.reason_codes[low] = REASON_CODE[Reason.LOW_ALIGNMENT]
    if recaptions:
        _recaption(batch, np.flatnonzero(low), min_align, recaptions)
    return batch.usable & (~low | batch.recaptioned)


def _recaption(
    batch: Decisions,
    low_rows: np.ndarray,
    min_align: float,
    recaptions: Mapping[str, Recaption],
) -> None:
    """Give the samples `low_rows` their recaptions where these align."""
    image = batch.features["image"]
    rows, features, captions = [], [], []
    for row in low_rows.tolist():
        recaption = recaptions.get(batch.ids[row])
        if recaption is None:
            continue
        feature, reason = _recaption_feature(recaption, image.shape[1], batch.ids[row])
        batch.reason_codes[row] = REASON_CODE[reason]
        if feature is not None:
            rows.append(row)
            features.append(feature)
            captions.append(recaption.caption)
    if not rows:
        return
    candidates = np.concatenate(features)
    alignment = row_products(image[rows], candidates)
    aligned = np.flatnonzero(~is_below(alignment, min_align))
    taken = np.array(rows)[aligned]
    batch.captions = list(batch.captions)
    for number, row in zip(aligned.tolist(), taken.tolist(), strict=True):
        batch.captions[row] = captions[number]
    batch.features["text"][taken] = candidates[aligned]
    batch.alignment[taken] = alignment[aligned]
    batch.recaptioned[taken] = True
    batch.reason_codes[taken] = REASON_CODE[Reason.RECAPTIONED]


def _recaption_feature(
    recaption: Recaption, dimension: int, sample_id: str
) -> tuple[np.ndarray | None, Reason]:
    """The recaption's unit row (1, D), or None and why there is none."""
    if not recaption.caption:
        return None, Reason.RECAPTION_WITHOUT_CAPTION
    if recaption.text_feature is None:
        return None, Reason.RECAPTION_WITHOUT_FEATURE
    feature = recaption.text_feature
    vector = feature.reshape(1, -1) if hasattr(feature, "reshape") else [feature]
    matrix = as_matrix(vector, f"The recaption feature of sample {sample_id!r}")
    if matrix.shape[1] != dimension:
        return None, Reason.RECAPTION_MISFIT
    unit, trouble = unit_rows(matrix)
    if trouble[0] == Trouble.NONE:
        return unit, Reason.LOW_RECAPTION
    return None, Reason[f"RECAPTION_{Trouble(int(trouble[0])).name}"]


def choose_min_align(image: np.ndarray, text: np.ndarray) -> float:
    """A threshold from the seeds themselves: what best tells right captions from swapped ones.

    `image` and `text` (N, D) float32 unit rows of a clean seed set. The alignments of the N right
    pairs are set against those of up to 32 N swapped ones (image i with the caption of seed
    i + 1, i + 2, …); the value with the highest balanced accuracy is returned (Youden's rule), the
    middle of the widest gap if several are equally good. Raises UserError if the seeds are too
    few or all alike.
    """
    right = row_products(image, text)
    swapped_parts = []
    for shift in range(1, min(len(image), _SWAPS + 1)):
        other = np.roll(text, shift, axis=0)
        differs = (other != text).any(axis=1)  # an equal caption is no wrong one
        swapped_parts.append(row_products(image, other)[differs])
    swapped = np.concatenate(swapped_parts) if swapped_parts else np.empty(0)
    values = np.unique(np.concatenate([right, swapped]))
    if len(swapped) == 0 or len(values) < 2:
        raise UserError(
            "min_align 'auto' needs at least two seed samples with different captions; "
            "give more seeds, or a number."
        )
    accuracy = (
        1 - np.searchsorted(np.sort(right), values[1:]) / len(right)
        + np.searchsorted(np.sort(swapped), values[1:]) / len(swapped)
    )  # fmt: skip
    gaps = np.where(np.isclose(accuracy, accuracy.max(), rtol=0, atol=1e-12), np.diff(values), -1)
    best = int(gaps.argmax())
    return float((values[best] + values[best + 1]) / 2)
