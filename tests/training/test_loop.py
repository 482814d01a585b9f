"""The training loop: resumed equals uninterrupted, accumulation, odd sizes, broken losses."""

import json
import math

import pytest
import torch

from infogrowth.errors import UserError
from infogrowth.training.checkpointing import load_checkpoint
from infogrowth.training.journal import read_log


def flat(state, prefix=""):
    """Every tensor and plain value of a nested state by its path."""
    if isinstance(state, dict):
        return {k: v for key in state for k, v in flat(state[key], f"{prefix}/{key}").items()}
    if isinstance(state, list | tuple):
        return {k: v for i, x in enumerate(state) for k, v in flat(x, f"{prefix}/{i}").items()}
    return {prefix: state}


def assert_same(one, other):
    one, other = flat(one), flat(other)
    assert one.keys() == other.keys()
    for name, value in one.items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(value, other[name]), name
        else:
            assert value == other[name], name


def lines(trainer):
    """The log without what the clock says."""
    clock = ("time", "samples_per_s")
    records = read_log(trainer.directory / "log.jsonl")
    return [{k: v for k, v in record.items() if k not in clock} for record in records]


@pytest.mark.parametrize("mode", ["two_phase", "proportional"])
@pytest.mark.parametrize("stop", [1, 4, 5])
def test_resumed_equals_uninterrupted_to_the_bit(make_trainer, run, mode, stop):
    """Weights, momentum, queues, optimizer, order, phase, rate, dropout and log."""
    whole = run(make_trainer("whole", mode=mode, checkpoint_every=2))
    first = run(make_trainer("parts", mode=mode, checkpoint_every=2, max_steps=stop))
    assert first.progress.step == stop < whole.progress.step
    second = make_trainer("parts", mode=mode, checkpoint_every=2)
    second.load_state_dict(load_checkpoint(second.checkpoints.find("auto")))
    run(second)
    assert_same(second.state_dict(), whole.state_dict())
    assert lines(second) == lines(whole)
    newest = load_checkpoint(whole.checkpoints.latest())
    assert_same(load_checkpoint(second.checkpoints.latest()), newest)


def test_work_done_after_the_checkpoint_is_forgotten_and_done_again(make_trainer, run):
    """As after a SIGKILL between two checkpoints: log lines are there that no checkpoint knows."""
    whole = run(make_trainer("whole"))
    run(make_trainer("killed", max_steps=3))
    with open(make_trainer("killed").directory / "log.jsonl", "a") as file:
        file.write(json.dumps({"kind": "step", "epoch": 0, "step": 4, "loss": 9.0}) + '\n{"kin')
    again = make_trainer("killed")
    again.load_state_dict(load_checkpoint(again.checkpoints.find("auto")))
    run(again)
    assert_same(again.state_dict(), whole.state_dict())
    assert lines(again) == lines(whole)


def test_training_learns_and_logs_what_a_report_reads(make_trainer, run):
    trainer = run(make_trainer(max_epoch=12, dropout=0.0))
    records = lines(trainer)
    epochs = [record for record in records if record["kind"] == "epoch"]
    assert [record["epoch"] for record in epochs] == list(range(12))
    assert epochs[-1]["loss"] < epochs[0]["loss"] - 0.5
    steps = [record for record in records if record["kind"] == "step"]
    assert [record["step"] for record in steps] == list(range(1, trainer.progress.step + 1))
    for record in steps:
        parts = record["loss_ita"] + record["loss_itm"] + record["loss_lm"]
        assert record["loss"] == pytest.approx(parts, rel=1e-5)
    assert {"epoch", "step", "samples_seen", "lr", "loss"} <= steps[0].keys()
    assert steps[-1]["samples_seen"] == 4 * len(steps)


def test_data_workers_do_not_change_anything(make_trainer, run):
    alone = run(make_trainer("alone", max_epoch=1))
    helped = run(make_trainer("helped", max_epoch=1, workers=2))
    assert_same(alone.state_dict(), helped.state_dict())


def test_training_does_not_move_torchs_global_random_state(make_trainer, run):
    torch.manual_seed(11)
    before = torch.get_rng_state()
    run(make_trainer(max_steps=2))
    assert torch.equal(torch.get_rng_state(), before)


def test_accumulation_is_the_mean_gradient_of_its_batches(make_trainer):
    """Checked on the gradient that the optimizer is given, batch by batch."""
    trainer = make_trainer(gradient_accumulation=3, dropout=0.0, clip_grad_norm=1e9)
    batches = list(trainer.batches.epoch(0))[:3]
    seen = {}

    def spy(optimizer, *_):
        parameters = trainer.model.named_parameters()
        seen.update({n: p.grad.clone() for n, p in parameters if p.grad is not None})

    trainer.optimizer.register_step_pre_hook(spy)
    trainer._optimize(batches, 1e-3, 10)
    slow = make_trainer(dropout=0.0)
    for number, batch in enumerate(batches):
        slow._forward_backward(batch, number, 3, 10)
    expected = {n: p.grad for n, p in slow.model.named_parameters() if p.grad is not None}
    assert seen.keys() == expected.keys() and len(seen) > 50
    for name, gradient in expected.items():
        assert torch.allclose(seen[name], gradient, atol=1e-7), name


def test_accumulation_counts_optimizer_steps_and_takes_the_short_last_window(make_trainer, run):
    trainer = make_trainer(gradient_accumulation=2, mode="uniform", batch_size=5, max_epoch=2)
    assert trainer.batches.count(0) == 4  # 24 rows, the incomplete batch left out
    run(trainer)
    assert trainer.progress.step == 4 and trainer.progress.forwards == 8
    odd = make_trainer("odd", gradient_accumulation=3, mode="uniform", batch_size=6, max_epoch=1)
    run(odd)  # windows of 3 and 1
    assert odd.progress.step == 2 and odd.progress.forwards == 4


def test_each_accumulated_pass_writes_the_queue_and_moves_the_momentum(make_trainer, run):
    trainer = make_trainer(gradient_accumulation=2, mode="uniform", max_steps=1)
    before = trainer.model.vision_proj_m.weight.clone()
    online = trainer.model.vision_proj.weight.clone()
    with torch.no_grad():
        trainer.model.vision_proj_m.weight.mul_(0.5)
    run(trainer)
    assert trainer.model.queue_ptr.item() == 8
    expected = online + (before * 0.5 - online) * trainer.model.momentum**2
    assert torch.allclose(trainer.model.vision_proj_m.weight, expected, atol=1e-6)


def test_padding_to_the_longest_caption_of_the_batch_gives_the_same_losses(make_trainer):
    short, full = make_trainer("a", dropout=0.0), make_trainer("b", dropout=0.0)
    full.forward.longest = False
    batch = next(short.batches.epoch(0))
    for trainer in (short, full):
        trainer.losses = trainer._forward_backward(batch, 0, 1, 5)
    assert torch.allclose(short.losses, full.losses, rtol=1e-5)
    for one, other in zip(short.model.parameters(), full.model.parameters(), strict=True):
        if one.grad is not None:
            assert torch.allclose(one.grad, other.grad, atol=1e-4)


def test_batch_of_one_trains(make_trainer, run):
    trainer = run(make_trainer(batch_size=1, max_steps=3))
    assert all(math.isfinite(record["loss"]) for record in lines(trainer))


@pytest.mark.parametrize("queue_size", [0, 1, 3, 7, 100])
def test_any_queue_size_goes_with_any_batch(make_trainer, run, queue_size):
    trainer = run(make_trainer(queue_size=queue_size, max_steps=3))
    assert all(math.isfinite(record["loss"]) for record in lines(trainer))


def test_fewer_rows_than_a_batch_make_one_short_batch(make_trainer, run):
    trainer = run(make_trainer(rows=3, batch_size=8, mode="uniform", max_epoch=2))
    assert trainer.progress.step == 2 and trainer.progress.samples_seen == 6


class NotFinite(torch.utils.data.Dataset):
    """Becomes infinitely bright at one place of the epoch."""

    def __init__(self, inner, place):
        self.inner, self.place = inner, place

    def __getitem__(self, place):
        item = self.inner[place]
        if place[2] == self.place:
            item["image"] = item["image"] / 0
        return item


def test_loss_that_is_not_finite_stops_before_the_optimizer_step(make_trainer, run):
    healthy = make_trainer("healthy")
    dataset = NotFinite(healthy.batches._loader.dataset._dataset, place=9)
    trainer = make_trainer("broken", dataset=dataset, checkpoint_every=1)
    with pytest.raises(UserError, match=r"not finite at step 3 of epoch 0 \(total nan"):
        run(trainer)
    run_to_two = run(make_trainer("two", max_steps=2))
    for name, weight in trainer.model.named_parameters():
        if not name.split(".")[0].endswith("_m"):
            assert torch.equal(weight, run_to_two.model.get_parameter(name)), name
    saved = load_checkpoint(trainer.checkpoints.latest())
    assert saved["progress"]["step"] == 2


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_lower_precision_trains_near_float32(make_trainer, run, precision):
    exact = lines(run(make_trainer("exact", max_steps=3, dropout=0.0)))
    cast = lines(run(make_trainer("cast", max_steps=3, dropout=0.0, precision=precision)))
    assert cast[0]["loss"] == pytest.approx(exact[0]["loss"], rel=0.01)
    assert cast[0]["loss"] != exact[0]["loss"]
    # fp16 may leave out its first steps while it looks for a loss scale
    assert cast[2]["loss"] == pytest.approx(exact[2]["loss"], rel=0.3)


def test_fp16_resumes_with_its_loss_scale(make_trainer, run):
    whole = run(make_trainer("whole", precision="fp16", max_steps=6))
    run(make_trainer("parts", precision="fp16", max_steps=3))
    second = make_trainer("parts", precision="fp16", max_steps=6)
    second.load_state_dict(load_checkpoint(second.checkpoints.latest()))
    assert_same(run(second).state_dict(), whole.state_dict())


def test_clipping_bounds_the_gradient(make_trainer):
    trainer = make_trainer(clip_grad_norm=0.01)
    norms = []

    def spy(optimizer, *_):
        gradients = [p.grad for group in optimizer.param_groups for p in group["params"]]
        norms.append(torch.nn.utils.get_total_norm([g for g in gradients if g is not None]).item())

    trainer.optimizer.register_step_pre_hook(spy)
    trainer._optimize(list(trainer.batches.epoch(0))[:1], 1e-3, 5)
    assert norms == [pytest.approx(0.01, rel=1e-3)]


def test_resume_refuses_another_model_and_another_annotation_file(make_trainer, run):
    run(make_trainer("a", max_steps=1))
    state = load_checkpoint(make_trainer("a").checkpoints.latest())
    with pytest.raises(UserError, match="does not fit this configuration's model"):
        make_trainer("b", queue_size=21).load_state_dict(state)
    with pytest.raises(UserError, match="number of samples changed from 24 to 20"):
        make_trainer("c", rows=20).load_state_dict(state)


def test_unreadable_sample_stops_with_its_own_sentence(make_trainer, run):
    class Missing(torch.utils.data.Dataset):
        def __getitem__(self, place):
            raise UserError("the key '000123' is not in the LMDB images")

    for workers in (0, 1):
        trainer = make_trainer(f"w{workers}", dataset=Missing(), workers=workers)
        with pytest.raises(UserError, match=r"^the key '000123' is not in the LMDB images$"):
            run(trainer)
