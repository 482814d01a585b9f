"""Multiplying queries with the rows of the cells that they read, and deciding which are nearest.

Products of codes are scores: cosines, up to a known error. All are kept, with the maxima of groups
of them. The K best maxima name rows to begin with, whose cosines in float64 are a floor; then every
row whose score, error included, reaches the floor is multiplied in float64 too. So the answer is
that of float64 products with all rows that were read, each summed in one fixed order, equal ones by
position. Queries for which codes leave a crowd of rows in question are scored again in float64.

Shapes: N queries, T cells read by each, S = N·T slots, G groups of scores a slot, M = T·G; B cells
with Q queries and W rows each, P pairs of a query and a row, K neighbors.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from infogrowth.neighbors.cells import Layout
from infogrowth.neighbors.codes import multiply

NOTHING = -(2**30)  # the score of a row that is not there or may not be seen
FINE_ERROR = 2.0**-51  # of a float64 product, per column
CROWD = 256  # groups in question, and eight a neighbor, beyond which codes are too coarse
PAIRS = {"cpu": 1 << 21, "cuda": 1 << 25}  # in question at once, where they are a crowd
SELECTED = {"cpu": 1 << 9, "cuda": 1 << 14}  # queries whose neighbors are decided together
CELLS = {"cpu": 1, "cuda": 256}  # multiplied at once
CELL_QUERIES = {"cpu": 1 << 20, "cuda": 128}  # of each of these
PARTS = 8  # of the work, for each thread: so they end at about the same time
SMALL_WORK = 1 << 27  # multiplications that one thread does sooner than two would agree

Map = Callable[[Callable[[Any], Any], list[Any]], Iterable[Any]]
Tensors = tuple[torch.Tensor, ...]


@dataclass(frozen=True)
class Queries:
    """N queries as `rows` (N, D) float32 and `codes` (N, ·) int8, whose products are off by `error`
    (N,) at most. Query i sees the first `visible[i]` rows, in ascending order, and reads the cells
    `near[i]` (T,)."""

    rows: torch.Tensor
    codes: torch.Tensor
    error: torch.Tensor
    visible: torch.Tensor
    near: torch.Tensor

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, which: Any) -> Queries:
        """Some of them."""
        return Queries(*(getattr(self, name)[which] for name in self.__dataclass_fields__))


@dataclass(frozen=True)
class Scan:
    """What queries are looked up in: rows in a layout.

    `codes` and `rows` (float32) read rows by number, a product of codes is `unit` cosines, `exact`
    computes the cosines of pairs (queries (N, D), which query (P,), which row (P,)) in float64.
    `scratch` (int32) is where scores are kept: memory that is touched for the first time costs as
    much as filling it. `threads` work on them.
    """

    layout: Layout
    codes: Callable[[torch.Tensor], torch.Tensor]
    rows: Callable[[torch.Tensor], torch.Tensor]
    exact: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
    unit: float
    k: int
    scratch: torch.Tensor
    threads: Map

    def nearest(self, queries: Queries, fine: bool = False) -> Tensors:
        """Positions (N, K), -1 where there are fewer, and cosines (N, K) float64; scores are those
        of codes, or in float64 (`fine`)."""
        scores = _Scores(self, queries, fine)
        if scores.count > len(self.scratch) and len(queries) > 1:
            middle = len(queries) // 2
            parts = [self.nearest(queries[:middle], fine), self.nearest(queries[middle:], fine)]
            return tuple(map(torch.cat, zip(*parts, strict=True)))
        positions, products, crowded = scores.nearest()
        crowd = crowded.nonzero()[:, 0]
        if len(crowd):
            positions[crowd], products[crowd] = self.nearest(queries[crowd], fine=True)
        return positions, products


class _Scores:
    """The scores of all queries with all rows of the cells that they read."""

    def __init__(self, scan: Scan, queries: Queries, fine: bool) -> None:
        self._scan, self._layout, self._queries, self._fine = scan, scan.layout, queries, fine
        self._kind, self._read = queries.near.device.type, queries.near.shape[1]
        self._cell_S = queries.near.flatten()
        self._slots = self._cell_S.argsort(stable=True)
        sizes = torch.bincount(self._cell_S, minlength=len(self._layout.widths))
        self._sizes = sizes.cpu().numpy()
        self.count = int((self._sizes * self._layout.widths).sum())

    def nearest(self) -> Tensors:
        """Positions (N, K), cosines (N, K) float64, and whether there are too many rows in question
        to know them (N,) bool."""
        tiles, size = self._tiles()
        dtype = torch.float64 if self._fine else torch.int32
        self._scores = self._scan.scratch
        if self._fine or size > len(self._scores):
            self._scores = self._queries.rows.new_empty(size, dtype=dtype)
        slots = len(self._cell_S) + 1  # the last one is nobody's
        self._maxima = self._scores.new_full((slots, self._layout.groups), NOTHING)
        self._begin_S = torch.zeros_like(self._maxima[:, 0], dtype=torch.int64)
        list(self._scan.threads(self._multiply, tiles))
        step, count = SELECTED[self._kind], len(self._queries)
        if self._fine:
            step = min(step, PAIRS[self._kind] * count // max(1, self.count) + 1)
        parts = [slice(at, min(at + step, count)) for at in range(0, count, step)]
        return tuple(map(torch.cat, zip(*self._scan.threads(self._select, parts), strict=True)))

    # --- multiplying -----------------------------------------------------------------------------

    def _tiles(self) -> tuple[list[Any], int]:
        """What to multiply together: cells of one width, where the queries of each begin in
        `_slots`, how many these are, and where the scores go; and how many scores there are."""
        layout, sizes = self._layout, self._sizes
        most = CELL_QUERIES[self._kind] if layout.copies > 1 else len(self._queries)
        cell = np.flatnonzero((sizes > 0) & (layout.widths > 0))
        cell = cell[np.argsort(layout.widths[cell], kind="stable")]
        parts = -(-sizes[cell] // most)
        cell, before = np.repeat(cell, parts), np.repeat(np.cumsum(parts) - parts, parts)
        offset = (np.arange(len(cell)) - before) * most
        begin = (np.cumsum(sizes) - sizes)[cell] + offset
        size, width = np.minimum(sizes[cell] - offset, most), layout.widths[cell]
        tiles, start, at = [], 0, 0
        for stop in [*(np.flatnonzero(np.diff(width)) + 1).tolist(), len(cell)]:
            for first in range(start, stop, CELLS[self._kind]):
                part = slice(first, min(first + CELLS[self._kind], stop))
                tiles.append((cell[part], begin[part], size[part], at))
                at += len(cell[part]) * int(size[part].max()) * int(width[first])
            start = stop
        return tiles, at

    def _multiply(self, tile: tuple[np.ndarray, np.ndarray, np.ndarray, int]) -> None:
        """Enter the scores of a tile, where they begin, and the maxima of their groups."""
        cell_B, begin_B, size_B, at = tile
        layout, queries, scan = self._layout, self._queries, self._scan
        width, size, cells = int(layout.widths[cell_B[0]]), int(size_B.max()), len(cell_B)
        number_BW = _runs(layout.numbers, layout.starts[cell_B], width)
        slot_BQ = _runs(self._slots, begin_B, size)
        if cells > 1:
            there = torch.from_numpy(np.arange(size) < size_B[:, None]).to(slot_BQ.device)
            slot_BQ = slot_BQ.where(there, len(self._cell_S))
        slots = slot_BQ.flatten()
        query = slots.div(self._read, rounding_mode="floor").clamp_(max=len(queries) - 1)
        row_BW = number_BW.clamp(max=layout.rows - 1)
        if self._fine:
            left, right = queries.rows.index_select(0, query).double(), scan.rows(row_BW).double()
        else:
            left, right = queries.codes.index_select(0, query), scan.codes(row_BW)
        end = at + len(slots) * width
        score_BQW = self._scores[at:end].view(cells, size, width)
        multiply(left.view(cells, size, -1), right, score_BQW)
        late = int(torch.searchsorted(number_BW[0], queries.visible[0])) if cells == 1 else 0
        if late < width:  # what all see comes before
            visible = queries.visible.index_select(0, query).view(cells, size, 1)
            score_BQW[:, :, late:].masked_fill_(number_BW[:, None, late:] >= visible, NOTHING)
        maxima = score_BQW.view(len(slots), width // layout.groups, layout.groups).amax(1)
        self._maxima.index_copy_(0, slots, maxima)
        self._begin_S.index_copy_(0, slots, torch.arange(at, end, width, device=slots.device))

    # --- deciding --------------------------------------------------------------------------------

    def _select(self, part: slice) -> Tensors:
        """The answers for some queries."""
        k, queries = self._scan.k, self._queries[part]
        maxima_NM = self._maxima[:-1].view(len(self._queries), -1)[part]
        floor_N = torch.full_like(queries.error, -torch.inf)
        first_N = self._limit(queries, floor_N)
        if maxima_NM.shape[1] >= (enough := k * self._layout.copies):
            first_N = maxima_NM.topk(enough, sorted=False).values.amin(1).maximum(first_N)
        crowded_N = self._crowded(maxima_NM, first_N)
        found = self._pairs(part, maxima_NM, first_N.masked_fill(crowded_N, -NOTHING), None)
        order, rank = ranks(found[0], found[2], len(queries))
        kth = order[rank == k - 1]
        floor_N[found[0][kth]] = found[2][kth]
        limit_N = self._limit(queries, floor_N)
        crowded_N |= self._crowded(maxima_NM, limit_N)
        others = self._pairs(part, maxima_NM, limit_N.masked_fill(crowded_N, -NOTHING), first_N)
        query, row, product = map(torch.cat, zip(found, others, strict=True))
        in_order = row.argsort(stable=True)  # by which equal cosines go
        query, row, product = query[in_order], row[in_order], product[in_order]
        order, rank = ranks(query, product, len(queries))
        order, rank = order[rank < k], rank[rank < k]
        products = torch.full_like(floor_N[:, None].expand(-1, k), -torch.inf)
        positions = torch.full_like(products, -1, dtype=torch.int64)
        positions[query[order], rank] = row[order]
        products[query[order], rank] = product[order]
        return positions, products, crowded_N

    def _limit(self, queries: Queries, cosine_N: torch.Tensor) -> torch.Tensor:
        """The lowest score of a row that has at least this cosine."""
        if self._fine:
            return (cosine_N - FINE_ERROR * queries.rows.shape[1]).clamp(min=NOTHING / 2)
        limit_N = cosine_N * self._scan.unit - queries.error
        return limit_N.clamp(min=NOTHING / 2).ceil().int()

    def _crowded(self, maxima_NM: torch.Tensor, limit_N: torch.Tensor) -> torch.Tensor:
        most = CROWD + 8 * self._scan.k if not self._fine else maxima_NM.shape[1]
        return (maxima_NM >= limit_N[:, None]).sum(1) > most

    def _pairs(
        self, part: slice, maxima_NM: torch.Tensor, limit_N: torch.Tensor,
        below_N: torch.Tensor | None,
    ) -> Tensors:  # fmt: skip
        """Queries (P,), rows (P,) and cosines (P,) of all pairs whose score is at least `limit` and
        under `below`, each once."""
        layout, groups = self._layout, self._layout.groups
        query, group = (maxima_NM >= limit_N[:, None]).nonzero().unbind(1)
        slot = (query + part.start) * self._read + group.div(groups, rounding_mode="floor")
        inner, cell = group % groups, self._cell_S[slot]
        members = layout.members[cell]
        line = torch.repeat_interleave(members)  # the group of each of its members
        step = torch.arange(len(line), device=line.device) - (members.cumsum(0) - members)[line]
        score = self._scores[(self._begin_S[slot] + inner)[line] + step * groups]
        hit = score >= limit_N[query][line]
        if below_N is not None:
            hit &= score < below_N[query][line]
        line, step = line[hit], step[hit]
        row = layout.numbers[(layout.first[cell] + inner)[line] + step * groups].long()
        query = query[line]
        if layout.copies > 1:
            pair = torch.unique(query * layout.rows + row)
            query = pair.div(layout.rows, rounding_mode="floor")
            row = pair - query * layout.rows
        return query, row, self._scan.exact(self._queries.rows[part], query, row)


def ranks(query: torch.Tensor, keys: torch.Tensor, queries: int) -> Tensors:
    """The order of pairs by query (P,) and descending key (P,), and in this order the rank of each
    within its query."""
    order = keys.argsort(descending=True, stable=True)
    order = order[query[order].argsort(stable=True)]
    sizes = torch.bincount(query, minlength=queries)
    starts = sizes.cumsum(0) - sizes
    return order, torch.arange(len(order), device=order.device) - starts[query[order]]


def _runs(flat: torch.Tensor, starts: np.ndarray, width: int) -> torch.Tensor:
    """Runs of `flat` (B, width) from `starts` on."""
    if len(starts) == 1:
        return flat[starts[0] : starts[0] + width][None]
    at = torch.from_numpy(starts[:, None] + np.arange(width)).to(flat.device)
    return flat[at.clamp_(max=len(flat) - 1)]


_kept = threading.local()


def scratch(device: torch.device, size: int) -> torch.Tensor:
    """Memory for scores (size,) int32, one for all searches of a thread."""
    kept: dict[str, torch.Tensor] = _kept.__dict__
    if str(device) not in kept or len(kept[str(device)]) < size:
        kept[str(device)] = torch.empty(size, dtype=torch.int32, device=device)
    return kept[str(device)][:size]


@contextmanager
def in_threads(device: torch.device, work: int) -> Iterator[Map]:
    """A `map` over as many threads as torch would use on a CPU, each of which computes alone; the
    built-in one where there is only one, or little `work` (multiplications)."""
    threads = torch.get_num_threads()
    if device.type != "cpu" or threads == 1 or work < SMALL_WORK:
        yield map
        return
    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:

            def spread(work: Callable[[Any], Any], items: list[Any]) -> list[Any]:
                each = -(-len(items) // (PARTS * threads))
                parts = [items[at : at + each] for at in range(0, len(items), each)]
                found = pool.map(lambda part: [work(item) for item in part], parts)
                return [answer for part in found for answer in part]

            yield spread
    finally:
        torch.set_num_threads(threads)
