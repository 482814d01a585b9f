"""Shards of a features folder: claimed one by one, shared by jobs, missed by name."""

import numpy as np
import pytest

from infogrowth.commands.embed import parse_part
from infogrowth.data.feature_writer import (
    FeatureWriter,
    automatic_shard_size,
    write_shard,
)
from infogrowth.errors import UserError


def opened(folder, part=None, rows=23):
    return FeatureWriter(folder, {"kind": "test"}, rows, 5, parse_part(part))


def write(output, number):
    rows = output.shards[number]
    names = [str(row) for row in rows]
    features = np.ones((len(rows), 4), np.float32)
    write_shard(output.directory, output.name(number), names, names, features, features)


def test_the_split_is_a_matter_of_the_dataset_alone(tmp_path):
    whole, one_of_three = opened(tmp_path / "whole"), opened(tmp_path / "part", "3/3")
    rows = [range(0, 5), range(5, 10), range(10, 15), range(15, 20), range(20, 23)]
    assert whole.shards == one_of_three.shards == rows
    assert [list(rows) for rows in opened(tmp_path / "empty", rows=0).shards] == [[]]
    assert [automatic_shard_size(rows) for rows in (10, 64_000, 10**7)] == [256, 1000, 10_000]


def test_who_is_slow_takes_fewer_shards_and_holds_nobody(tmp_path):
    output = opened(tmp_path / "f")
    slow, quick = output.claim(), output.claim()
    assert next(slow) == (0, range(0, 5))
    assert [number for number, _ in quick] == [1, 2, 3, 4]
    assert list(slow) == []


def test_finished_shards_are_never_dealt_again(tmp_path):
    output = opened(tmp_path / "f")
    write(output, 1), write(output, 3)
    assert [number for number, _ in opened(tmp_path / "f").claim()] == [0, 2, 4]


def test_a_folder_with_shards_missing_is_not_called_finished(tmp_path):
    """As when nodes share no disk: each writes its shards where rank 0 does not see them."""
    output = opened(tmp_path / "f")
    for number, _ in output.claim():
        if number not in (1, 4):
            write(output, number)
    with pytest.raises(UserError, match=r"\(1, 4\)"):
        output.finish()
    assert opened(tmp_path / "f").finished is False


def test_a_folder_that_grew_counts_all_shards_that_an_interrupted_run_left(tmp_path):
    """Two shards of the first run are lost, and what is new fills only one of their numbers."""

    def opened_for(rows, size):
        samples = [(str(row), str(row)) for row in range(rows)]
        identity = {"kind": "test", "samples": str(rows)}
        return FeatureWriter(tmp_path / "f", identity, rows, size, samples=samples)

    first = opened_for(20, 5)
    write(first, 0), write(first, 3)
    grown = opened_for(22, 20)
    assert [list(rows) for rows in grown.shards] == [[], [*range(5, 15), 20, 21], [], []]
    assert grown.pending == [1, 2]


def test_jobs_share_a_folder_by_parts_and_the_last_one_finishes_it(tmp_path):
    jobs = [opened(tmp_path / "f", part) for part in ("1/3", "2/3", "3/3")]
    assert [[n for n, _ in job.claim()] for job in jobs] == [[0, 3], [1, 4], [2]]
    for job in jobs:
        for number in job.pending:
            write(job, number)
        assert job.finish()["finished"] is (job is jobs[2])
    assert opened(tmp_path / "f", "2/3").finished


def test_a_job_clears_away_only_what_it_left_itself(tmp_path):
    opened(tmp_path / "f")
    (tmp_path / "f" / "img_emb").mkdir()
    own, others = (tmp_path / "f" / "img_emb" / f"img_emb_{n}.npy.tmp-7-aa" for n in (1, 2))
    own.write_bytes(b"half"), others.write_bytes(b"half")
    opened(tmp_path / "f", "2/3")
    assert not own.exists() and others.exists()
    opened(tmp_path / "f")
    assert not others.exists()


@pytest.mark.parametrize("part", ["0/3", "4/3", "3", "a/b", "1/0", "-1/2"])
def test_a_part_that_does_not_exist_is_refused(part):
    with pytest.raises(UserError, match="--part"):
        parse_part(part)
