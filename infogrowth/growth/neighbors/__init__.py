"""Neighbor indexes over unit rows: exact, approximate, and spread over ranks."""

from __future__ import annotations

from typing import Any

from infogrowth.growth.neighbors.base import NeighborIndex, Neighbors

__all__ = ["INDEX_KINDS", "NeighborIndex", "Neighbors", "create_index"]

INDEX_KINDS = ("auto", "exact", "approximate")


def create_index(
    kind: str, dimension: int, k: int, device: Any, memory_mb: float, sharded: bool
) -> NeighborIndex:
    """An empty index of `dimension` columns that answers with `k` neighbors.

    `kind` is one of `INDEX_KINDS`; `sharded` spreads it over the ranks of `torch.distributed`.
    """
    from infogrowth.growth.neighbors.exact import ExactIndex

    local = ExactIndex(dimension, k, device, memory_mb)
    if not sharded:
        return local
    return _spread(local, device)


def _spread(local: NeighborIndex, device: Any) -> NeighborIndex:
    import torch

    from infogrowth import distributed
    from infogrowth.growth.neighbors.sharded import ShardedIndex

    def gather(array: Any) -> list[Any]:
        tensor = torch.from_numpy(array).to(device)
        return [part.cpu().numpy() for part in distributed.all_gather_ragged(tensor)]

    return ShardedIndex(local, distributed.rank(), distributed.world_size(), gather)
