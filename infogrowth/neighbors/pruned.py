"""Exact search that skips rows which cannot be among the nearest: the default on CPUs.

First the rows of the few cells nearest to a query give a floor under its k-th best cosine; then
every cell whose bound reaches that floor is searched, and whatever comes within rounding of it is
recomputed in float64. So the answer is that of a float64 brute force, like that of `ExactIndex`.

Shapes: N queries, W rows of a cell, D dimension, J cells, T nearest cells, K neighbors.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch

from infogrowth.neighbors.base import Neighbors
from infogrowth.neighbors.cells import BLOCK_ROWS, CACHED_PRODUCTS, Blocks, Cells
from infogrowth.neighbors.exact import ExactIndex, full_float32

log = logging.getLogger(__name__)
Result = TypeVar("Result")

FIRST_ROWS = 8192  # below this the dense product is as fast
FEWEST_QUERIES = 256  # visiting all cells costs about as much as so many dense lookups
GROWTH_FACTOR = 2  # the cells are learned anew when the index has grown by this factor
NEAREST_CELLS = 3  # searched first, for the floor
QUERY_ROWS = 8192
RANGES_PER_THREAD = 8  # so that threads end at about the same time
PATIENCE = 0.5  # share of full products above which skipping does not pay
MOST_HITS = 1 << 16  # hits of one range of blocks that are kept before they are thinned out


class PrunedIndex:
    """Exact nearest rows by cosine on a CPU, most of them never looked at. A `NeighborIndex`.

    `memory_mb` bounds the scratch memory of a search. `dense` holds the rows, and answers where
    skipping does not pay: few rows, few queries, or rows without any structure.
    """

    def __init__(self, dimension: int, k: int, memory_mb: float = 256) -> None:
        self.dimension = dimension
        self.k = k
        self.dense = ExactIndex(dimension, k, "cpu", memory_mb)
        self._memory = int(memory_mb * 2**20)
        self._cells: Cells | None = None
        self._learned_at = 0
        self._rest_until = 0

    @property
    def count(self) -> int:
        return self.dense.count

    def describe(self) -> str:
        return f"exact search, skipping what is too far to matter ({self.dense.describe()})"

    def extend(self, rows: np.ndarray) -> None:
        self.dense.extend(rows)

    def truncate(self, count: int) -> None:
        self.dense.truncate(count)
        if self._cells is not None:
            self._cells.truncate(count)

    def rows(self, start: int, stop: int) -> np.ndarray:
        return self.dense.rows(start, stop)

    def take(self, positions: np.ndarray) -> np.ndarray:
        """The rows at `positions` (M,), as (M, D) float32."""
        return self.dense.take(positions)

    @torch.inference_mode()
    def search(self, queries: np.ndarray, visible: np.ndarray) -> Neighbors:
        """As `NeighborIndex.search`."""
        if self.count < max(FIRST_ROWS, self._rest_until) or len(queries) < FEWEST_QUERIES:
            return self.dense.search(queries, visible)
        found = Neighbors(
            np.full((len(queries), self.k), -1, np.int64),
            np.full((len(queries), self.k), -np.inf, np.float64),
        )
        with full_float32():
            done = self._search_while_it_pays(queries, visible, found)
        if done < len(queries):
            rest = self.dense.search(queries[done:], visible[done:])
            found.positions[done:], found.products[done:] = rest.positions, rest.products
        return found

    def _search_while_it_pays(
        self, queries: np.ndarray, visible: np.ndarray, found: Neighbors
    ) -> int:
        """Fill `found` from its beginning on; tells for how many queries."""
        cells = self._up_to_date_cells()
        size = min(QUERY_ROWS, max(FEWEST_QUERIES, self._memory // (16 * cells.cell_count)))
        looked_at = done = 0
        while done < len(queries):
            part = slice(done, done + size)
            looked_at += self._search_cells(cells, queries[part], visible[part], found.part(part))
            done = min(done + size, len(queries))
            if done >= FEWEST_QUERIES and looked_at > PATIENCE * done * self.count:
                log.info("These features have too little structure to skip any; searching all.")
                self._rest_until = GROWTH_FACTOR * self.count
                self.release()
                break
        return done

    def release(self) -> None:
        """Give the memory of the cells back; a later search learns them anew."""
        self._cells, self._learned_at = None, 0

    def _up_to_date_cells(self) -> Cells:
        """The cells, holding all rows; learned anew when the index has outgrown them."""
        if self._cells is None or self.count >= GROWTH_FACTOR * self._learned_at:
            self._cells, self._learned_at = Cells(self.dense.filled), self.count
        if self._cells.count < self.count:
            self._cells.extend(self.dense.filled[self._cells.count :])
        return self._cells

    def _search_cells(
        self, cells: Cells, queries: np.ndarray, visible: np.ndarray, found: Neighbors
    ) -> int:
        """Fill `found` for queries that are few enough to be handled at once; tells how many
        products with whole rows it took."""
        asked = _Asked(
            torch.from_numpy(np.ascontiguousarray(queries)),
            torch.from_numpy(np.ascontiguousarray(visible)),
        )
        center_products_JN = cells.centers_JD @ asked.queries_ND.T
        floor_N = self._floors(cells, asked, center_products_JN)
        grounded_N = floor_N > -torch.inf
        reach_N = torch.where(grounded_N, floor_N - 2 * self.dense.summation_error, torch.inf)
        split = cells.split(asked.queries_ND)

        blocks = cells.blocks()

        def hits(some_blocks: range) -> tuple[_Hits, int]:
            parts, total, looked_at = [_Hits.none()], 0, 0
            scratch = torch.empty(CACHED_PRODUCTS, dtype=torch.float32)
            for block in some_blocks:
                alive = cells.within_reach(block, split, center_products_JN, reach_N, scratch)
                if len(alive) == 0:
                    continue
                for some in alive.split(CACHED_PRODUCTS // BLOCK_ROWS):
                    parts.append(self._hits(blocks, block, asked, some, reach_N, scratch))
                    total += len(parts[-1])
                looked_at += len(alive) * blocks.size(block)
                if total > MOST_HITS:
                    parts, total = [self._nearest(asked, _Hits.joined(parts))], 0
            return _Hits.joined(parts), looked_at

        found_hits, looked_at = zip(*_in_threads(hits, len(blocks)), strict=True)
        nearest = self._nearest(asked, _Hits.joined(list(found_hits)))
        place = nearest.places()
        found.positions[nearest.query, place] = nearest.position
        found.products[nearest.query, place] = nearest.score
        others = (~grounded_N).numpy()
        if others.any():  # too few rows nearby that they may see
            dense = self.dense.search(queries[others], visible[others])
            found.positions[others], found.products[others] = dense.positions, dense.products
        return sum(looked_at) + int(others.sum()) * self.count

    def _floors(
        self, cells: Cells, asked: _Asked, center_products_JN: torch.Tensor
    ) -> torch.Tensor:
        """Of each query the k-th best float32 cosine in the first blocks of the cells nearest to it
        (N,), -inf where those hold fewer rows that it may see."""
        distance_NJ = cells.half_squares_J - center_products_JN.T
        count = min(NEAREST_CELLS, cells.cell_count)
        near_NT = distance_NJ.topk(count, largest=False, sorted=False).indices
        by_cell = near_NT.flatten().argsort(stable=True)
        ends = torch.bincount(near_NT.flatten(), minlength=cells.cell_count).cumsum(0).tolist()
        blocks = cells.blocks()
        best_NTK = torch.full((near_NT.numel(), self.k), -torch.inf, dtype=torch.float32)

        def search_cells(some_cells: range) -> None:
            for cell in some_cells:
                places = by_cell[ends[cell - 1] if cell else 0 : ends[cell]]
                if len(places) == 0 or not blocks.holds(cell):
                    continue
                query, block = places // count, int(blocks.first_of_cell[cell])
                positions_W = blocks.padded(block)
                rows_WD = self.dense.filled.index_select(0, positions_W)
                scores_NW = asked.queries_ND.index_select(0, query) @ rows_WD.T
                scores_NW.masked_fill_(positions_W >= asked.visible_N[query, None], -torch.inf)
                scores_NW[:, blocks.size(block) :] = -torch.inf
                best = scores_NW.topk(min(self.k, len(positions_W)), sorted=False).values
                best_NTK[places, : best.shape[1]] = best

        _in_threads(search_cells, cells.cell_count)
        return best_NTK.view(len(near_NT), -1).topk(self.k).values[:, -1]

    def _hits(
        self,
        blocks: Blocks,
        block: int,
        asked: _Asked,
        alive: torch.Tensor,
        reach_N: torch.Tensor,
        scratch: torch.Tensor,
    ) -> _Hits:
        """The rows of a block that come within reach of the queries `alive`."""
        positions_W = blocks.padded(block)
        rows_WD = self.dense.filled.index_select(0, positions_W)
        scores_NW = scratch[: len(alive) * len(positions_W)].view(-1, len(positions_W))
        torch.mm(asked.queries_ND.index_select(0, alive), rows_WD.T, out=scores_NW)
        scores_NW[:, blocks.size(block) :] = -torch.inf
        at_N, at_W = (scores_NW >= reach_N.index_select(0, alive)[:, None]).nonzero(as_tuple=True)
        score = scores_NW[at_N, at_W]
        return _Hits(alive[at_N].numpy(), positions_W[at_W].numpy(), score.numpy())

    def _nearest(self, asked: _Asked, hits: _Hits) -> _Hits:
        """The k nearest rows of each query among its hits, with their cosines in float64."""
        hits = hits.take(hits.position < asked.visible_N.numpy()[hits.query]).best_first()
        kth = hits.kth_score(self.k, len(asked.queries_ND))
        hits = hits.take(hits.score >= kth[hits.query] - 2 * self.dense.summation_error)
        pairs = torch.from_numpy(hits.query), torch.from_numpy(hits.position)
        products = self.dense.pair_products(asked.queries_ND, *pairs).numpy()
        hits = _Hits(hits.query, hits.position, products).best_first()
        return hits.take(hits.places() < self.k)


@dataclass(frozen=True)
class _Asked:
    """Unit queries, and how many of the first rows each may see."""

    queries_ND: torch.Tensor
    visible_N: torch.Tensor


@dataclass(frozen=True)
class _Hits:
    """Rows that could be among the nearest of a query: three columns of one length."""

    query: np.ndarray
    position: np.ndarray
    score: np.ndarray

    def __len__(self) -> int:
        return len(self.query)

    def take(self, which: np.ndarray) -> _Hits:
        return _Hits(self.query[which], self.position[which], self.score[which])

    def best_first(self) -> _Hits:
        """By query, then by descending score, then by position."""
        return self.take(np.lexsort((self.position, -self.score, self.query)))

    def places(self) -> np.ndarray:
        """The place of each hit within those of its query, given that they lie together."""
        # the cut makes an empty column of none
        first = np.r_[True, self.query[1:] != self.query[:-1]][: len(self)]
        starts = np.flatnonzero(first)
        return np.arange(len(self)) - np.repeat(starts, np.diff(np.r_[starts, len(self)]))

    def kth_score(self, k: int, queries: int) -> np.ndarray:
        """The k-th best score of each query, -inf where it has fewer hits."""
        kth = np.full(queries, -np.inf)
        at = self.places() == k - 1
        kth[self.query[at]] = self.score[at]
        return kth

    @staticmethod
    def none() -> _Hits:
        return _Hits(np.empty(0, np.int64), np.empty(0, np.int64), np.empty(0))

    @staticmethod
    def joined(parts: list[_Hits]) -> _Hits:
        return _Hits(
            np.concatenate([part.query for part in parts]),
            np.concatenate([part.position for part in parts]),
            np.concatenate([part.score for part in parts]),
        )


def _in_threads(work: Callable[[range], Result], count: int) -> list[Result]:
    """`work` on the numbers below `count`, range by range, on as many threads as torch would use.

    Each product in there is small, so one thread for each is best."""
    threads = torch.get_num_threads()
    if threads == 1:
        return [work(range(count))]

    def in_one_thread(numbers: range) -> Result:
        with torch.inference_mode():
            return work(numbers)

    step = -(-count // (RANGES_PER_THREAD * threads))
    ranges = [range(at, min(at + step, count)) for at in range(0, count, step)]
    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            return list(pool.map(in_one_thread, ranges))
    finally:
        torch.set_num_threads(threads)
