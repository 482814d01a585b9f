"""Thresholds from seeds and stream, held against mixtures whose truth is known."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from infogrowth.errors import UserError
from infogrowth.growth.engine import InfoGrowth, Recaption
from infogrowth.growth.thresholds import (
    Thresholds,
    choose_min_align,
    estimate_stream,
)
from infogrowth.rows import row_products, unit_rows


def seeds(noise, count=400, dimension=32):
    random = np.random.default_rng(1)
    image = random.normal(size=(count, dimension))
    text = image + noise * random.normal(size=image.shape)
    return unit_rows(image)[0], unit_rows(text)[0]


@pytest.mark.parametrize("noise", [0.5, 1.5])
def test_auto_min_align_best_separates_right_from_swapped_captions(noise):
    image, text = seeds(noise)
    chosen = choose_min_align(image, text)
    products = image.astype(float) @ text.T
    right = np.diag(products)
    swapped = products[~np.eye(len(image), dtype=bool)]

    def accuracy(threshold):
        return ((right >= threshold).mean() + (swapped < threshold).mean()) / 2

    best = max(accuracy(value) for value in np.linspace(-1, 1, 801))
    assert accuracy(chosen) > best - 0.01
    assert best > 0.85


def test_auto_min_align_is_the_middle_of_the_gap_in_a_hand_made_case():
    # right pairs align with 0.8, swapped ones with 0
    image = np.eye(4, dtype=np.float32)[:2]
    text = np.array([[0.8, 0, 0.6, 0], [0, 0.8, 0, 0.6]], np.float32)
    assert choose_min_align(image, text) == pytest.approx(0.4, abs=1e-6)


def test_auto_min_align_is_recorded_and_used_and_needs_seeds():
    image, text = seeds(0.5)
    ids = [f"s{number}" for number in range(len(image))]
    growth = InfoGrowth(min_align="auto", device="cpu")
    with pytest.raises(UserError, match=r"seed\(\) first"):
        growth.process(ids, ids, image, text)
    with pytest.raises(UserError, match="two"):
        growth.seed(ids[:1], ids[:1], image[:1], text[:1])
    assert growth.settings["min_align"] is None and len(growth) == 0
    growth.seed(ids[:300], ids[:300], image[:300], text[:300])
    assert growth.settings["min_align"] == choose_min_align(image[:300], text[:300])
    assert growth.settings["min_align_rule"].startswith("auto: ")
    swapped = growth.process(ids[300:], ids[300:], image[300:], np.roll(text[300:], 1, axis=0))
    assert swapped.verdicts.count("dropped") > 95


def mixture(noise, wrong, seeds=400, stream=3000, seed=0):
    """Seeds, and a stream of which a planted share has another sample's caption.

    `noise` is how far a caption's feature lies from its image's: 1.2 is an AUROC of 0.99 in 32
    dimensions, 2.5 one of 0.93, 4.5 one of 0.8.
    """
    random = np.random.default_rng(seed)
    image = random.normal(size=(seeds + stream, 32))
    text = image + noise * random.normal(size=image.shape)
    is_wrong = np.zeros(len(image), bool)
    is_wrong[seeds:] = random.random(stream) < wrong
    rows = np.flatnonzero(is_wrong)
    text[rows] = text[np.roll(rows, 1)]
    image, text = unit_rows(image)[0], unit_rows(text)[0]
    return image, text, is_wrong


def split(image, text, is_wrong, seeds=400):
    alignment = row_products(image, text)[seeds:]
    return estimate_stream(image[:seeds], text[:seeds], alignment), alignment, is_wrong[seeds:]


@pytest.mark.parametrize("wrong", [0.03, 0.2, 0.5])
@pytest.mark.parametrize("noise", [1.2, 2.5])
def test_the_purity_that_was_asked_for_is_reached_within_two_points(noise, wrong):
    estimate, alignment, is_wrong = split(*mixture(noise, wrong))
    for purity in (0.95, 0.98, 0.99):
        kept = alignment >= estimate.threshold(purity)
        assert 1 - is_wrong[kept].mean() > purity - 0.02
        if purity > 1 - is_wrong.mean():  # else the stream is purer than that as it is
            assert 1 - is_wrong[kept].mean() < purity + 0.02


@pytest.mark.parametrize("noise", [1.2, 2.5, 4.5])
def test_purity_and_loss_are_estimated_within_two_points_wherever_a_tenth_is_kept(noise):
    estimate, alignment, is_wrong = split(*mixture(noise, 0.3))
    thresholds = np.quantile(alignment, np.linspace(0, 0.9, 19))
    kept = alignment >= thresholds[:, None]
    purity = (kept & ~is_wrong).sum(axis=1) / kept.sum(axis=1)
    lost = (~kept & ~is_wrong).sum(axis=1) / (~is_wrong).sum()
    np.testing.assert_allclose(estimate.purity(thresholds), purity, atol=0.02)
    np.testing.assert_allclose(estimate.right_lost(thresholds), lost, atol=0.02)


def test_the_interval_of_the_noise_holds_the_planted_share_as_often_as_it_says():
    held = 0
    for seed in range(40):
        wrong = (0.05, 0.2, 0.4, 0.6)[seed % 4]
        drawn = mixture((1.2, 2.5)[seed % 2], wrong, seeds=220, stream=1500, seed=seed)
        estimate, _, is_wrong = split(*drawn, seeds=220)
        low, high = estimate.noise_interval
        held += low <= is_wrong.mean() <= high
    assert held >= 35  # 38 of 40 are expected


@settings(max_examples=40, deadline=None)
@given(
    st.floats(0.3, 6),
    st.floats(0, 1),
    st.integers(20, 120),
    st.integers(1, 400),
    st.integers(0, 2**32 - 1),
)
def test_any_mixture_has_an_estimate_that_makes_sense(noise, wrong, seeds, stream, seed):
    estimate, alignment, _ = split(*mixture(noise, wrong, seeds, stream, seed), seeds)
    low, high = estimate.noise_interval
    assert 0 <= low <= estimate.noise <= high <= 1
    thresholds = np.linspace(-1, 1, 21)
    lost = estimate.right_lost(thresholds)
    assert lost[0] == pytest.approx(0) and lost[-1] == 1
    everywhere = estimate.right_lost(np.linspace(-1.1, 1.1, 2001))
    assert (np.diff(everywhere) >= 0).all()  # as true losses are
    purity = estimate.purity(thresholds)
    assert ((purity >= 0) & (purity <= 1) | np.isnan(purity)).all()
    assert purity[0] == pytest.approx(1 - estimate.noise)
    try:
        threshold = estimate.threshold(0.9)
    except UserError:
        return
    assert estimate.purity(threshold) >= 0.9 and (alignment >= threshold).any()


def test_a_stream_that_is_pure_enough_is_kept_whole():
    estimate, _, _ = split(*mixture(1.2, 0.0))
    assert estimate.noise < 0.01
    assert estimate.threshold(0.98) == -1


def test_the_order_of_the_stream_and_unusable_samples_make_no_difference():
    image, text, _ = mixture(2.5, 0.2)
    alignment = row_products(image, text)[400:]
    first = estimate_stream(image[:400], text[:400], alignment)
    again = estimate_stream(image[:400], text[:400], np.r_[np.nan, alignment[::-1], np.nan])
    assert again.noise == pytest.approx(first.noise, abs=1e-5)
    assert again.threshold(0.98) == pytest.approx(first.threshold(0.98), abs=1e-3)


def test_few_seeds_an_empty_stream_and_an_unreachable_purity_are_refused():
    image, text, _ = mixture(6.0, 0.5)
    alignment = row_products(image, text)
    with pytest.raises(UserError, match="20 seed"):
        estimate_stream(image[:19], text[:19], alignment)
    with pytest.raises(UserError, match="20 seed"):
        estimate_stream(image[:50], text[[0] * 50], alignment)
    with pytest.raises(UserError, match="stream"):
        estimate_stream(image[:50], text[:50], alignment[:0])
    with pytest.raises(UserError, match="another encoder"):
        estimate_stream(image[:400], text[:400], alignment[400:]).threshold(0.999)


def test_growing_with_a_purity_keeps_the_stream_that_pure_and_records_the_estimate():
    image, text, is_wrong = mixture(1.2, 0.3)
    ids = [f"s{row}" for row in range(len(image))]
    growth = InfoGrowth(min_align="auto:0.98", device="cpu")
    with pytest.raises(UserError, match="stream="):
        growth.seed(ids[:400], ids[:400], image[:400], text[:400])
    stream = row_products(image, text)[400:]
    growth.seed(ids[:400], ids[:400], image[:400], text[:400], stream=stream)
    decided = growth.process(ids[400:], ids[400:], image[400:], text[400:])
    assert 1 - is_wrong[400:][decided.kept].mean() == pytest.approx(0.98, abs=0.02)
    recorded = growth.settings
    assert recorded["min_align_rule"].startswith("auto:0.98: ")
    assert recorded["estimate"]["purity_aim"] == 0.98
    low, high = recorded["estimate"]["noise_interval"]
    assert low <= is_wrong[400:].mean() <= high
    features = growth.kept_features("image"), growth.kept_features("text")
    restored = InfoGrowth.restore(
        recorded, growth.kept_ids, growth.kept_ids, growth.kept_gains, *features, device="cpu"
    )
    assert restored.settings == recorded


def test_a_recaption_must_reach_its_own_threshold_and_the_record_says_which():
    image, text, _ = mixture(1.2, 0.0, seeds=100, stream=40)
    ids = [f"s{row}" for row in range(len(image))]
    growth = InfoGrowth(min_align=0.3, min_recaption_align="auto", device="cpu")
    with pytest.raises(UserError, match=r"seed\(\) first"):
        growth.process(ids, ids, image, text)
    growth.seed(ids[:100], ids[:100], image[:100], text[:100])
    own = row_products(image[:100], text[:100])
    assert growth.settings["min_recaption_align"] == pytest.approx(np.quantile(own, 0.75))
    recaptions = {
        name: Recaption("new words", vector, "a captioner")
        for name, vector in zip(ids[100:], text[100:], strict=True)
    }
    decided = growth.process(ids[100:], ids[100:], image[100:], -text[100:], recaptions)
    alignment = row_products(image[100:], text[100:])
    taken = alignment.astype(np.float32) >= np.float32(np.quantile(own, 0.75))
    assert decided.recaptioned.tolist() == taken.tolist()
    assert 3 < taken.sum() < 25
    for record, fits, found in zip(decided, taken, alignment, strict=True):
        assert record.captioner == "a captioner"
        assert record.recaption_alignment == pytest.approx(found)
        assert bool(record.recaption_rule) == fits
    accepted = decided[int(np.flatnonzero(taken)[0])]
    assert "0.75 quantile" in accepted.recaption_rule
    table = decided.table(0, np.arange(40)).to_pandas()
    assert table.captioner.eq("a captioner").all()
    np.testing.assert_allclose(table.recaption_alignment, alignment)


def test_a_recaption_is_never_asked_for_less_than_min_align():
    image, text, _ = mixture(1.2, 0.0, seeds=50, stream=1)
    resolved = Thresholds.requested(0.99, "auto").resolve(image[:50], text[:50])
    assert resolved.min_recaption_align == 0.99
    with pytest.raises(UserError, match="below min_align"):
        Thresholds.requested(0.4, 0.3)


@pytest.mark.parametrize(
    "request_", [0.3, "auto", "auto:0.98", "auto:0.5"], ids=lambda value: str(value)
)
@pytest.mark.parametrize("recaption", [None, 0.5, "auto"])
def test_what_was_requested_can_be_read_back_before_and_after_it_was_found(request_, recaption):
    image, text, _ = mixture(1.2, 0.3)
    requested = Thresholds.requested(request_, recaption)
    found = requested.resolve(image[:400], text[:400], row_products(image, text)[400:])
    expected = {"min_align": request_, "min_recaption_align": recaption}
    assert requested.requests == found.requests == expected
    assert found.resolved
    assert found.min_recaption_align >= found.min_align


@pytest.mark.parametrize("value", ["0.4", "auto:", "auto:1", "auto:98", "auto:x", "aut", 2, "nan"])
def test_what_is_no_threshold_is_refused(value):
    with pytest.raises(UserError, match="min_align"):
        Thresholds.requested(value)
