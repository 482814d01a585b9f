"""Scoring a grown dataset against a known truth: swapped captions and copied images.

Pure functions on arrays, for samples with planted noise (``processed_data/sample_truth.json``).
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass

import numpy as np
import pandas as pd


def auroc(scores: np.ndarray, positive: np.ndarray) -> float:
    """The chance that a positive sample scores above a negative one, ties counting half.

    Args:
        scores: ``(N,)`` real numbers; positive: ``(N,)`` booleans with at least one of each kind.
    """
    positive = np.asarray(positive, dtype=bool)
    ranks = pd.Series(np.asarray(scores)).rank().to_numpy()
    n_positive, n_negative = int(positive.sum()), int((~positive).sum())
    if not n_positive or not n_negative:
        raise ValueError("the area under the curve needs positive and negative samples")
    smallest = n_positive * (n_positive + 1) / 2
    return float((ranks[positive].sum() - smallest) / (n_positive * n_negative))


def detection(flagged: np.ndarray, truth: np.ndarray) -> tuple[float, float]:
    """Precision and recall, 0 … 1, of ``(N,)`` booleans: what was flagged against what is true.

    The precision of nothing flagged is 1, as is the recall where nothing is true.
    """
    flagged, truth = np.asarray(flagged, dtype=bool), np.asarray(truth, dtype=bool)
    hits = int((flagged & truth).sum())
    return tuple(hits / n if (n := int(each.sum())) else 1.0 for each in (flagged, truth))  # type: ignore[return-value]


@dataclass(frozen=True)
class CaptionScore:
    """What growth did to captions whose truth is known; shares are 0 … 1."""

    wrong_before: float  # share of wrong captions among the samples that came
    wrong_after: float  # among those kept, new captions included
    right_kept: float  # share of the right captions that were kept as they were
    recaptioned: int
    recaptions_right: int


def score_captions(decisions: pd.DataFrame, truth: Mapping[str, Collection[str]]) -> CaptionScore:
    """Hold captions before and after growth against the right ones. Left out are samples without a
    truth, and seeds, which were never in question.

    Args:
        decisions: columns id, verdict, reason, caption and original_caption of the decisions.
        truth: id -> every caption that is right.
    """
    known = decisions[decisions.id.isin(list(truth)) & (decisions.reason != "seed")]
    came, now = (
        np.array([text in truth[name] for name, text in zip(known.id, texts, strict=True)], bool)
        for texts in (known.original_caption, known.caption)
    )
    verdict = known.verdict.to_numpy()
    kept, recaptioned = verdict != "dropped", verdict == "recaptioned"
    return CaptionScore(
        wrong_before=float((~came).mean()) if len(known) else 0.0,
        wrong_after=float((~now[kept]).mean()) if kept.any() else 0.0,
        right_kept=float((verdict == "kept")[came].mean()) if came.any() else 1.0,
        recaptioned=int(recaptioned.sum()),
        recaptions_right=int((recaptioned & now).sum()),
    )
