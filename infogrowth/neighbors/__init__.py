"""Nearest kept rows by cosine: exact, or among the rows of the nearest cells.

For somebody who knows k-NN, the whole package on one page:

* **What is asked.** Unit rows come in order. A batch of queries is looked up at once, and query i
  sees the first `visible[i]` rows only: those that came before it. The answer never depends on
  how rows and queries are dealt into calls (`index.py`).
* **Scores and hits** (`scan.py`, `candidates.py`). Queries are multiplied with blocks of rows. A
  block's maxima over groups of columns are compared with the k-th best score so far, and only
  groups that reach it are looked into. A score is a rounded cosine, so whatever comes within the
  proven rounding error of the k-th best is a hit. Hits are computed again in float64, in one fixed
  order of additions, equal ones go by position: the answer is that of a float64 brute force.
* **Faster products** (`fast.py`). Most blocks are multiplied in 16-bit floats where the device has
  them (GPUs, recent CPUs), else in the leading principal directions plus one column that bounds
  the rest. Each comes with a bound on how far it can be below the cosine; hits are multiplied
  again. The answer is the same, bit by bit. If more than a hundred rows a query are left in
  question, the product is float32 again.
* **Cells** (`cells.py`). From `cells_from` rows on, 3·√rows centers are learned by k-means; every
  row lies in two cells, the nearest and one that complements it; a query is multiplied only with
  the rows of its nearest T cells, queries grouped by cell. The k nearest among those are found
  exactly, as above. New rows get their cells at once, so the next query sees them. Cells are
  learned anew at 2, 4, 8, … times `cells_from` rows, from a sample drawn by the number of rows; T
  is the smallest that keeps the mean gain error on 1,024 of the rows within `TOLERABLE_ERROR`.
  All that is a function of the rows, the same at any batch size, interruption, device or number
  of ranks.
* **Ranks** (`shards.py`). Row p lives on rank p mod W. Every rank looks up the whole batch among
  its own rows; the answers are merged. Centers and T are those of all rows.
* **Memory** (`store.py`). A row takes 4·D bytes, 2·D more for its 16-bit copy (or 2.4·D for its
  leading directions, in exact search only), and 24 for its cells: at D = 256 an H100 of 80 GB
  holds 50 million rows, thus 25 million pairs.
* `rows.py` brings features to unit length; `base.py` is the answer's form.
"""

from __future__ import annotations

import logging
from typing import Any

from infogrowth.neighbors.base import Neighbors
from infogrowth.neighbors.index import NeighborIndex
from infogrowth.neighbors.shards import Shard

__all__ = ["INDEX_KINDS", "NeighborIndex", "Neighbors", "create_index"]

log = logging.getLogger(__name__)

INDEX_KINDS = ("auto", "exact", "approximate")
FIRST_CELLS = 8192  # rows from which the approximate index learns cells
AUTO = {
    "cpu": (1 << 16, "among twice as many rows exact search would be slower than the paper's loop"),
    "cuda": (1 << 22, "among more rows exact search would take longer than the rest of growth"),
}
"""By device, up to how many rows "auto" searches exactly, and why."""


def create_index(
    kind: str,
    dimension: int,
    k: int,
    device: Any,
    memory_mb: float,
    sharded: bool,
    cells_from: int | None = None,
) -> NeighborIndex:
    """An empty index of `dimension` columns that answers with `k` neighbors.

    `kind` is one of `INDEX_KINDS`; `sharded` spreads it over the ranks of `torch.distributed`.
    `cells_from` is what "auto" decided when the dataset was begun, on whatever device.
    """
    import torch

    rows, why = AUTO[torch.device(device).type]
    if kind == "exact":
        cells_from, reason = None, "asked for"
    elif kind == "approximate":
        cells_from, reason = FIRST_CELLS, "asked for"
    elif cells_from is not None and cells_from != rows:
        reason = "so decided when the dataset was begun"
    else:
        cells_from, reason = rows, why
    shard = _shard(device) if sharded else None
    index = NeighborIndex(dimension, k, device, memory_mb, cells_from, shard, reason)
    log.info("Neighbors (%d columns): %s (%s).", dimension, index.describe(), reason)
    return index


def _shard(device: Any) -> Shard:
    import torch

    from infogrowth import distributed

    def gather(array: Any) -> list[Any]:
        tensor = torch.from_numpy(array).to(device)
        return [part.cpu().numpy() for part in distributed.all_gather_ragged(tensor)]

    return Shard(distributed.rank(), distributed.world_size(), gather)
