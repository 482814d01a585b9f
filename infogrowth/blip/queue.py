"""Feature queues: the last few thousand momentum features, written round and round.

They are plain buffers under the official names, feature by column, ``(D, size)``.
"""

import torch
import torch.nn.functional as F
from torch import nn


def random_feature_queue(dimension: int, size: int) -> torch.Tensor:
    """``(dimension, size) float32`` random unit columns, which the first passes write over."""
    return F.normalize(torch.randn(dimension, size), dim=0)


@torch.no_grad()
def write_queue(
    queues: list[torch.Tensor], pointer: torch.Tensor, columns: list[torch.Tensor]
) -> None:
    """Write new columns at the pointer, in place, and move the pointer on.

    Any size goes with any batch: writing wraps at the end, and of a batch longer than the queue
    the last columns stay, where a one-by-one writing would have left them. No value is read back
    from the device.

    Args:
        queues: buffers ``(D, size)`` that move together.
        pointer: ``(1,) int64``, where the next column goes.
        columns: for each queue the new rows ``(N, D)``, oldest first.
    """
    size, count = queues[0].shape[1], len(columns[0])
    if not size or not count:
        return
    kept = min(size, count)
    offsets = torch.arange(count - kept, count, device=pointer.device)
    positions = (pointer + offsets) % size
    for queue, rows in zip(queues, columns, strict=True):
        queue.index_copy_(1, positions, rows[count - kept :].T.to(queue.dtype))
    pointer.copy_((pointer + count) % size)


def register_queues(
    module: nn.Module, dimension: int, size: int, pointer_name: str, with_ids: bool
) -> None:
    """Give ``module`` the buffers image_queue, text_queue, perhaps idx_queue, and the pointer."""
    module.register_buffer("image_queue", random_feature_queue(dimension, size))
    module.register_buffer("text_queue", random_feature_queue(dimension, size))
    if with_ids:
        module.register_buffer("idx_queue", torch.full((1, size), -100, dtype=torch.int64))
    module.register_buffer(pointer_name, torch.zeros(1, dtype=torch.int64))
