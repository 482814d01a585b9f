"""Neighbor indexes over unit rows: exact, approximate, and spread over ranks."""

from __future__ import annotations

import logging
from typing import Any

from infogrowth.neighbors.base import NeighborIndex, Neighbors
from infogrowth.neighbors.distinct import DistinctIndex, LocalIndex

__all__ = ["INDEX_KINDS", "NeighborIndex", "Neighbors", "create_index"]

log = logging.getLogger(__name__)

INDEX_KINDS = ("auto", "exact", "approximate")
AUTO_EXACT_ROWS = 524288
"""Where "auto" leaves exact search on a CPU, whose lookups take longer the more rows there are,
unlike those of the approximate index (benchmarks/README.md)."""


def create_index(
    kind: str, dimension: int, k: int, device: Any, memory_mb: float, sharded: bool
) -> NeighborIndex:
    """An empty index of `dimension` columns that answers with `k` neighbors.

    `kind` is one of `INDEX_KINDS`; `sharded` spreads it over the ranks of `torch.distributed`.
    """
    local = DistinctIndex(_local_index(kind, dimension, k, device, memory_mb))
    reason = _reason_of_auto(device) if kind == "auto" else ""
    log.info("Neighbors (%d columns): %s%s.", dimension, local.describe(), reason)
    return _spread(local, device) if sharded else local


def _local_index(kind: str, dimension: int, k: int, device: Any, memory_mb: float) -> LocalIndex:
    """What this rank searches. "auto": exact on a GPU, where it is fast up to tens of millions of
    rows; on a CPU exact up to `AUTO_EXACT_ROWS`, then approximate."""
    import torch

    if torch.device(device).type != "cpu":
        from infogrowth.neighbors.exact import ExactIndex

        if kind == "approximate":
            log.info("The approximate index is for CPUs; on %s exact search is faster.", device)
        return ExactIndex(dimension, k, device, memory_mb)
    if kind == "exact":
        from infogrowth.neighbors.pruned import PrunedIndex

        return PrunedIndex(dimension, k, memory_mb)

    from infogrowth.neighbors.approximate import ApproximateIndex

    if kind == "approximate":
        return ApproximateIndex(dimension, k, memory_mb)
    return ApproximateIndex(dimension, k, memory_mb, first_training=AUTO_EXACT_ROWS)


def _reason_of_auto(device: Any) -> str:
    import torch

    if torch.device(device).type == "cpu":
        return ", because on a CPU exact lookups take longer the more rows there are"
    return ", because a GPU searches tens of millions of rows exactly"


def _spread(local: NeighborIndex, device: Any) -> NeighborIndex:
    import torch

    from infogrowth import distributed
    from infogrowth.neighbors.sharded import ShardedIndex

    def gather(array: Any) -> list[Any]:
        tensor = torch.from_numpy(array).to(device)
        return [part.cpu().numpy() for part in distributed.all_gather_ragged(tensor)]

    return ShardedIndex(local, distributed.rank(), distributed.world_size(), gather)
