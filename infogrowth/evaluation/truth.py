"""Scoring a grown dataset against a known truth: swapped captions and copied images.

Pure functions on arrays, for samples with planted noise (``processed_data/sample_truth.json``).
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd


def auroc(scores: np.ndarray, positive: np.ndarray) -> float:
    """The chance that a positive sample scores above a negative one, ties counting half.

    Args:
        scores: ``(N,)`` real numbers.
        positive: ``(N,)`` booleans with at least one of each kind.
    """
    positive = np.asarray(positive, dtype=bool)
    ranks = pd.Series(np.asarray(scores)).rank().to_numpy()
    n_positive, n_negative = int(positive.sum()), int((~positive).sum())
    if not n_positive or not n_negative:
        raise ValueError("the area under the curve needs positive and negative samples")
    smallest = n_positive * (n_positive + 1) / 2
    return float((ranks[positive].sum() - smallest) / (n_positive * n_negative))


def precision_at_recall(scores: np.ndarray, positive: np.ndarray, recall: float) -> float:
    """The precision of the highest scores, as many as hold this share of the positive samples;
    samples that score the same are taken together.

    Args:
        scores: ``(N,)`` real numbers; positive: ``(N,)`` booleans with at least one True.
    """
    scores, positive = np.asarray(scores), np.asarray(positive, dtype=bool)
    wanted = int(np.ceil(recall * positive.sum() - 1e-9))
    threshold = np.sort(scores[positive])[::-1][wanted - 1]
    taken = scores >= threshold
    return float(positive[taken].mean())


@dataclass(frozen=True)
class Detection:
    """How well a set of flagged samples matches the truth; shares are 0 … 1."""

    flagged: int
    true: int
    hit: int

    @property
    def precision(self) -> float:
        """Share of the flagged samples that are truly bad (1 when nothing was flagged)."""
        return self.hit / self.flagged if self.flagged else 1.0

    @property
    def recall(self) -> float:
        """Share of the truly bad samples that were flagged (1 when there are none)."""
        return self.hit / self.true if self.true else 1.0


def detection(flagged: np.ndarray, truth: np.ndarray) -> Detection:
    """Compare ``(N,)`` booleans: what was flagged with what is true."""
    flagged, truth = np.asarray(flagged, dtype=bool), np.asarray(truth, dtype=bool)
    return Detection(int(flagged.sum()), int(truth.sum()), int((flagged & truth).sum()))


@dataclass(frozen=True)
class CaptionScore:
    """What growth did to captions whose truth is known; shares are 0 … 1."""

    wrong_before: float  # share of wrong captions among the samples that came
    wrong_after: float  # among those kept, new captions included
    right_kept: float  # share of the right captions that were kept as they were
    recaptioned: int
    recaptions_right: int


def score_captions(
    ids: Sequence[str],
    original: Sequence[str],
    captions: Sequence[str],
    kept: np.ndarray,
    recaptioned: np.ndarray,
    truth: Mapping[str, Collection[str]],
) -> CaptionScore:
    """Hold captions before and after growth against the right ones; samples without are left out.

    Args:
        ids, original, captions: N samples, their captions as they came and as they were decided.
        kept, recaptioned: ``(N,)`` booleans; a recaptioned sample is a kept one.
        truth: id -> every caption that is right.
    """
    known = np.array([name in truth for name in ids])
    came, now = (
        np.array([text in truth.get(name, ()) for name, text in zip(ids, texts, strict=True)])
        for texts in (original, captions)
    )
    kept, recaptioned = np.asarray(kept, bool) & known, np.asarray(recaptioned, bool) & known
    right = came & known
    return CaptionScore(
        wrong_before=float((~came[known]).mean()) if known.any() else 0.0,
        wrong_after=float((~now[kept]).mean()) if kept.any() else 0.0,
        right_kept=float((kept & ~recaptioned)[right].mean()) if right.any() else 1.0,
        recaptioned=int(recaptioned.sum()),
        recaptions_right=int((recaptioned & now).sum()),
    )


def share_in_lowest_decile(gains: np.ndarray, marked: np.ndarray) -> float:
    """Share of the marked samples whose gain is in the lowest tenth of all ``(N,)`` gains.

    A random choice of samples would score 0.1.
    """
    marked = np.asarray(marked, dtype=bool)
    if not marked.any():
        raise ValueError("no sample is marked")
    order = np.argsort(gains, kind="stable")
    lowest = np.zeros(len(gains), dtype=bool)
    lowest[order[: len(gains) // 10]] = True
    return float((lowest & marked).sum() / marked.sum())
