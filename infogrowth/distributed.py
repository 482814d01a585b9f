"""Ranks, devices and collectives; the only place that calls torch.distributed, all of it a no-op on
one process.

``python3 -m torch.distributed.run`` (or Slurm, with RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT
set) starts the ranks; without these variables the same code runs as rank 0 of 1 and never
initialises a group. What the ranks must agree on before they form a group goes through the
launcher's key-value store.
"""

import json
import logging
import os
import re
import socket
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from datetime import timedelta
from typing import Any, NoReturn, TypeVar

import torch
import torch.distributed as dist
from torch.distributed.nn.functional import all_gather as _differentiable_all_gather

from infogrowth.errors import UserError, exit_status, shorten

logger = logging.getLogger(__name__)

T = TypeVar("T")

# A rank that decodes a slow shard, or writes a big checkpoint, must not be taken for dead.
_COLLECTIVE_TIMEOUT = timedelta(hours=2)
_START_TIMEOUT = timedelta(minutes=10)  # until every rank of the launch is there
_LOST_PEER = re.compile(r"gloo|connection (closed|reset)", re.IGNORECASE)  # what Gloo says

_lone_store = dist.HashStore()  # instead of the launcher's, where there is no group
_ranks_on_this_node = 1


@contextmanager
def process_group(device: str = "auto", collectives_on: str = "device") -> Iterator[torch.device]:
    """Join the launcher's process group for the block, on this rank's device.

    A rank whose block fails prints its error and ends at once, without waiting for the others: they
    wait for it in a collective, and end with an error of their own within seconds.

    Args:
        device: ``"auto"`` (CUDA when there is one), ``"cpu"``, ``"cuda"`` or ``"cuda:N"``.
        collectives_on: ``"device"`` uses NCCL between GPUs (and Gloo for what lies on the CPU),
            ``"cpu"`` Gloo alone: enough where ranks share nothing but numbers and messages, and
            then worker processes may be forked at any time.

    Raises:
        UserError: CUDA asked for where there is none, ranks that would share a GPU, or nodes of
            which some have GPUs and some have none.
    """
    global _ranks_on_this_node
    joins = _launched() and not dist.is_initialized()
    if joins:
        store, number, count = next(dist.rendezvous("env://", timeout=_START_TIMEOUT))
        start = dist.PrefixStore("start", store)
        chosen, _ranks_on_this_node = _agree(device, start, number, count)
    else:
        chosen = choose_device(device)
    with torch.cuda.device(chosen) if chosen.type == "cuda" else nullcontext():
        if not joins:
            yield chosen
            return
        nccl = chosen.type == "cuda" and collectives_on == "device"
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if nccl else "gloo",
            store=dist.PrefixStore("group", store),
            rank=number,
            world_size=count,
            timeout=_COLLECTIVE_TIMEOUT,
            device_id=chosen if nccl else None,  # each rank's communicator on its own GPU
        )
        try:
            yield chosen
        except BaseException as error:
            if count > 1:
                _leave(error)
            raise
        finally:
            dist.destroy_process_group()
            _ranks_on_this_node = 1


def choose_device(device: str = "auto") -> torch.device:
    """The device that ``device`` stands for on this rank; the current one is left as it is.

    ``"cuda"`` is the GPU of this rank's number on its node under the launcher (the only visible
    one, where each rank sees one), else the current one.

    Raises:
        UserError: no such device.
    """
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", device):
        raise UserError(f"device must be auto, cpu, cuda or cuda:N, not {device!r}")
    if device == "cpu" or (device == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise UserError("device cuda was asked for, but torch sees no GPU; use --device cpu")
    visible = torch.cuda.device_count()
    if ":" in device:
        index = int(device.partition(":")[2])
    elif not _launched():
        index = torch.cuda.current_device()
    else:
        local = os.environ.get("LOCAL_RANK") or os.environ.get("SLURM_LOCALID") or "0"
        index = int(local) if visible > 1 else 0
    if index >= visible:
        raise UserError(
            f"rank {rank()} on {socket.gethostname()} needs GPU {index}, but only {visible} are "
            "visible there; start one rank per GPU (--nproc_per_node)"
        )
    return torch.device("cuda", index)


def is_spread(wanted: bool | None = None) -> bool:
    """Whether to spread work over the ranks: if ``wanted``; None: if a group of several exists.

    Raises:
        UserError: it is wanted, and there is no group.
    """
    in_group = dist.is_initialized()
    how = "run the call inside `with infogrowth.distributed.process_group():`"
    if wanted and not in_group:
        raise UserError(f"work can only be spread over ranks that form a group: {how}")
    if wanted is None and not in_group and world_size() > 1:
        logger.warning("%d processes without a group: each works alone; %s", world_size(), how)
    return in_group and world_size() > 1 if wanted is None else wanted


def rank() -> int:
    """This process's number, 0 … world_size() − 1."""
    return dist.get_rank() if dist.is_initialized() else _launcher_number("RANK", 0)


def world_size() -> int:
    """How many processes work together; 1 without the launcher."""
    return dist.get_world_size() if dist.is_initialized() else _launcher_number("WORLD_SIZE", 1)


def local_world_size() -> int:
    """How many ranks share this node, its processors and its memory."""
    return _launcher_number("LOCAL_WORLD_SIZE", _ranks_on_this_node)


def is_main() -> bool:
    """True on the one rank that writes shared files and prints."""
    return rank() == 0


def next_number(name: str) -> int:
    """A counter that all ranks share: 0, 1, 2, … under ``name``, each number to one rank only.

    It lives in the group's store, so whoever is free takes the next; nobody waits for anybody.
    """
    store = dist.distributed_c10d._get_default_store() if dist.is_initialized() else _lone_store
    return store.add(name, 1) - 1


def barrier() -> None:
    """Wait for all ranks."""
    if dist.is_initialized():
        dist.barrier()


@contextmanager
def main_first() -> Iterator[None]:
    """Rank 0 runs the block before the others, for example to fill a cache that they then find."""
    if not is_main():
        barrier()
    yield
    if is_main():
        barrier()


def on_main(action: Callable[[], T]) -> T:
    """What ``action`` returns on rank 0, on all ranks. Its UserError is raised on rank 0, where it
    is reported once; the other ranks end with the same exit status."""
    outcome: list[Any] = [None]
    if is_main():
        try:
            outcome = [(action(), None)]
        except UserError as caught:
            outcome = [(None, caught)]
    if dist.is_initialized():
        dist.broadcast_object_list(outcome)
    value, error = outcome[0]
    if error is not None:
        raise error if is_main() else SystemExit(2)
    return value


def all_gather(tensor: torch.Tensor) -> torch.Tensor:
    """``(B, …)`` on each rank to ``(W·B, …)`` on all, in rank order; shapes equal, no gradient."""
    if not dist.is_initialized():
        return tensor.detach()
    parts = [torch.empty_like(tensor) for _ in range(world_size())]
    dist.all_gather(parts, tensor.detach().contiguous())
    return torch.cat(parts)


def all_gather_with_grad(tensor: torch.Tensor) -> torch.Tensor:
    """Like :func:`all_gather`; gradients flow back to the rank that each row came from."""
    if not dist.is_initialized():
        return tensor
    return torch.cat(_differentiable_all_gather(tensor.contiguous()))


def all_gather_ragged(tensor: torch.Tensor) -> list[torch.Tensor]:
    """The ranks' tensors, whose first dimensions may differ (or be zero), in rank order."""
    if not dist.is_initialized():
        return [tensor.detach()]
    lengths = all_gather(torch.tensor([len(tensor)], device=tensor.device)).tolist()
    padded = tensor.new_zeros((max(lengths), *tensor.shape[1:]))
    padded[: len(tensor)] = tensor.detach()
    parts = all_gather(padded).reshape(len(lengths), *padded.shape)
    return [part[:length] for part, length in zip(parts, lengths, strict=True)]


def all_gather_objects(value: Any) -> list[Any]:
    """Each rank's picklable ``value``, in rank order, on all ranks."""
    if not dist.is_initialized():
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def all_reduce_mean(tensor: torch.Tensor) -> torch.Tensor:
    """The element-wise mean over ranks, as a new tensor."""
    total = tensor.detach().clone()
    if dist.is_initialized():
        dist.all_reduce(total)
    return total / world_size()


def data_parallel(
    model: torch.nn.Module, device: torch.device, compress: bool = False
) -> torch.nn.Module:
    """``model`` such that ranks take the mean of their gradients in the backward pass.

    On one process it is the model itself. Buffers are not exchanged: they are equal on all ranks.

    Args:
        compress: exchange bfloat16 instead of float32, for slow links between nodes.
    """
    if world_size() == 1:
        return model
    parallel = torch.nn.parallel.DistributedDataParallel(
        model,
        device_ids=[device.index] if device.type == "cuda" else None,
        broadcast_buffers=False,
        gradient_as_bucket_view=True,  # no second copy of all gradients
    )
    if compress:
        from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook

        parallel.register_comm_hook(None, bf16_compress_hook)
    return parallel


def _launched() -> bool:
    """Whether the launcher's variables count: they do once a group exists or is about to."""
    return "RANK" in os.environ and "MASTER_ADDR" in os.environ


def _launcher_number(variable: str, default: int) -> int:
    return int(os.environ.get(variable, default)) if _launched() else default


def _agree(device: str, store: dist.Store, number: int, count: int) -> tuple[torch.device, int]:
    """This rank's device and how many ranks are on its node, if all ranks can work together.

    Every rank posts what it would compute on and reads what the others posted, so that all of them
    come to the same conclusion. What is wrong is reported by rank 0; the others end with it.
    """
    chosen, problem, gpu = torch.device("cpu"), None, None
    try:
        chosen = choose_device(device)
    except UserError as error:
        problem = str(error)
    if chosen.type == "cuda":
        gpu = os.environ.get("CUDA_VISIBLE_DEVICES", "")
        if not gpu.startswith("MIG-"):  # the slices of one GPU are devices of their own
            gpu = str(torch.cuda.get_device_properties(chosen).uuid)
    node = socket.gethostname()
    store.set(str(number), json.dumps([node, gpu, problem]))
    try:
        ranks = [json.loads(store.get(str(other))) for other in range(count)]
    except RuntimeError as error:  # the store's timeout, or its end
        raise UserError(
            f"rank {number} waited {_START_TIMEOUT} for the other {count - 1}, and not all came: "
            "look for the error of the rank that is missing"
        ) from error
    if problem := _problem_of(ranks):
        raise SystemExit(2) if number else UserError(problem)
    return chosen, sum(other == node for other, _, _ in ranks)


def _problem_of(ranks: list[tuple[str, str | None, str | None]]) -> str | None:
    """What keeps ranks (node, GPU, own problem) from forming one group, in one sentence."""
    for _, _, problem in ranks:
        if problem:
            return problem
    for number, (node, gpu, _) in enumerate(ranks):
        if gpu is None and any(other for _, other, _ in ranks):
            return (
                f"rank {number} on {node} sees no GPU, but others do; repair that node, or use "
                "--device cpu"
            )
        if gpu and (first := ranks.index(ranks[number])) != number:
            return (
                f"ranks {first} and {number} on {node} would share one GPU ({gpu}); start one rank "
                "per GPU, with --device cuda and no number"
            )
    return None


def _leave(error: BaseException) -> NoReturn:
    """Print the error and end this process now: to destroy the group would wait for other ranks,
    which wait for this one."""
    lost_a_peer = type(error) is RuntimeError and _LOST_PEER.search(str(error))
    if lost_a_peer or isinstance(error, dist.DistError):
        why = f"whose own error says why ({shorten(error, 80)})"
        print(f"error: rank {rank()} lost another rank, {why}", file=sys.stderr)
        status = 1
    else:
        status = exit_status(error)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
