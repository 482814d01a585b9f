"""Ranks: the only room that calls torch.distributed, and a no-op on one process.

``python3 -m torch.distributed.run`` sets RANK, WORLD_SIZE and LOCAL_RANK; without the launcher the
same code runs as rank 0 of 1 and never initialises a group.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.distributed.nn.functional import all_gather as _differentiable_all_gather

from infogrowth.errors import UserError

T = TypeVar("T")

# A rank that decodes a slow shard, or writes a big checkpoint, must not be taken for dead.
_PATIENCE = timedelta(hours=2)


@contextmanager
def process_group(device: str = "auto") -> Iterator[torch.device]:
    """Join the launcher's process group (NCCL on GPUs, Gloo on CPUs) for the block.

    Args:
        device: ``"auto"`` (CUDA when there is one), ``"cpu"``, ``"cuda"`` or ``"cuda:N"``.

    Yields:
        the device of this rank.

    Raises:
        UserError: CUDA asked for where there is none, or more ranks on a node than GPUs.
    """
    chosen = choose_device(device)
    launched = int(os.environ.get("WORLD_SIZE", "1")) > 1
    if launched and not dist.is_initialized():
        backend = "nccl" if chosen.type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=_PATIENCE)
    try:
        yield chosen
    finally:
        if launched and dist.is_initialized():
            dist.destroy_process_group()


def choose_device(device: str = "auto") -> torch.device:
    """The device that this rank computes on; on CUDA it also becomes the current one."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu":
        return torch.device("cpu")
    if device.partition(":")[0] != "cuda":
        raise UserError(f"device must be auto, cpu or cuda, not {device!r}")
    if not torch.cuda.is_available():
        raise UserError("device cuda was asked for, but torch sees no GPU; use --device cpu")
    index = int(device.partition(":")[2] or local_rank())
    if index >= torch.cuda.device_count():
        raise UserError(
            f"rank {rank()} wants GPU {index}, but this node has {torch.cuda.device_count()}; "
            "lower --nproc_per_node"
        )
    torch.cuda.set_device(index)
    return torch.device("cuda", index)


def rank() -> int:
    """This process's number, 0 … world_size() − 1."""
    return int(os.environ.get("RANK", "0")) if _launched() else 0


def world_size() -> int:
    """How many processes work together; 1 without the launcher."""
    return int(os.environ.get("WORLD_SIZE", "1")) if _launched() else 1


def local_rank() -> int:
    """This process's number on its node, which is also its GPU."""
    return int(os.environ.get("LOCAL_RANK", "0")) if _launched() else 0


def is_main() -> bool:
    """True on the one rank that writes shared files and prints."""
    return rank() == 0


def barrier() -> None:
    """Wait for all ranks."""
    if dist.is_initialized():
        dist.barrier()


@contextmanager
def main_first() -> Iterator[None]:
    """Rank 0 runs the block before the others, for example to fill a cache that they then find."""
    if not is_main():
        barrier()
    try:
        yield
    finally:
        if is_main():
            barrier()


def on_main(action: Callable[[], T]) -> T:
    """What ``action`` returns on rank 0, on all ranks. Its UserError is raised on rank 0, where it
    is told once; the other ranks end with the same exit status."""
    value: Any = None
    error: UserError | None = None
    if is_main():
        try:
            value = action()
        except UserError as caught:
            error = caught
    value, failed = broadcast_object((value, error is not None))
    if error is not None:
        raise error
    if failed:
        raise SystemExit(2)
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
    gathered = all_gather(padded).split(max(lengths)) if max(lengths) else [padded] * len(lengths)
    return [part[:length] for part, length in zip(gathered, lengths, strict=True)]


def all_gather_objects(value: Any) -> list[Any]:
    """Each rank's picklable ``value``, in rank order, on all ranks."""
    if not dist.is_initialized():
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def broadcast_object(value: Any, source: int = 0) -> Any:
    """``value`` of rank ``source`` on all ranks."""
    if not dist.is_initialized():
        return value
    box = [value]
    dist.broadcast_object_list(box, src=source)
    return box[0]


def all_reduce_sum(tensor: torch.Tensor) -> torch.Tensor:
    """The element-wise sum over ranks, as a new tensor."""
    total = tensor.detach().clone()
    if dist.is_initialized():
        dist.all_reduce(total)
    return total


def all_reduce_mean(tensor: torch.Tensor) -> torch.Tensor:
    """The element-wise mean over ranks, as a new tensor."""
    return all_reduce_sum(tensor) / world_size()


def _launched() -> bool:
    """Whether the launcher's variables count: they do once a group exists or is about to."""
    return "RANK" in os.environ and "MASTER_ADDR" in os.environ
