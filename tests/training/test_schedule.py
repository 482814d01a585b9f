"""Learning rates and the alpha ramp against the paper's own values (golden E)."""

import json
from itertools import pairwise

import pytest

from infogrowth.training.options import Schedule


@pytest.fixture(scope="module")
def lr(golden):
    return json.loads((golden / "schedules_lr.json").read_text())


def test_cosine_is_the_golden_one(lr):
    for case in lr["cosine"]:
        schedule = Schedule("cosine", case["init_lr"], case["min_lr"], case["max_epoch"])
        for epoch, value in enumerate(case["values"]):
            assert schedule.rate(epoch, 0) == pytest.approx(value, rel=1e-12, abs=1e-20)


def test_step_decay_is_the_golden_one(lr):
    for case in lr["step"]:
        schedule = Schedule("step", case["init_lr"], case["min_lr"], 1, case["decay_rate"])
        for epoch, value in enumerate(case["values"]):
            assert schedule.rate(epoch, 0) == pytest.approx(value, rel=1e-12)


def test_warmup_is_the_golden_one(lr):
    for case in lr["warmup"]:
        schedule = Schedule(
            "step", case["max_lr"], 0.0, 1, 1.0, case["init_lr"], case["max_step"]
        )  # fmt: skip
        for step, value in case["values"].items():
            assert schedule.rate(0, int(step)) == pytest.approx(value, rel=1e-12)


def test_pretraining_follows_the_golden_loop_except_that_warmup_goes_on_after_epoch_0(lr):
    golden = lr["pretrain_loop"]
    config = golden["config"]
    schedule = Schedule(
        "step", config["init_lr"], config["min_lr"], config["max_epoch"],
        config["lr_decay_rate"], config["warmup_lr"], config["warmup_steps"],
        config["alpha"], ramp_epochs=2,
    )  # fmt: skip
    per_epoch = config["steps_per_epoch"]
    differing = []
    for epoch, i, rate, alpha in golden["rows"]:
        step = epoch * per_epoch + i
        assert schedule.ramped_alpha(epoch, i, per_epoch) == pytest.approx(alpha)
        if schedule.rate(epoch, step) != pytest.approx(rate, rel=1e-12):
            differing.append(step)
            assert schedule.rate(epoch, step) == pytest.approx(lr["warmup"][1]["values"][str(step)])
    # The paper's code jumps to the full rate at step 7; ours goes on climbing to step 10.
    assert differing == [7, 8, 9]


def test_a_short_first_epoch_does_not_make_the_rate_jump():
    schedule = Schedule("step", 1.0, 0.0, 50, 1.0, 0.0, 100)
    rates = [schedule.rate(step // 5, step) for step in range(120)]
    assert max(b - a for a, b in pairwise(rates)) < 0.011
    assert rates[99] == pytest.approx(0.99) and rates[100] == 1.0


def test_retrieval_alpha_rises_over_the_first_epoch(lr):
    golden = lr["retrieval_alpha"]
    schedule = Schedule("cosine", 1.0, 0.0, 6, alpha=golden["alpha"], ramp_epochs=1)
    batches = golden["steps_per_epoch"]
    for i, value in enumerate(golden["epoch0"]):
        assert schedule.ramped_alpha(0, i, batches) == pytest.approx(value)
    assert schedule.ramped_alpha(1, 0, batches) == golden["later"]


def test_no_warmup_starts_at_the_full_rate():
    assert Schedule("step", 3e-4, 0.0, 5, 0.9).rate(0, 0) == 3e-4
