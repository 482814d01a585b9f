"""Ranks: a no-op on one process; under the launcher, order, lengths and gradients hold, ranks agree
on their devices before they form a group, and none waits for one that failed."""

import os
import re
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
import torch.multiprocessing

from infogrowth import distributed
from infogrowth.errors import UserError


def test_one_process_needs_no_group():
    tensor = torch.arange(6.0).reshape(3, 2)
    with distributed.process_group("cpu") as device:
        assert device.type == "cpu"
        assert (distributed.rank(), distributed.world_size(), distributed.is_main()) == (0, 1, True)
        assert distributed.local_world_size() == 1
        assert not torch.distributed.is_initialized()
        distributed.barrier()
        assert torch.equal(distributed.all_gather(tensor), tensor)
        assert distributed.all_gather_with_grad(tensor) is tensor
        assert [len(part) for part in distributed.all_gather_ragged(tensor)] == [3]
        assert distributed.all_gather_objects("x") == ["x"]
        assert distributed.on_main(lambda: {"a": 1}) == {"a": 1}
        assert torch.equal(distributed.all_reduce_mean(tensor), tensor)
        first = distributed.next_number("test")
        assert distributed.next_number("test") == first + 1
        with distributed.main_first():
            pass


def test_cuda_where_there_is_none_is_one_sentence(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="GPU"):
        distributed.choose_device("cuda")
    for nonsense in ("gpu", "cuda:x", "cpu:1"):
        with pytest.raises(UserError, match="auto"):
            distributed.choose_device(nonsense)


@pytest.fixture
def gpus(monkeypatch):
    """A machine with GPUs, as far as torch is asked about them: ``gpus(visible, current)``."""

    def see(visible, current=0):
        def refuse(*_):
            raise AssertionError("the user's current device was moved")

        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: visible)
        monkeypatch.setattr(torch.cuda, "current_device", lambda: current)
        monkeypatch.setattr(torch.cuda, "set_device", refuse)

    return see


def launched(monkeypatch, **variables):
    given = {"RANK": "0", "MASTER_ADDR": "x", "WORLD_SIZE": "4", "LOCAL_RANK": "0", **variables}
    for name, value in given.items():
        monkeypatch.setenv(name, value)


def test_a_rank_that_sees_one_gpu_takes_it_whatever_its_number(gpus, monkeypatch):
    gpus(visible=1)
    launched(monkeypatch, RANK="3", LOCAL_RANK="3")
    assert distributed.choose_device("cuda") == torch.device("cuda", 0)
    gpus(visible=4)
    assert distributed.choose_device("auto") == torch.device("cuda", 3)
    gpus(visible=2)
    with pytest.raises(UserError, match="nproc_per_node"):
        distributed.choose_device("cuda")


def test_without_the_launcher_the_users_current_gpu_is_used_and_not_moved(gpus):
    gpus(visible=4, current=2)
    assert distributed.choose_device("auto") == torch.device("cuda", 2)
    assert distributed.choose_device("cuda:1") == torch.device("cuda", 1)


@pytest.mark.parametrize(
    ("ranks", "problem"),
    [
        ([("a", "g0"), ("a", "g1"), ("b", "g0"), ("b", "g1")], None),
        ([("a", None), ("b", None)], None),
        ([("a", "g0"), ("a", "g1"), ("a", "g1")], "ranks 1 and 2 on a .*share"),
        ([("a", "g0"), ("b", None)], "rank 1 on b sees no GPU"),
        ([("a", None), ("b", "g0")], "rank 0 on a sees no GPU"),
    ],
)
def test_ranks_that_cannot_form_one_group_are_named(ranks, problem):
    found = distributed._problem_of([(node, gpu, None) for node, gpu in ranks])
    assert found is None if problem is None else re.match(problem, found)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def become(rank: int, port: int) -> None:
    """Turn this process into a rank of two, as a launcher would."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}


def gather_on_this_rank(rank: int, port: int, folder: str) -> None:
    """What each of the two ranks does; what it saw goes to a file for the parent to check."""
    become(rank, port)
    with distributed.process_group("cpu"):
        row = torch.full((1, 2), float(rank), requires_grad=True)
        gathered = distributed.all_gather_with_grad(row)
        # Each rank weighs the rows differently: the gradient must sum over both ranks' losses.
        (gathered * torch.tensor([[1.0], [10.0]]) * (rank + 1)).sum().backward()
        ragged = distributed.all_gather_ragged(torch.arange(3 * rank))
        seen = {
            "gathered": gathered.tolist(),
            "gradient": row.grad.tolist(),
            "ragged": [part.tolist() for part in ragged],
            "objects": distributed.all_gather_objects({"rank": rank}),
            "broadcast": distributed.on_main(lambda: f"from {rank}"),
            "mean": distributed.all_reduce_mean(torch.tensor([float(rank)])).item(),
            "claims": [distributed.next_number("shard") for _ in range(50)],
            "node": distributed.local_world_size(),
        }
        torch.save(seen, f"{folder}/{rank}.pt")


def test_two_ranks_gather_in_order_with_gradients_and_ragged_lengths(tmp_path):
    torch.multiprocessing.spawn(gather_on_this_rank, (free_port(), str(tmp_path)), nprocs=2)
    seen = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2)]
    for rank in range(2):
        assert seen[rank]["gathered"] == [[0, 0], [1, 1]]
        # d/d(row) of (1 or 10) · row · (1 + 2): rank 0 sees 3, rank 1 sees 30.
        assert seen[rank]["gradient"] == [[[3.0, 3.0]], [[30.0, 30.0]]][rank]
        assert seen[rank]["ragged"] == [[], [0, 1, 2]]
        assert seen[rank]["objects"] == [{"rank": 0}, {"rank": 1}]
        assert seen[rank]["broadcast"] == "from 0" and seen[rank]["mean"] == 0.5
        assert seen[rank]["node"] == 2
        assert seen[rank]["claims"] == sorted(seen[rank]["claims"])
    # The numbers are dealt out once, whoever asks.
    assert sorted(seen[0]["claims"] + seen[1]["claims"]) == list(range(100))


RANK_PROGRAM = """
import time
import torch.distributed
from infogrowth import distributed
from infogrowth.errors import UserError
{setup}
with distributed.process_group("{device}"):
    if distributed.rank() == 1:
        {rank_1}
    distributed.barrier()
"""


def run_two_ranks(setup="pass", rank_1="pass", device="cpu"):
    """Both ranks' exit status and error output, once both have ended."""
    program = RANK_PROGRAM.format(setup=setup, rank_1=rank_1, device=device)
    common = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", program],
            env=os.environ | common | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        errors = [process.communicate(timeout=90)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [process.returncode for process in processes], errors


# NCCL's destroy_process_group waits for the other ranks: here whoever calls it waits for good.
WAITING_DESTROY = "torch.distributed.destroy_process_group = lambda *_: time.sleep(1000)"


def test_a_rank_that_fails_alone_prints_its_error_and_none_waits_for_it():
    statuses, errors = run_two_ranks(WAITING_DESTROY, 'raise UserError("the file x is damaged")')
    assert statuses == [1, 2]
    assert errors[1].strip().splitlines()[-1] == "error: the file x is damaged"
    assert "lost" in errors[0]


def test_ranks_that_cannot_work_together_end_with_one_sentence():
    store = torch.distributed.HashStore()
    with ThreadPoolExecutor(2) as ranks:
        first = ranks.submit(distributed._agree, "cpu", store, 0, 2)
        second = ranks.submit(distributed._agree, "nonsense", store, 1, 2)
    assert "nonsense" in str(first.exception()) and isinstance(first.exception(), UserError)
    assert isinstance(second.exception(), SystemExit)  # its error is printed once, by rank 0


def test_the_group_gets_each_ranks_device_and_both_backends(gpus, monkeypatch):
    """What a GPU run hands to torch: a stand-in, since there is no GPU where this runs."""
    given = {}
    store = torch.distributed.HashStore()
    launched(monkeypatch, RANK="0", WORLD_SIZE="1")
    gpus(visible=8)
    monkeypatch.setenv("LOCAL_RANK", "5")
    monkeypatch.setattr(torch.distributed, "rendezvous", lambda *_, **__: iter([(store, 0, 1)]))
    monkeypatch.setattr(
        torch.distributed, "init_process_group", lambda *names, **more: given.update(more, on=names)
    )
    monkeypatch.setattr(torch.distributed, "destroy_process_group", lambda: None)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(uuid="x"))
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    with distributed.process_group("auto") as device:
        assert device == torch.device("cuda", 5)
    assert given["on"] == ("cpu:gloo,cuda:nccl",)
    assert given["device_id"] == torch.device("cuda", 5)
    with distributed.process_group("auto", collectives_on="cpu"):
        pass
    assert given["on"] == ("gloo",) and given["device_id"] is None
