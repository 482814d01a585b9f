"""Cleaning: does a caption belong to its image, and if not, is there one that does?

Pure numpy, no neighbors. Paper: "Dataset Growth" (InfoGrowth), cleaning; spec §2 "Clean".
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from infogrowth.errors import UserError
from infogrowth.growth.decisions import REASON_CODE, Reason, Recaption
from infogrowth.neighbors.rows import Trouble, as_matrix, row_products, unit_rows

_SWAPS = 32  # swapped partners tried per seed when min_align is chosen from the seeds

_RECAPTION_TROUBLE = {
    Trouble.NOT_FINITE: Reason.RECAPTION_NOT_FINITE,
    Trouble.ZERO: Reason.RECAPTION_ZERO,
}


@dataclass
class Cleaned:
    """A batch of N samples after cleaning: final captions, text rows and alignments.

    `alignment` and `original_alignment` (N,) float64 are NaN where a feature is unusable;
    `aligned` (N,) bool are the samples that pass; `reason_codes` (N,) int8 say why or why not.
    """

    captions: list[Any]
    text: np.ndarray
    alignment: np.ndarray
    original_alignment: np.ndarray
    recaptioned: np.ndarray
    aligned: np.ndarray
    reason_codes: np.ndarray


def trouble_reasons(image_trouble: np.ndarray, text_trouble: np.ndarray | None) -> np.ndarray:
    """Reason codes (N,) int8 of unusable features, image before text; -1 where all is well."""
    codes = np.full(len(image_trouble), -1, np.int8)
    if text_trouble is not None:
        codes[text_trouble == Trouble.NOT_FINITE] = REASON_CODE[Reason.TEXT_NOT_FINITE]
        codes[text_trouble == Trouble.ZERO] = REASON_CODE[Reason.TEXT_ZERO]
    codes[image_trouble == Trouble.NOT_FINITE] = REASON_CODE[Reason.IMAGE_NOT_FINITE]
    codes[image_trouble == Trouble.ZERO] = REASON_CODE[Reason.IMAGE_ZERO]
    return codes


def is_below(alignment: np.ndarray, min_align: float) -> np.ndarray:
    """Which alignments fall short. Compared as float32, so 0.4 meets 0.4; NaN never falls short."""
    return alignment.astype(np.float32) < np.float32(min_align)


def clean_pairs(
    ids: Sequence[str],
    captions: Sequence[Any],
    image: np.ndarray,
    text: np.ndarray,
    trouble: np.ndarray,
    min_align: float,
    recaptions: Mapping[str, Recaption] | None,
) -> Cleaned:
    """Clean N image–caption pairs.

    `image` and `text` (N, D) float32 unit rows, `trouble` (N,) from `trouble_reasons`. A sample
    under `min_align` takes its recaption if that reaches `min_align`; a sample that aligns is
    never recaptioned, and an alignment equal to `min_align` passes.
    """
    original = row_products(image, text)
    original[trouble >= 0] = np.nan
    low = is_below(original, min_align)
    cleaned = Cleaned(
        captions=list(captions),
        text=text,
        alignment=original.copy(),
        original_alignment=original,
        recaptioned=np.zeros(len(image), bool),
        aligned=~low & (trouble < 0),
        reason_codes=np.full(len(image), REASON_CODE[Reason.ALIGNED], np.int8),
    )
    cleaned.reason_codes[low] = REASON_CODE[Reason.LOW_ALIGNMENT]
    cleaned.reason_codes[trouble >= 0] = trouble[trouble >= 0]
    if recaptions:
        _recaption(cleaned, np.flatnonzero(low), ids, image, min_align, recaptions)
    return cleaned


def clean_labels(labels: Sequence[Any], trouble: np.ndarray) -> Cleaned:
    """Images with class labels, before their neighbors are known: nothing aligns yet."""
    return Cleaned(
        captions=list(labels),
        text=np.empty((len(trouble), 0), np.float32),
        alignment=np.full(len(trouble), np.nan),
        original_alignment=np.full(len(trouble), np.nan),
        recaptioned=np.zeros(len(trouble), bool),
        aligned=np.zeros(len(trouble), bool),
        reason_codes=trouble.copy(),
    )


def judge_labels(cleaned: Cleaned, agreement: np.ndarray, min_align: float, is_seed: bool) -> None:
    """Enter the agreement (N,) of labels with neighbors, NaN for unusable samples, as alignment."""
    usable, low = ~np.isnan(agreement), is_below(agreement, min_align)
    cleaned.alignment = cleaned.original_alignment = agreement
    cleaned.aligned = usable & ~low
    agrees = Reason.SEED if is_seed else Reason.LABEL_AGREES
    cleaned.reason_codes[cleaned.aligned] = REASON_CODE[agrees]
    cleaned.reason_codes[low] = REASON_CODE[Reason.LABEL_DISAGREES]


def _recaption(
    cleaned: Cleaned,
    low_rows: np.ndarray,
    ids: Sequence[str],
    image: np.ndarray,
    min_align: float,
    recaptions: Mapping[str, Recaption],
) -> None:
    """Give the samples `low_rows` their recaptions where these align. Changes `cleaned`."""
    rows, features, new_captions = [], [], []
    for row in low_rows.tolist():
        recaption = recaptions.get(ids[row])
        if recaption is None:
            continue
        feature, reason = _recaption_feature(recaption, image.shape[1], ids[row])
        cleaned.reason_codes[row] = REASON_CODE[reason]
        if feature is not None:
            rows.append(row)
            features.append(feature)
            new_captions.append(recaption.caption)
    if not rows:
        return
    candidates = np.concatenate(features)
    alignment = row_products(image[rows], candidates)
    cleaned.text = cleaned.text.copy()  # the caller's rows stay as they are
    for number in np.flatnonzero(~is_below(alignment, min_align)).tolist():
        row = rows[number]
        cleaned.captions[row] = new_captions[number]
        cleaned.text[row] = candidates[number]
        cleaned.alignment[row] = alignment[number]
        cleaned.recaptioned[row] = cleaned.aligned[row] = True
        cleaned.reason_codes[row] = REASON_CODE[Reason.RECAPTIONED]


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
    if trouble[0] != Trouble.NONE:
        return None, _RECAPTION_TROUBLE[Trouble(int(trouble[0]))]
    return unit, Reason.LOW_RECAPTION


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
