import json

import numpy as np
import pandas as pd
import pytest

from infogrowth.errors import UserError
from infogrowth.report.training_runs import read_run, read_runs, smoothed


def write(folder, *records, tail=""):
    folder.mkdir(parents=True, exist_ok=True)
    lines = "".join(json.dumps(record) + "\n" for record in records)
    (folder / "log.jsonl").write_text(lines + tail)
    return str(folder)


def step(number, loss, **more):
    return {"kind": "step", "step": number, "samples_seen": 10 * number, "loss": loss, **more}


def epoch(number, loss, **recalls):
    record = {"kind": "epoch", "step": number, "samples_seen": 10 * number, "loss": loss}
    return {**record, "recall": {"val": recalls}} if recalls else record


def test_losses_come_from_steps_and_recalls_from_epochs(tmp_path):
    run = read_run(
        write(
            tmp_path / "run",
            step(1, 4.0, samples_per_s=100, time=1000.0),
            step(2, 3.0, samples_per_s=120, time=1900.0),
            epoch(2, 3.5, r_mean=40.0, txt_r1=30.0),
            step(3, 2.0, samples_per_s=110, time=2800.0),
            epoch(3, 2.5, r_mean=38.0, txt_r1=35.0),
        )
    )
    assert run.name == "run"
    assert run.loss.index.tolist() == [10, 20, 30]
    assert run.loss.tolist() == [4, 3, 2]
    assert run.recall.tolist() == [40, 38]
    assert run.recall_table == {"r_mean": 40, "txt_r1": 30}  # of the best evaluation
    assert (run.samples_seen, run.samples_per_second, run.hours) == (30, 110, 0.5)


def test_a_run_that_logged_epochs_only_shows_their_losses(tmp_path):
    run = read_run(write(tmp_path / "run", epoch(5, 3.0), epoch(10, 2.0)))
    assert run.loss.tolist() == [3, 2]
    assert len(run.recall) == 0


def test_steps_that_a_resumed_run_did_again_count_once(tmp_path):
    run = read_run(write(tmp_path / "run", step(1, 4.0), step(2, 3.0), step(1, 5.0)))
    assert run.loss.tolist() == [5, 3]


def test_a_last_line_that_is_not_finished_is_ignored(tmp_path):
    run = read_run(write(tmp_path / "run", step(1, 4.0), tail='{"kind": "st'))
    assert run.loss.tolist() == [4]


def test_a_broken_line_in_the_middle_is_named(tmp_path):
    folder = write(tmp_path / "run", step(1, 4.0), tail="oops\n" + json.dumps(step(2, 1.0)) + "\n")
    with pytest.raises(UserError, match=r"line 2 of .*log\.jsonl"):
        read_run(folder)


def test_a_folder_without_a_log_is_refused(tmp_path):
    with pytest.raises(UserError, match="training run"):
        read_run(tmp_path)


def test_a_log_of_something_else_is_refused(tmp_path):
    with pytest.raises(UserError, match="losses"):
        read_run(write(tmp_path / "run", {"hello": 1}))


def test_runs_of_the_same_name_get_their_parent_folder(tmp_path):
    folders = [write(tmp_path / kind / "pretrain", step(1, 4.0)) for kind in ("full", "grown")]
    assert [run.name for run in read_runs(folders)] == ["full/pretrain", "grown/pretrain"]


def test_smoothing_averages_stretches_and_keeps_the_mean():
    values = np.arange(1000.0)
    means = smoothed(pd.Series(values, index=values), limit=100)
    assert len(means) == 100
    assert means.iloc[0] == np.arange(10).mean()
    assert means.index[0] == 5
    assert means.mean() == pytest.approx(values.mean())
    assert smoothed(pd.Series(values[:7]), limit=100).tolist() == values[:7].tolist()


def test_the_recalls_of_a_pretraining_are_read_from_its_validation_records(tmp_path):
    records = [{"kind": "step", "step": 1, "samples_seen": 64, "loss": 2.0}]
    records += [{"kind": "val", "step": 1, "samples_seen": 64, "r_mean": 41.5, "txt_r1": 20.0}]
    (tmp_path / "log.jsonl").write_text("\n".join(map(json.dumps, records)))
    run = read_run(tmp_path)
    assert run.recall_table == {"r_mean": 41.5, "txt_r1": 20.0}
    assert run.recall.index.tolist() == [64]
