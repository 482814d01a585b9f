"""Gain sampling against the frequencies and phases of the paper's own code (golden B)."""

import json
import subprocess
import sys

import numpy as np
import pytest
from torch.utils.data import BatchSampler, DataLoader

from infogrowth.annotations import gains_array, load_annotations
from infogrowth.errors import UserError
from infogrowth.growth.sampling import (
    GainSampler,
    normalized_gains,
    select_bernoulli,
    select_top,
)

EPOCHS = 3000
# Five standard deviations of a mean of EPOCHS draws of probability 1/2, plus the golden file's own.
TOLERANCE = 5 * 0.5 / np.sqrt(EPOCHS) + 0.03


@pytest.fixture(scope="module")
def raw(golden):
    return gains_array(load_annotations(golden / "sampling_annotations.json"))


@pytest.fixture(scope="module")
def fixture(golden):
    return np.load(golden / "sampling_n200.npz")


def sequence(raw, mode="two_phase", epoch=0):
    """What one rank alone draws."""
    sampler = GainSampler(raw, mode=mode)
    sampler.set_epoch(epoch)
    return np.array(list(sampler))


def visits(raw, mode, epochs):
    counts = [np.bincount(sequence(raw, mode, epoch), minlength=len(raw)) for epoch in epochs]
    return np.mean(counts, axis=0)


def test_normalised_gains_are_the_golden_ones_with_negatives_clipped(raw, fixture):
    np.testing.assert_allclose(normalized_gains(raw), fixture["p_prune"], rtol=0, atol=1e-15)


def test_static_gains_are_the_golden_ones(golden):
    selection = np.load(golden / "selection_seed0.npz")
    static = normalized_gains(selection["gains_hnsw"])
    np.testing.assert_allclose(static, selection["static_gain_hnsw"], rtol=0, atol=1e-12)


def test_two_phase_even_epochs_draw_by_gain(raw, fixture):
    frequency = visits(raw, "two_phase", range(0, 2 * EPOCHS, 2))
    np.testing.assert_allclose(frequency, fixture["p_prune"], atol=TOLERANCE - 0.03)
    np.testing.assert_allclose(frequency, fixture["freq_prune_20000"], atol=TOLERANCE)


def test_two_phase_odd_epochs_draw_by_what_is_left_of_the_gain(raw, fixture):
    frequency = visits(raw, "two_phase", range(1, 2 * EPOCHS, 2))
    np.testing.assert_allclose(frequency, fixture["p_reverse"], atol=TOLERANCE - 0.03)
    np.testing.assert_allclose(frequency, fixture["freq_reverse_20000"], atol=TOLERANCE)


def test_two_phase_epoch_lengths_follow_the_phases(raw, golden):
    meta = json.loads((golden / "sampling_meta.json").read_text())
    sampler = GainSampler(raw)
    lengths = np.zeros((EPOCHS // 2, 2))
    for epoch in range(EPOCHS):
        sampler.set_epoch(epoch)
        lengths[epoch // 2, epoch % 2] = len(sampler)
    even, odd = lengths.mean(axis=0)
    assert abs(even - meta["mean_len_prune"]) < 1
    assert abs(odd - meta["mean_len_reverse"]) < 1


def test_two_phase_takes_a_sample_at_most_once_per_epoch(raw):
    sampler = GainSampler(raw)
    for epoch in range(20):
        sampler.set_epoch(epoch)
        rows = list(sampler)
        assert len(rows) == len(sampler) == len(set(rows))


def test_proportional_visits_are_the_golden_ones(raw, fixture):
    expected = fixture["v1_mean_visits_per_epoch_4000"]
    frequency = visits(raw, "proportional", range(EPOCHS))
    # up to 3 visits an epoch, standard deviation below 0.8
    np.testing.assert_allclose(frequency, expected, atol=5 * 0.8 * np.sqrt(1 / EPOCHS + 1 / 4000))


def test_proportional_epoch_has_n_draws_in_passes_without_repeats(raw):
    sampler = GainSampler(raw, mode="proportional")
    certain = np.flatnonzero(normalized_gains(raw) == 1)
    for epoch in range(20):
        sampler.set_epoch(epoch)
        rows = np.array(list(sampler))
        assert len(rows) == len(raw)
        # A sample of probability 1 is in every whole pass: N draws are 2.3 passes here on average.
        counts = np.bincount(rows, minlength=len(raw))
        assert counts.max() <= counts[certain].min() + 1
        assert len(set(rows[: counts[certain].min()])) == counts[certain].min()


def test_uniform_is_every_sample_once(raw):
    rows = list(GainSampler(raw, mode="uniform"))
    assert sorted(rows) == list(range(len(raw))) and rows != sorted(rows)


def test_epoch_order_is_random(raw):
    first, second = [], []
    for epoch in range(300):
        rows = sequence(raw, "proportional", epoch)
        first.append(rows[:40].mean())
        second.append(rows[40:80].mean())
    assert abs(np.mean(first) - np.mean(second)) < 5 * 60 / np.sqrt(40 * 300) * 2


@pytest.mark.parametrize("mode", ["two_phase", "proportional", "uniform"])
def test_sequence_depends_on_seed_and_epoch_alone_and_leaves_global_numpy_alone(raw, mode):
    np.random.seed(7)
    before = np.random.get_state()[1].copy()
    one, other = GainSampler(raw, mode=mode, seed=5), GainSampler(raw, mode=mode, seed=5)
    for epoch in (0, 3, 1):  # one abandons epochs and wanders, the other goes straight there
        one.set_epoch(epoch)
        next(iter(one))
    np.random.rand(3)
    other.set_epoch(1)
    assert list(one) == list(other)
    np.random.seed(7)
    assert (np.random.get_state()[1] == before).all()
    assert list(GainSampler(raw, mode=mode, seed=6)) != list(GainSampler(raw, mode=mode, seed=5))


def test_sampling_does_not_move_numpys_global_state(raw):
    np.random.seed(3)
    before = np.random.get_state()
    sampler = GainSampler(raw)
    sampler.set_epoch(4)
    list(sampler)
    select_bernoulli(raw, seed=1)
    after = np.random.get_state()
    assert before[2] == after[2] and (before[1] == after[1]).all()


@pytest.mark.parametrize("mode", ["two_phase", "proportional", "uniform"])
@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 7])
def test_ranks_take_turns_over_one_padded_sequence(raw, mode, world_size):
    for epoch in range(3):
        ranks = []
        for rank in range(world_size):
            sampler = GainSampler(raw, mode=mode, rank=rank, world_size=world_size)
            sampler.set_epoch(epoch)
            assert len(sampler) == -(-len(sequence(raw, mode, epoch)) // world_size)
            ranks.append(list(sampler))
        woven = np.array(ranks).T.reshape(-1)
        whole = sequence(raw, mode, epoch)
        assert (woven[: len(whole)] == whole).all()
        assert (woven[len(whole) :] == whole[: len(woven) - len(whole)]).all()


def test_more_ranks_than_rows_repeat_the_head():
    ranks = [list(GainSampler([1.0, 1.0], "uniform", rank=r, world_size=5)) for r in range(5)]
    assert [len(rows) for rows in ranks] == [1] * 5
    assert ranks[0] == ranks[2] == ranks[4] != ranks[1] == ranks[3]


@pytest.mark.parametrize("mode", ["two_phase", "proportional", "uniform"])
@pytest.mark.parametrize("epoch", [0, 1, 2])
@pytest.mark.parametrize("stop", [0, 1, 17])
def test_resume_yields_exactly_what_was_left(raw, mode, epoch, stop):
    def fresh():
        return GainSampler(raw, mode=mode, seed=2, rank=1, world_size=2)

    sampler = fresh()
    sampler.set_epoch(epoch)
    whole = list(sampler)
    iterator = iter(sampler)
    head = [next(iterator) for _ in range(stop)]
    state = json.loads(json.dumps(sampler.state_dict()))  # plain values

    resumed = fresh()
    resumed.load_state_dict(state)
    resumed.set_epoch(epoch)  # as a training loop does before every epoch
    assert len(resumed) == len(whole) - stop
    assert head + list(resumed) == whole
    resumed.set_epoch(epoch + 1)
    sampler.set_epoch(epoch + 1)
    assert list(resumed) == list(sampler)


def test_state_counts_what_training_consumed_not_what_workers_fetched(raw):
    sampler = GainSampler(raw)
    iterator = iter(sampler)
    rows = [next(iterator) for _ in range(30)]
    state = sampler.state_dict(consumed=12)
    sampler.load_state_dict(state)
    assert [next(iter(sampler))] == rows[12:13]


def test_resume_on_another_number_of_ranks_skips_no_sample(raw):
    four = [GainSampler(raw, rank=r, world_size=4) for r in range(4)]
    state = four[0].state_dict(consumed=5)
    rest = set()
    for rank in range(2):
        two = GainSampler(raw, rank=rank, world_size=2)
        two.load_state_dict(state)
        rest |= set(two)
    done = {row for sampler in four for row in list(sampler)[:5]}
    assert done | rest == set(sequence(raw).tolist())


def test_positions_name_the_position_in_the_global_sequence(raw):
    samplers = [GainSampler(raw, "proportional", rank=r, world_size=2) for r in range(2)]
    positions = {at: row for s in samplers for row, _, at in s.positions()}
    assert [positions[i] for i in range(len(raw))] == sequence(raw, "proportional").tolist()
    state = samplers[1].state_dict(consumed=60)
    samplers[1].load_state_dict(state)
    assert next(samplers[1].positions()) == (positions[121], 0, 121)


@pytest.mark.parametrize(
    ("key", "other"),
    [("mode", {"mode": "uniform"}), ("seed", {"seed": 9}), ("gains", {"scale": True})],
)
def test_resume_refuses_another_run(raw, key, other):
    gains = raw[:, ::-1] * np.linspace(1, 2, len(raw))[:, None] if "scale" in other else raw
    state = GainSampler(gains, **{k: v for k, v in other.items() if k != "scale"}).state_dict()
    with pytest.raises(UserError, match=key):
        GainSampler(raw).load_state_dict(state)


def test_misspelt_mode_is_an_error_with_the_nearest_name(raw):
    with pytest.raises(UserError, match="'proportional'"):
        GainSampler(raw, mode="proptional")


@pytest.mark.parametrize("mode", ["two_phase", "proportional"])
@pytest.mark.parametrize("gains", [np.zeros((5, 2)), np.zeros(3), -np.ones((4, 2))])
def test_zero_total_gain_is_an_error_that_says_so(mode, gains):
    with pytest.raises(UserError, match="zero"):
        GainSampler(gains, mode=mode)
    assert len(GainSampler(gains, mode="uniform")) == len(gains)


def test_tiny_and_rare_gains_end_and_keep_their_odds():
    tiny = np.full(1000, 1e-300)
    assert sorted(GainSampler(tiny, "proportional")) == list(range(1000))
    rare = np.zeros(200_000)
    rare[[5, 77_777]] = 1e-9
    counts = np.bincount(list(GainSampler(rare, "proportional")), minlength=200_000)
    assert counts[5] == counts[77_777] == 100_000
    assert len(GainSampler(rare)) == 2


def test_one_sample_is_drawn_in_every_epoch():
    for mode in ("two_phase", "proportional", "uniform"):
        sampler = GainSampler([[0.3, 0.5]], mode=mode)
        for epoch in range(30):
            sampler.set_epoch(epoch)
            assert list(sampler) == [0]


@pytest.mark.parametrize("gains", [np.zeros((0, 2)), [[0.1, np.nan]], [[np.inf, 1.0]]])
def test_gains_that_cannot_be_normalised_are_refused(gains):
    with pytest.raises(UserError, match=r"gains|finite"):
        normalized_gains(gains)


def test_a_data_loader_takes_the_sampler(raw):
    sampler = GainSampler(raw)
    rows = [int(r) for r in DataLoader(range(200), sampler=sampler, batch_size=7) for r in r]
    assert rows == sequence(raw).tolist()
    assert len(BatchSampler(sampler, 7, drop_last=False)) == -(-len(sampler) // 7)


def test_bernoulli_selection_follows_the_static_gain(raw, fixture):
    counts = np.zeros(200)
    for seed in range(EPOCHS):
        counts[select_bernoulli(raw, seed=seed)] += 1
    np.testing.assert_allclose(counts / EPOCHS, fixture["p_prune"], atol=TOLERANCE - 0.03)
    assert (select_bernoulli(raw, 3) == select_bernoulli(raw, 3)).all()


def test_top_selection_is_by_mean_gain_with_earlier_rows_first():
    gains = np.array([[0.5, 0.5], [0.9, 0.7], [0.1, 0.1], [0.4, 0.6], [0.8, 0.8]])
    assert select_top(gains, 2).tolist() == [1, 4]
    assert select_top(gains, 3).tolist() == [0, 1, 4]
    with pytest.raises(UserError, match="6"):
        select_top(gains, 6)


def test_importing_the_sampler_does_not_load_torch():
    check = "import infogrowth.growth.sampling, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", check]).returncode == 0
