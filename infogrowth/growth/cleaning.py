"""Cleaning: does a caption belong to its image, and if not, is there one that does?

Pure numpy, no neighbors. Paper: "Dataset Growth" (InfoGrowth), cleaning; spec §2 "Clean".
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from infogrowth.growth.decisions import REASON_CODE, Decisions, Reason, Recaption
from infogrowth.growth.scores import Measure, cosine
from infogrowth.neighbors.rows import Trouble, as_matrix, unit_rows


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
    alignment = measure(batch.ids, image, text, False)
    alignment[~batch.usable] = np.nan
    unknown = batch.usable & np.isnan(alignment) & (min_align > -np.inf)
    low = is_below(alignment, min_align)
    batch.original_alignment, batch.alignment = alignment, alignment.copy()
    batch.reason_codes[batch.usable & ~low] = REASON_CODE[Reason.ALIGNED]
    batch.reason_codes[low] = REASON_CODE[Reason.LOW_ALIGNMENT]
    batch.reason_codes[unknown] = REASON_CODE[Reason.SCORE_MISSING]
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
    image = batch.features["image"]
    rows, features, captions = [], [], []
    for row in low_rows.tolist():
        recaption = recaptions.get(batch.ids[row])
        if recaption is None:
            continue
        feature, reason = _recaption_feature(recaption, image.shape[1], batch.ids[row])
        batch.reason_codes[row] = REASON_CODE[reason]
        batch.captioners[row] = recaption.captioner
        if feature is not None:
            rows.append(row)
            features.append(feature)
            captions.append(recaption.caption)
    if not rows:
        return
    candidates = np.concatenate(features)
    alignment = measure([batch.ids[row] for row in rows], image[rows], candidates, True)
    batch.recaption_alignment[rows] = alignment
    fits = ~is_below(alignment, min_recaption_align) & ~np.isnan(alignment)
    aligned = np.flatnonzero(fits)
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
    unit, problem = unit_rows(matrix)
    if problem[0] == Trouble.NONE:
        return unit, Reason.LOW_RECAPTION
    return None, Reason[f"RECAPTION_{Trouble(int(problem[0])).name}"]
