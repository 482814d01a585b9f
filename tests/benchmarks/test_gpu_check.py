"""The check for GPUs runs on a CPU too, so that it cannot rot, and on a bare machine."""

import importlib.util
import json
import os
import subprocess
import sys

import pytest
import torch

MISSING = ("lmdb", "faiss", "pycocotools", "tensorboard", "matplotlib", "duckdb", "webdataset")
# A machine that lacks these: importing one of them fails, as there.
START = """
import runpy, sys
sys.modules.update(dict.fromkeys({missing}))
sys.path.insert(0, {folder})
sys.argv[0] = {script}
runpy.run_path({script}, run_name="__main__")
"""


def start(repository, missing, *arguments):
    script = repository / "benchmarks" / "gpu_check.py"
    program = START.format(
        missing=missing, folder=repr(str(script.parent)), script=repr(str(script))
    )
    return subprocess.run(
        [sys.executable, "-c", program, "--device", "cpu", "--small", *arguments],
        capture_output=True, text=True, timeout=600, env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip


def test_all_checks_pass_on_a_bare_machine_without_a_gpu(repository, tmp_path):
    ran = start(repository, MISSING, "--json", str(tmp_path / "check.json"))
    assert ran.returncode == 0, ran.stdout + ran.stderr
    written = json.loads((tmp_path / "check.json").read_text())
    assert written["counts"]["FAIL"] == 0
    checks = {row["check"] for row in written["rows"]}
    assert checks == {"versions", "exact", "certificate", "grow", "cells", "scale", "embedding",
                      "golden", "resume", "evaluation", "ranks", "training"}  # fmt: skip
    assert all(row["what"] in ran.stdout for row in written["rows"])


@pytest.fixture(scope="module")
def gpu_check(repository):
    sys.path.insert(0, str(repository / "benchmarks"))
    path = repository / "benchmarks" / "gpu_check.py"
    spec = importlib.util.spec_from_file_location("gpu_check", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules["gpu_check"] = module
    spec.loader.exec_module(module)
    yield module
    sys.path.remove(str(repository / "benchmarks"))


def test_a_check_that_fails_does_not_keep_the_others_and_is_status_1(
    gpu_check, tmp_path, monkeypatch, capsys
):
    def broken(machine):
        yield machine.holds("one and one", True, 2, "2")
        raise RuntimeError("a kernel is missing")

    def wrong(machine):
        yield machine.within("an error", 0.5, 0.1)

    monkeypatch.setattr(gpu_check, "CHECKS", {"broken": broken, "wrong": wrong})
    config = gpu_check.Config(device="cpu", json=str(tmp_path / "c.json"))
    assert gpu_check.run(config) == 1
    rows = json.loads((tmp_path / "c.json").read_text())["rows"]
    assert [row["verdict"] for row in rows] == ["pass", "FAIL", "FAIL"]
    assert "a kernel is missing" in rows[1]["value"]
    assert "a kernel is missing" in capsys.readouterr().out


def test_speed_is_binding_only_where_the_aims_were_set(gpu_check, tmp_path):
    machine = gpu_check.Machine(torch.device("cpu"), False, tmp_path, "x")
    machine.__dict__["name"] = "NVIDIA H100 80GB HBM3"
    assert machine.aim("rate", 10, 20, "pairs/s").verdict == "FAIL"
    assert machine.aim("time", 10, 20, "s", at_most=True).verdict == "pass"
    machine.__dict__["name"] = "NVIDIA L4"
    assert machine.aim("rate", 10, 20, "pairs/s").verdict == "measured"
