"""Ranks: a no-op on one process; under the launcher, order, lengths and gradients hold."""

import os
import socket

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
        distributed.barrier()
        assert torch.equal(distributed.all_gather(tensor), tensor)
        assert distributed.all_gather_with_grad(tensor) is tensor
        assert [len(part) for part in distributed.all_gather_ragged(tensor)] == [3]
        assert distributed.all_gather_objects("x") == ["x"]
        assert distributed.broadcast_object({"a": 1}) == {"a": 1}
        assert torch.equal(distributed.all_reduce_mean(tensor), tensor)
        with distributed.main_first():
            pass


def test_cuda_where_there_is_none_is_one_sentence(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="torch sees no GPU"):
        distributed.choose_device("cuda")
    with pytest.raises(UserError, match="auto, cpu or cuda"):
        distributed.choose_device("gpu")


def gather_on_this_rank(rank: int, port: int, folder: str) -> None:
    """What each of the two ranks does; what it saw goes to a file for the parent to check."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
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
            "broadcast": distributed.broadcast_object(f"from {rank}", source=1),
            "mean": distributed.all_reduce_mean(torch.tensor([float(rank)])).item(),
        }
        torch.save(seen, f"{folder}/{rank}.pt")


def test_two_ranks_gather_in_order_with_gradients_and_ragged_lengths(tmp_path):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    torch.multiprocessing.spawn(gather_on_this_rank, (port, str(tmp_path)), nprocs=2)
    for rank in range(2):
        seen = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        assert seen["gathered"] == [[0, 0], [1, 1]]
        # d/d(row) of (1 or 10) · row · (1 + 2): rank 0 sees 3, rank 1 sees 30.
        assert seen["gradient"] == [[[3.0, 3.0]], [[30.0, 30.0]]][rank]
        assert seen["ragged"] == [[], [0, 1, 2]]
        assert seen["objects"] == [{"rank": 0}, {"rank": 1}]
        assert seen["broadcast"] == "from 1" and seen["mean"] == 0.5
