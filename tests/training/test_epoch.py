"""The training loop: resumed equals uninterrupted, accumulation, odd sizes, broken losses."""

import json
import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from infogrowth.errors import UserError
from infogrowth.training import checkpoints
from infogrowth.training.epoch import forward_backward, optimizer_step


def flat(state, prefix=""):
    """Every tensor and plain value of a nested state by its path, but for the run's options."""
    if isinstance(state, dict):
        keys = state.keys() - {"run"}
        return {k: v for key in keys for k, v in flat(state[key], f"{prefix}/{key}").items()}
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


@pytest.mark.parametrize("mode", ["two_phase", "proportional"])
@pytest.mark.parametrize("stop", [1, 4, 5])
def test_resumed_equals_uninterrupted_to_the_bit(make_run, mode, stop):
    """Weights, momentum, queues, optimizer, order, phase, rate, dropout and log."""
    whole = make_run("whole", mode=mode, checkpoint_every=2).train()
    first = make_run("parts", mode=mode, checkpoint_every=2, max_steps=stop).train()
    assert first.progress.step == stop < whole.progress.step
    second = make_run("parts", mode=mode, checkpoint_every=2)
    second.resume().train()
    assert_same(second.state.state_dict(), whole.state.state_dict())
    assert second.log() == whole.log()
    newest = whole.newest()
    assert_same(second.newest(), newest)


def test_work_done_after_the_checkpoint_is_forgotten_and_done_again(make_run):
    """As after a SIGKILL between two checkpoints: log lines are there that no checkpoint knows."""
    whole = make_run("whole").train()
    make_run("killed", max_steps=3).train()
    with open(make_run("killed").directory / "log.jsonl", "a") as file:
        file.write(json.dumps({"kind": "step", "epoch": 0, "step": 4, "loss": 9.0}) + '\n{"kin')
    again = make_run("killed")
    again.resume().train()
    assert_same(again.state.state_dict(), whole.state.state_dict())
    assert again.log() == whole.log()


def test_training_learns_and_logs_what_a_report_reads(make_run):
    small = make_run(max_epoch=12, dropout=0.0).train()
    records = small.log()
    epochs = [record for record in records if record["kind"] == "epoch"]
    assert [record["epoch"] for record in epochs] == list(range(12))
    assert epochs[-1]["loss"] < epochs[0]["loss"] - 0.5
    steps = [record for record in records if record["kind"] == "step"]
    assert [record["step"] for record in steps] == list(range(1, small.progress.step + 1))
    for record in steps:
        parts = record["loss_ita"] + record["loss_itm"] + record["loss_lm"]
        assert record["loss"] == pytest.approx(parts, rel=1e-5)
    assert {"epoch", "step", "samples_seen", "lr", "loss"} <= steps[0].keys()
    assert steps[-1]["samples_seen"] == 4 * len(steps)


@pytest.mark.parametrize("window", [1, 2])
def test_batches_left_are_counted_to_what_ends_the_run(make_run, window):
    """24 rows in batches of 5: 4 batches an epoch; a run of 5 steps ends in the second."""
    options = {"mode": "uniform", "batch_size": 5, "gradient_accumulation": window}
    whole = make_run("whole", max_epoch=3, **options).state
    assert whole.batches_left() == 12
    short = make_run("short", max_epoch=100_000, max_steps=5, **options)
    assert short.state.batches_left() == 5 * window
    short.train()
    assert short.state.batches_left() == 0
    again = make_run("short", max_epoch=100_000, max_steps=7, **options)
    again.resume()
    assert again.state.batches_left() == 2 * window


def test_the_time_left_is_that_of_the_steps_left(make_run, caplog):
    caplog.set_level("INFO")
    make_run(max_epoch=100_000, max_steps=3).train()
    assert [r.message.split()[-2] for r in caplog.records if " step " in r.message][2] == "00:00"


def test_data_workers_do_not_change_anything(make_run):
    alone = make_run("alone", max_epoch=1).train()
    helped = make_run("helped", max_epoch=1, workers=2).train()
    assert_same(alone.state.state_dict(), helped.state.state_dict())


def test_training_does_not_move_torchs_global_random_state(make_run):
    torch.manual_seed(11)
    before = torch.get_rng_state()
    make_run(max_steps=2).train()
    assert torch.equal(torch.get_rng_state(), before)


def test_accumulation_is_the_mean_gradient_of_its_batches(make_run):
    """Checked on the gradient that the optimizer is given, batch by batch."""
    small = make_run(gradient_accumulation=3, dropout=0.0, clip_grad_norm=1e9)
    batches = list(small.loader.epoch(0))[:3]
    seen = {}

    def spy(optimizer, *_):
        parameters = small.model.named_parameters()
        seen.update({n: p.grad.clone() for n, p in parameters if p.grad is not None})

    small.optimizer.register_step_pre_hook(spy)
    optimizer_step(small.state, batches)
    apart = make_run(dropout=0.0)
    for batch in batches:
        forward_backward(apart.state, batch, 3)
    expected = {n: p.grad for n, p in apart.model.named_parameters() if p.grad is not None}
    assert seen.keys() == expected.keys() and len(seen) > 50
    for name, gradient in expected.items():
        assert torch.allclose(seen[name], gradient, atol=1e-7), name


def test_accumulation_counts_optimizer_steps_and_takes_the_short_last_window(make_run):
    small = make_run(gradient_accumulation=2, mode="uniform", batch_size=5, max_epoch=2)
    assert small.loader.count(0) == 4  # 24 rows, the incomplete batch left out
    small.train()
    assert small.progress.step == 4 and small.progress.forwards == 8
    odd = make_run("odd", gradient_accumulation=3, mode="uniform", batch_size=6, max_epoch=1)
    odd.train()  # windows of 3 and 1
    assert odd.progress.step == 2 and odd.progress.forwards == 4


def test_each_accumulated_pass_writes_the_queue_and_moves_the_momentum(make_run):
    small = make_run(gradient_accumulation=2, mode="uniform", max_steps=1)
    before = small.model.vision_proj_m.weight.clone()
    online = small.model.vision_proj.weight.clone()
    with torch.no_grad():
        small.model.vision_proj_m.weight.mul_(0.5)
    small.train()
    assert small.model.queue_ptr.item() == 8
    expected = online + (before * 0.5 - online) * small.model.momentum**2
    assert torch.allclose(small.model.vision_proj_m.weight, expected, atol=1e-6)


def test_padding_to_the_longest_caption_of_the_batch_gives_the_same_losses(make_run):
    short = make_run("a", dropout=0.0)
    full = make_run("b", dropout=0.0, longest=False)
    found = []
    for small in (short, full):
        batch = next(small.loader.epoch(0))
        found.append(forward_backward(small.state, batch))
    assert batch["ids"].shape[1] == 12
    for name, value in found[0].items():
        assert torch.allclose(value, found[1][name], rtol=1e-5), name
    for one, other in zip(short.model.parameters(), full.model.parameters(), strict=True):
        if one.grad is not None:
            assert torch.allclose(one.grad, other.grad, atol=1e-4)


def test_batch_of_one_trains(make_run):
    small = make_run(batch_size=1, max_steps=3).train()
    assert all(math.isfinite(record["loss"]) for record in small.log())


@pytest.mark.parametrize("queue_size", [0, 1, 3, 7, 100])
def test_any_queue_size_goes_with_any_batch(make_run, queue_size):
    small = make_run(queue_size=queue_size, max_steps=3).train()
    assert all(math.isfinite(record["loss"]) for record in small.log())


def test_fewer_rows_than_a_batch_make_one_short_batch(make_run):
    small = make_run(rows=3, batch_size=8, mode="uniform", max_epoch=2).train()
    assert small.progress.step == 2 and small.progress.samples_seen == 6


class NotFinite(torch.utils.data.Dataset):
    """Becomes infinitely bright at one position of the epoch."""

    def __init__(self, inner, position):
        self.inner, self.position = inner, position

    def __getitem__(self, index):
        item = self.inner[index]
        if index[2] == self.position:
            item["image"] = item["image"] / 0
        return item


@pytest.mark.parametrize("checkpoint_every", [1, 2, 100])
def test_loss_that_is_not_finite_stops_the_run_before_a_checkpoint_of_it(
    make_run, checkpoint_every
):
    healthy = make_run("healthy")
    dataset = NotFinite(healthy.loader._loader.dataset, position=9)
    small = make_run("broken", dataset=dataset, checkpoint_every=checkpoint_every)
    with pytest.raises(UserError, match="step 3"):
        small.train()
    if checkpoint_every == 100:
        assert checkpoints.latest(small.state.checkpoints) is None
        return
    saved = small.newest()
    assert saved["progress"]["step"] == 2
    to_two = make_run("two", max_steps=2).train().newest()
    assert_same(saved["model"], to_two["model"])


# What makes the host wait for the device, by its name in a CPU's stead.
WAITS = {
    "_local_scalar_dense", "is_nonzero", "nonzero", "multinomial", "masked_select", "equal",
    "unique_dim", "_unique2", "bincount", "allclose", "is_pinned",
}  # fmt: skip


class Waiting(TorchDispatchMode):
    """Counts what would make the host wait, were the CPU a GPU."""

    def __init__(self):
        super().__init__()
        self.waits = []

    def __torch_dispatch__(self, operation, types, arguments=(), options=None):
        name = operation.name().removeprefix("aten::").partition(".")[0]
        indexed = name == "index" and any(
            index is not None and index.dtype == torch.bool for index in arguments[1]
        )
        if name in WAITS or indexed:
            self.waits.append(name)
        return operation(*arguments, **(options or {}))


@pytest.mark.parametrize("options", [{}, {"clip_grad_norm": 1.0}, {"gradient_accumulation": 2}])
def test_an_optimizer_step_never_waits_for_the_device(make_run, monkeypatch, options):
    small = make_run(**options)
    batches = list(small.loader.epoch(0))[:2]
    monkeypatch.setattr(torch.Tensor, "tolist", lambda tensor: pytest.fail("read from the device"))
    with Waiting() as counted:
        optimizer_step(small.state, batches)
    assert counted.waits == []


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_lower_precision_trains_near_float32(make_run, precision):
    exact = make_run("exact", max_steps=3, dropout=0.0).train().log()
    cast = make_run("cast", max_steps=3, dropout=0.0, precision=precision).train().log()
    assert cast[0]["loss"] == pytest.approx(exact[0]["loss"], rel=0.01)
    assert cast[0]["loss"] != exact[0]["loss"]
    # fp16 may leave out its first steps while it looks for a loss scale
    assert cast[2]["loss"] == pytest.approx(exact[2]["loss"], rel=0.3)


def test_fp16_resumes_with_its_loss_scale(make_run):
    whole = make_run("whole", precision="fp16", max_steps=6).train()
    make_run("parts", precision="fp16", max_steps=3).train()
    second = make_run("parts", precision="fp16", max_steps=6)
    second.resume()
    assert_same(second.train().state.state_dict(), whole.state.state_dict())


def test_clipping_bounds_the_gradient(make_run):
    small = make_run(clip_grad_norm=0.01)
    norms = []

    def spy(optimizer, *_):
        gradients = [p.grad for group in optimizer.param_groups for p in group["params"]]
        norms.append(torch.nn.utils.get_total_norm([g for g in gradients if g is not None]).item())

    small.optimizer.register_step_pre_hook(spy)
    optimizer_step(small.state, list(small.loader.epoch(0))[:1])
    assert norms == [pytest.approx(0.01, rel=1e-3)]


def test_resume_refuses_another_model_and_another_annotation_file(make_run):
    make_run("a", max_steps=1).train()
    state = make_run("a").newest()
    with pytest.raises(UserError, match="model"):
        make_run("b", queue_size=21).state.load_state_dict(state)
    with pytest.raises(UserError, match="from 24 to 20"):
        make_run("c", rows=20).state.load_state_dict(state)


def test_unreadable_sample_stops_with_its_own_sentence(make_run):
    class Missing(torch.utils.data.Dataset):
        def __getitem__(self, index):
            raise UserError("the key '000123' is not in the LMDB images")

    for workers in (0, 1):
        small = make_run(f"w{workers}", dataset=Missing(), workers=workers)
        with pytest.raises(UserError, match=r"^the key '000123' is not in the LMDB images$"):
            small.train()
