"""A killed `grow` goes on where it was and ends with the same bytes as an uninterrupted one."""

import random

import pytest

from infogrowth.growth.ledger import read_growth


@pytest.fixture
def job(selection):
    """Two commands, one after the other: seeds and a stream, then a recaption table for it."""
    stream = selection.folder("stream", range(100, 700), shard_rows=150)
    seeds = selection.folder("seeds", range(60))
    table = selection.recaptions()

    def commands(name):
        common = ["grow", "--quiet", "--features", stream, "--batch-size", "40"]
        common += ["--commit-rows", "100", "--growth", selection.home / name]
        first = [*common, "--seed-features", seeds, "--output", selection.home / f"{name}.1.json"]
        again = [*common, "--recaptions", table, "--output", selection.home / f"{name}.2.json"]
        return first, again

    return commands


def outcome(selection, name):
    """What must be the same: both result files, and every decision and kept feature."""
    folder = read_growth(selection.home / name)
    files = [(selection.home / f"{name}.{number}.json").read_bytes() for number in (1, 2)]
    features = [folder.kept_features(space).tobytes() for space in ("image", "text")]
    return files, folder.decisions().to_pylist(), features


def check_same(selection, name):
    expected_files, expected_decisions, expected_features = outcome(selection, "whole")
    files, decisions, features = outcome(selection, name)
    assert files == expected_files
    assert decisions == expected_decisions
    assert features == expected_features
    assert not any(selection.home.rglob("*.tmp-*"))


def test_killed_at_every_kind_of_step_ends_with_the_same_bytes(selection, job, forked):
    total = 0
    for command in job("whole"):
        answer = forked(command)
        assert answer["status"] == 0, answer["printed"]
        total += answer["steps"]
    assert total > 60  # many commits, so many moments

    dice = random.Random(0)
    kills = 0
    for command in job("killed"):
        while True:
            # A commit takes about 12 steps: some runs get one done, some none.
            step, after = dice.randint(3, 20), dice.random() < 0.5
            answer = forked(command, kill_at_step=step, after_step=after)
            if answer["status"] == 0:
                break
            assert answer["status"] == -9, answer["printed"]
            kills += 1
            assert kills < 40
    assert kills >= 8
    check_same(selection, "killed")


def test_killed_at_random_moments_ends_with_the_same_bytes(selection, job, forked):
    seconds = []
    for command in job("whole"):
        answer = forked(command)
        assert answer["status"] == 0, answer["printed"]
        seconds.append(answer["seconds"])

    dice = random.Random(1)
    for command, usual in zip(job("killed"), seconds, strict=True):
        statuses = [
            forked(command, kill_after=dice.uniform(0.05, 0.9) * usual)["status"] for _ in range(6)
        ]
        assert set(statuses) <= {-9, 0}  # how many were in time is the machine's affair
        answer = forked(command)
        assert answer["status"] == 0, answer["printed"]
    check_same(selection, "killed")


def test_a_full_disk_loses_nothing_that_was_committed(selection, job, forked):
    for command in job("whole"):
        assert forked(command)["status"] == 0
    first, again = job("full")
    # About 80 samples of a part join, 20 kB of features: enough for some parts, not for all.
    answer = forked(first, file_limit=20_600)
    assert answer["status"] == 2
    assert "error: cannot write" in answer["printed"]
    assert "File too large" in answer["printed"]
    folder = read_growth(selection.home / "full")
    committed = folder.totals["pairs"]
    assert 0 < committed < 660
    assert folder.decisions(["id"]).num_rows == committed
    assert not (selection.home / "full.1.json").exists()
    assert forked(first)["status"] == 0
    assert forked(again)["status"] == 0
    check_same(selection, "full")


def test_a_killed_run_leaves_no_lock_behind(job, forked):
    first, again = job("whole")
    assert forked(first, kill_at_step=8)["status"] == -9
    answer = forked(first)
    assert answer["status"] == 0, answer["printed"]
    assert forked(again)["status"] == 0
