"""Scoring against a planted truth."""

import numpy as np
import pandas as pd
import pytest

from infogrowth.evaluation.truth import auroc, detection, score_captions


def test_area_under_the_curve_is_the_chance_to_rank_a_pair_rightly():
    rng = np.random.default_rng(0)
    scores, positive = rng.integers(0, 12, 60).astype(float), rng.random(60) < 0.4
    pairs = scores[positive][:, None] - scores[~positive][None, :]
    by_hand = (pairs > 0).mean() + 0.5 * (pairs == 0).mean()
    assert auroc(scores, positive) == pytest.approx(by_hand, abs=1e-12)
    assert auroc(-scores, positive) == pytest.approx(1 - by_hand, abs=1e-12)


def test_one_kind_only_has_no_curve():
    with pytest.raises(ValueError, match="positive"):
        auroc(np.arange(3.0), np.ones(3, bool))


def test_precision_and_recall():
    assert detection([1, 1, 1, 0, 0], [1, 0, 0, 1, 0]) == (1 / 3, 1 / 2)
    assert detection([0, 0], [0, 1]) == (1.0, 0.0) and detection([1, 0], [0, 0]) == (0.0, 1.0)


def test_captions_are_scored_before_and_after():
    truth = {"a": ["red"], "b": ["blue"], "c": ["green", "leaf"], "d": ["sun"]}
    decisions = pd.DataFrame(
        {
            "id": ["a", "b", "c", "d", "unknown", "b"],
            "original_caption": ["red", "wrong", "wrong", "sun", "wrong", "wrong"],
            "caption": ["red", "wrong", "leaf", "sun", "wrong", "wrong"],
            "verdict": ["kept", "kept", "recaptioned", "dropped", "kept", "kept"],
            "reason": ["aligned"] * 5 + ["seed"],
        }
    )
    score = score_captions(decisions, truth)
    assert (score.wrong_before, score.wrong_after) == (1 / 2, 1 / 3)
    assert (score.right_kept, score.recaptions_right, score.recaptioned) == (1 / 2, 1, 1)
