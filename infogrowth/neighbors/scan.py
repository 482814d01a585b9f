"""Multiplying queries with rows: all of them, or those of the nearest cells; hits are collected.

Shapes: N queries, B tiles of Q queries and W rows each, D dimension.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from infogrowth.neighbors.candidates import (
    GROUP,
    NOTHING,
    PAIR_ELEMENTS,
    Candidates,
    Hits,
    find_hits,
    group_maxima,
    kth_best,
)
from infogrowth.neighbors.cells import Cells, Tile
from infogrowth.neighbors.fast import FastRows, summation_error
from infogrowth.neighbors.store import RowStore

FIRST_ROWS = 1024  # multiplied in float32, so that the others have a score to beat
TAIL_ROWS = 2048  # block size where queries of one batch see different numbers of rows
BLOCK_ROWS = {"cpu": 2048, "cuda": 1 << 16}  # of a block, at most
TILES = {"cpu": (4096, 512), "cuda": (64, 256)}  # queries and rows of one cell, multiplied at once
SMALL_WORK = 1 << 27  # multiplications that one thread does sooner than two would agree
RANGES_PER_THREAD = 8  # so that threads end at about the same time
LOWEST = -2.0  # below any cosine


@dataclass(frozen=True)
class Scan:
    """Queries (N, D) that see the first `visible` (N,) of `rows`, in ascending order; `fast` is a
    copy of these or None; `surplus` (rows, 1) bool says which cannot be among the nearest of any,
    None if all can; `memory` in bytes bounds what is multiplied at once."""

    queries_ND: torch.Tensor
    visible_N: torch.Tensor
    rows: RowStore
    fast: FastRows | None
    surplus: RowStore | None
    k: int
    memory: int

    def all_rows(self, candidates: Candidates) -> int:
        """Multiply with all rows, block by block; returns the number of hits of fast products."""
        count, dimension = self.queries_ND.shape
        query_N = torch.arange(count, device=self.rows.device)
        fast_queries = None if self.fast is None else self.fast.queries(self.queries_ND)
        fast_hits = 0
        with _threads_worth(count * self.rows.count * dimension):
            for start, stop in self._blocks():
                store, factors_ND, bound_N = self.rows, self.queries_ND, None
                if self.fast is not None and fast_queries is not None and start > 0:
                    store, (factors_ND, bound_N) = self.fast.store, fast_queries
                first = int(torch.searchsorted(self.visible_N, start, right=True)) if start else 0
                for at, rows_WD in store.pieces(start, stop):
                    width = -(-len(rows_WD) // GROUP) * GROUP
                    scores_NW = factors_ND.new_empty((count - first, width))
                    scores_NW[:, len(rows_WD) :] = NOTHING
                    torch.mm(factors_ND[first:], rows_WD.T, out=scores_NW[:, : len(rows_WD)])
                    position_W = torch.arange(at, at + width, device=self.rows.device)
                    tile = Tile(query_N[None, first:], position_W[None])
                    found = self._hits(scores_NW[None], tile, candidates.floor, bound_N, start == 0)
                    for hits in found:
                        fast_hits += 0 if bound_N is None else len(hits)
                        candidates.add(hits)
        return fast_hits

    def nearest_cells(self, cells: Cells, candidates: Candidates) -> None:
        """Multiply with the rows of the nearest cells only."""
        device, dimension = self.rows.device, self.queries_ND.shape[1]
        tile_queries, tile_rows = tile_size = TILES[device.type]
        one = 4 * (tile_queries * dimension + tile_rows * dimension + 2 * tile_queries * tile_rows)
        together = 1 if device.type == "cpu" else max(1, self.memory // one)
        queries_ND = torch.cat([self.queries_ND, self.queries_ND.new_zeros((1, dimension))])
        store, factors_ND, bound_N = self.rows, queries_ND, None
        for number, tiles in enumerate(cells.rounds(self.queries_ND, tile_size, together)):
            if number > 0 and self.fast is not None:
                store = self.fast.store
                factors_ND, bound_N = self.fast.queries(queries_ND)
            floor_N = torch.cat([candidates.floor, candidates.floor.new_full((1,), torch.inf)])

            def multiply(
                some: Sequence[Tile],
                is_first: bool = number == 0,
                store: RowStore = store,
                factors_ND: torch.Tensor = factors_ND,
                floor_N: torch.Tensor = floor_N,
                bound_N: torch.Tensor | None = bound_N,
            ) -> list[Hits]:
                found: list[Hits] = []
                for tile in some:
                    near_BWD = store.take(tile.position_BW.clamp(max=self.rows.count - 1))
                    scores_BQW = torch.bmm(factors_ND[tile.query_BQ], near_BWD.transpose(1, 2))
                    found += self._hits(scores_BQW, tile, floor_N, bound_N, is_first)
                return found

            found = [hits for some in _in_threads(multiply, tiles, device) for hits in some]
            if found:
                candidates.add(Hits.joined(found))

    def _hits(
        self,
        scores_BQW: torch.Tensor,
        tile: Tile,
        floor_N: torch.Tensor,
        bound_N: torch.Tensor | None,
        first: bool,
    ) -> Iterator[Hits]:
        """The visible rows that could be among the nearest, with float32 scores. Without a score
        to beat yet (`first`), the maxima of groups of columns give one."""
        floor_BQ = floor_N[tile.query_BQ]
        if self.surplus is not None:
            surplus_BW1 = self.surplus.take(tile.position_BW.clamp(max=self.rows.count - 1))
            scores_BQW.masked_fill_(surplus_BW1.transpose(1, 2), NOTHING)
        if first:
            seen_BQ = self.visible_N[tile.query_BQ.clamp(max=len(self.visible_N) - 1)]
            scores_BQW.masked_fill_(tile.position_BW[:, None] >= seen_BQ[:, :, None], NOTHING)
        maxima_BQG = group_maxima(scores_BQW)
        if first:
            error = summation_error(self.queries_ND.shape[1])
            floor_BQ = torch.maximum(floor_BQ, kth_best(maxima_BQG, self.k) - 2 * error)
        if bound_N is not None:
            floor_BQ = floor_BQ - bound_N[tile.query_BQ]
        queries = tile.query_BQ.shape[1]
        for hits in find_hits(scores_BQW, maxima_BQG, floor_BQ.clamp(min=LOWEST)):
            query = tile.query_BQ.flatten()[hits.query]
            position = tile.position_BW[hits.query // queries, hits.position]
            hits = Hits(query, position, hits.score).take(position < self.visible_N[query])
            if len(hits):
                yield hits if bound_N is None else self._multiplied_again(hits)

    def _multiplied_again(self, hits: Hits) -> Hits:
        """Hits of a fast product, with float32 scores."""
        score_P = torch.empty(len(hits), device=self.rows.device)
        step = max(1, PAIR_ELEMENTS[self.rows.device.type] // self.queries_ND.shape[1])
        for at in range(0, len(hits), step):
            part = slice(at, at + step)
            rows_PD = self.rows.take(hits.position[part])
            score_P[part] = torch.linalg.vecdot(rows_PD, self.queries_ND[hits.query[part]])
        return Hits(hits.query, hits.position, score_P)

    def _blocks(self) -> Iterator[tuple[int, int]]:
        """The first rows, then blocks of those that all queries see, then smaller ones."""
        all_see, some_see = int(self.visible_N[0]), int(self.visible_N[-1])
        itemsize = 4 if self.fast is None else self.fast.store.dtype.itemsize
        fitting = self.memory // 2 // (len(self.queries_ND) * itemsize) // GROUP * GROUP
        width = max(GROUP, min(BLOCK_ROWS[self.rows.device.type], fitting))
        start, stop = 0, min(FIRST_ROWS, width, some_see)
        while start < stop:
            yield start, stop
            start = stop
            if start < all_see:
                stop = min(start + width, all_see)
            else:
                stop = min(start + min(width, TAIL_ROWS), some_see)


def _in_threads(
    work: Callable[[Sequence[Tile]], list[Hits]], tiles: Iterator[Tile], device: torch.device
) -> Iterator[list[Hits]]:
    """`work` on all tiles: on a CPU range by range, on as many threads as torch would use, for each
    product is small."""
    threads = torch.get_num_threads()
    if device.type != "cpu" or threads == 1:
        yield from (work([tile]) for tile in tiles) if device.type != "cpu" else [work(list(tiles))]
        return
    every = list(tiles)
    step = -(-len(every) // (RANGES_PER_THREAD * threads)) or 1
    ranges = [every[at : at + step] for at in range(0, len(every), step)]

    @torch.no_grad()
    def in_one_thread(some: Sequence[Tile]) -> list[Hits]:
        return work(some)

    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            yield from pool.map(in_one_thread, ranges)
    finally:
        torch.set_num_threads(threads)


@contextmanager
def _threads_worth(work: int) -> Iterator[None]:
    """One CPU thread for small work: waking and awaiting the others would cost more."""
    threads = torch.get_num_threads()
    if work >= SMALL_WORK or threads == 1:
        yield
        return
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
