"""Nearest kept rows by cosine: exact, or among the rows of the nearest cells.

For somebody who knows k-NN, the whole package on one page:

* **What is asked.** Unit rows come in order. A batch of queries is looked up at once, and query i
  sees the first `visible[i]` rows only: those that came before it. Growing, queries that join
  become rows in the same call. The answer never depends on how rows and queries are dealt into
  calls (`index.py`).
* **Codes** (`codes.py`). A row is also kept as int8: turned by a fixed orthogonal matrix and
  rounded. Products of codes are integers, the same bits on every device, and off the cosine by no
  more than the two roundings were long, about 0.027.
* **Scores** (`scan.py`). Queries are multiplied with rows cell by cell. The k-th best score of the
  first cell, less twice the error, is a limit: only rows that reach it are looked at again, so no
  scores are kept. In the end the k best scores are computed in float64, added in one fixed order,
  and then every row (some ten) whose score could reach the least of these cosines; equal ones go by
  position. So of the rows that were read, the k nearest are found as by a float64 brute force.
  Where codes cannot tell hundreds of rows apart, scores are float64 products, rounded to 2⁻²⁹.
* **Which rows are read** (`cells.py`). Exact search reads all: its cells are runs of rows. From
  `cells_from` rows on, 5·√rows centers are learned by k-means, a row lies in two cells (the
  nearest and one that complements it) and a query reads the cells nearest to it, at most T, the
  farther ones only if they are nearly as near. New rows get their cells at once, so the next query
  sees them. Cells are learned anew at 2, 4, 8, … times `cells_from` rows, from a sample drawn by
  the number of rows; T is the smallest that keeps the mean gain error on 1,024 other rows within
  `TOLERABLE_ERROR`. All that is done in integers, so it is a function of the rows, the same at any
  batch size, interruption, device or number of ranks.
* **Copies** (`copies.py`). Copies of a row beyond the k-th are in no cell.
* **Ranks** (`base.py`). Row p lives on rank p mod W. Every rank looks up the whole batch among its
  own rows; the answers are merged. Centers and T are those of all rows.
* **Memory** (`store.py`). A row takes 5·D bytes and 17 for its cells: at D = 256 an H100 of 80 GB
  holds 55 million rows, thus 27 million pairs.
"""

from __future__ import annotations

import logging
from typing import Any

from infogrowth.neighbors.base import Neighbors, Shard
from infogrowth.neighbors.index import NeighborIndex

__all__ = ["INDEX_KINDS", "NeighborIndex", "Neighbors", "create_index"]

log = logging.getLogger(__name__)

INDEX_KINDS = ("auto", "exact", "approximate")
FIRST_CELLS = 8192  # rows from which the approximate index learns cells
AUTO = {
    "cpu": (
        1 << 16,
        "among more rows the nearest cells take less than half the time",
    ),
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
