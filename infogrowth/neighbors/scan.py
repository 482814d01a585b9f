"""Multiplying queries with the rows of the cells that they read, and deciding which are nearest.

Products of codes are scores: cosines, up to a known error. A row that scores less than the K-th
best of any rows that a query may see, by more than twice the error, is not among its K nearest: so
the first cells that a query reads give it a limit, and only rows that reach it are hits; no scores
need be kept. In the end the K best hits are multiplied in float64, then those whose score could
reach the least of these cosines. So the answer is that of float64 products with all rows that were
read, each summed in one fixed order, equal ones by position. Queries for which codes leave a crowd
of hits are looked up again with scores that are float64 products, rounded to integers.

Shapes: N queries, S slots (a query and a cell that it reads), B cells multiplied together, W rows
of each, in L groups, P hits: a query, a row and its score.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np
import torch

from infogrowth.neighbors.cells import Layout, Tensors
from infogrowth.neighbors.codes import best_of, full_precision, multiply
from infogrowth.neighbors.store import RowStore
from infogrowth.rows import fold_sum

NO_LIMIT, NOTHING = -(2**30), 2**30  # limits that all scores reach, and none
FINE_UNIT = 2.0**29  # of scores that are products in float64, rounded
CROWD = 256  # hits of a query, and eight a neighbor, beyond which codes are too coarse
CROWDED_AT_ONCE = 1024  # such queries: they may have thousands of hits each
ROOM = 64  # hits of a query in a cell, on average, from which on each is counted
TILE = {"cpu": (1 << 21, 64), "cuda": (1 << 27, 256)}  # scores, cells: held at once
PAIR_ELEMENTS = {"cpu": 1 << 19, "cuda": 1 << 26}  # multiplied at once
PARTS = 4  # of the work, for each thread: so they end at about the same time

Map = Callable[[Callable[[Any], Any], list[Any]], Iterable[Any]]
Tile = tuple[np.ndarray, np.ndarray, int]


@dataclass(frozen=True)
class Queries:
    """N queries as `rows` (N, D) float32 and `codes` (N, ·) int8, whose products are off by `error`
    cosines (N,) at most. Query i sees the first `visible[i]` rows, in ascending order."""

    rows: torch.Tensor
    codes: torch.Tensor
    error: torch.Tensor
    visible: torch.Tensor

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, which: Any) -> Queries:
        """Some of them."""
        return Queries(*(getattr(self, name)[which] for name in self.__dataclass_fields__))


class Scan:
    """Looks queries up among rows in a layout.

    Args:
        rows, codes: the rows by number; a product of codes is `unit` cosines.
        threads: a `map` that shares the work.
        fine: scores are products of rows instead, in `FINE_UNIT`.
    """

    def __init__(
        self, layout: Layout, rows: RowStore, codes: RowStore, unit: float, k: int, threads: Map,
        fine: bool = False,
    ) -> None:  # fmt: skip
        self._layout, self._rows, self._codes, self._k = layout, rows, codes, k
        self._threads, self._fine, self._device = threads, fine, rows.device.type
        self._unit = FINE_UNIT if fine else unit
        self._finer = partial(Scan, layout, rows, codes, unit, k, threads, True)

    def nearest(self, queries: Queries, passes: list[Tensors]) -> Tensors:
        """Positions (N, K) of the nearest rows, -1 where there are fewer, and cosines (N, K)
        float64. In each pass, slots are read: cells (S,) and the queries (S,) that read them."""
        self._queries, count = queries, len(queries)
        self._error_N = torch.ones_like(queries.error) if self._fine else queries.error * self._unit
        self._limit_N = torch.full_like(queries.visible, NO_LIMIT, dtype=torch.int32)
        self._crowded_N = torch.zeros_like(queries.visible, dtype=torch.bool)
        found: list[Tensors] = []
        for cell_S, query_S in passes:
            slot_S, tiles = self._tiles(cell_S)
            query_S = query_S[cell_S.argsort(stable=True)[slot_S.to(cell_S.device)]]
            found += self._threads(partial(self._multiply, query_S), tiles)
        hits = tuple(map(torch.cat, zip(*found, strict=True)))
        edges = range(0, count + 1, max(1, -(-count // PARTS)))
        decided = self._threads(partial(self._decide, hits), list(pairwise([*edges[:-1], count])))
        positions, products = map(torch.cat, zip(*decided, strict=True))
        crowded = _where(self._crowded_N)
        for part in crowded.split(CROWDED_AT_ONCE) if len(crowded) else ():
            number_N = torch.full_like(queries.visible, -1, dtype=torch.int64)
            number_N[part] = torch.arange(len(part), device=part.device)
            again: list[Tensors] = [(c[number_N[q] >= 0], number_N[q]) for c, q in passes]
            again = [(c, number[number >= 0]) for c, number in again]
            positions[part], products[part] = self._finer().nearest(queries[part], again)
        return positions, products

    # --- multiplying -----------------------------------------------------------------------------

    def _tiles(self, cell_S: torch.Tensor) -> tuple[torch.Tensor, list[Tile]]:
        """In which order to take slots (S,) that lie in order of cells, and what to multiply
        together of these: cells (B,) of one width, how many slots each has, and the first."""
        scores, cells = TILE[self._device]
        scores //= 16 if self._fine else 1  # rows in float64 are that much larger than codes
        widths = self._layout.widths
        sizes = torch.bincount(cell_S, minlength=len(widths)).cpu().numpy()
        begins = np.cumsum(sizes) - sizes
        read = np.flatnonzero((sizes > 0) & (widths > 0))
        read = read[np.argsort(widths[read], kind="stable")]
        most = np.maximum(scores // widths[read], 1)  # queries at once
        parts = -(-sizes[read] // most)
        cell, most = np.repeat(read, parts), np.repeat(most, parts)
        offset = (np.arange(len(cell)) - np.repeat(np.cumsum(parts) - parts, parts)) * most
        size = np.minimum(sizes[cell] - offset, most)
        first = np.cumsum(size) - size
        slot = np.arange(size.sum()) + np.repeat(begins[cell] + offset - first, size)
        full = np.cumsum(size * widths[cell]) // scores
        tile = np.stack([widths[cell], full, np.arange(len(cell)) // cells])
        edges = [0, *(np.flatnonzero((np.diff(tile) != 0).any(0)) + 1).tolist(), len(cell)]
        spans = [slice(a, b) for a, b in pairwise(edges) if b > a]
        return torch.from_numpy(slot), [(cell[s], size[s], first[s.start]) for s in spans]

    def _multiply(self, query_S: torch.Tensor, tile: Tile) -> Tensors:
        """The hits of a tile."""
        cell_B, size_B, first = tile
        query_S = query_S[first : first + size_B.sum()]
        number_BW = self._layout.take(cell_B)
        width = number_BW.shape[1]
        cell_S = torch.from_numpy(np.arange(len(size_B)).repeat(size_B)).to(query_S.device)
        score_SW = self._scores(query_S, number_BW, size_B.tolist())
        group_SML = score_SW.view(len(query_S), self._layout.members, -1)
        limit_S = self._limit_N.index_select(0, query_S)
        visible_S = self._queries.visible.index_select(0, query_S)
        enough, grouped = group_SML.shape[2] >= self._k, self._layout.members > 1
        given = query_S, number_BW, cell_S, visible_S, score_SW
        if raised := enough and (grouped or bool((limit_S == NO_LIMIT).any())):
            maxima_SL, limit_S = self._raise(limit_S, *given)
        else:
            maxima_SL = group_SML.amax(1) if grouped else score_SW
        slot, column, score = _reaching(maxima_SL, limit_S)
        if enough and not raised and len(slot) > ROOM * len(limit_S):  # the limit is of little use
            maxima_SL, limit_S = self._raise(limit_S, *given)
            slot, column, score = _reaching(maxima_SL, limit_S)
        if grouped:
            hit, step, score = _reaching(group_SML[slot, :, column], limit_S[slot])
            slot, column = slot[hit], column[hit] + step * group_SML.shape[2]
        row = number_BW.view(-1).index_select(0, cell_S[slot] * width + column)
        query = query_S.index_select(0, slot)
        seen = _where(row < visible_S.index_select(0, slot))
        if not self._fine and len(seen) > ROOM * len(limit_S):
            crowded_S = torch.bincount(slot[seen], minlength=len(limit_S)) > CROWD + 8 * self._k
            self._leave(query_S[crowded_S])
            seen = seen[~crowded_S[slot[seen]]]
        return _some((query, row.long(), score), seen)

    def _raise(
        self, limit_S: torch.Tensor, query_S: torch.Tensor, number_BW: torch.Tensor,
        cell_S: torch.Tensor, visible_S: torch.Tensor, score_SW: torch.Tensor,
    ) -> Tensors:  # fmt: skip
        """The best score (S, L) of each group, and limits (S,) that are at least the k-th best of
        these, less twice the error."""
        first_B1 = self._queries.visible[:1].expand(len(number_BW), 1).contiguous()
        late = int(torch.searchsorted(number_BW, first_B1).min())  # before, all see all
        unseen_SW = number_BW[:, late:].index_select(0, cell_S) >= visible_S[:, None]
        score_SW[:, late:].masked_fill_(unseen_SW, 2 * NO_LIMIT)
        members = self._layout.members
        maxima_SL = score_SW.view(len(score_SW), members, -1).amax(1) if members > 1 else score_SW
        kth_S = best_of(maxima_SL, self._k)[:, 0] - 2 * self._error_N.index_select(0, query_S)
        limit_S = limit_S.maximum(kth_S.floor().clamp(min=NO_LIMIT).int())
        self._limit_N[query_S] = limit_S
        return maxima_SL, limit_S

    def _scores(
        self, query_S: torch.Tensor, number_BW: torch.Tensor, sizes: list[int]
    ) -> torch.Tensor:
        """Scores (S, W) of queries with the rows of their cell, `sizes` queries each."""
        (cells, width), rows = number_BW.shape, self._codes.rows
        score_SW = _scratch("scores", (len(query_S), width), torch.int32, query_S.device)
        first, last = int(number_BW[0, 0]), int(number_BW[0, -1])
        there = number_BW.view(-1).clamp(max=self._layout.rows - 1)
        if self._fine:
            left, right = self._queries.rows[query_S].double(), self._rows.take(there).double()
            return score_SW.copy_((multiply(left, right, sizes) * FINE_UNIT).round_())
        if cells == 1 and last - first == width - 1 and last < self._layout.rows:
            left, right = self._queries.codes[query_S], rows[first : last + 1]
        else:
            left = _take("queries", self._queries.codes, query_S)
            right = _take("rows", rows, there)
        return multiply(left, right, sizes, score_SW)

    def _leave(self, query: torch.Tensor) -> None:
        """These queries are a crowd: no more hits need be found, as they are looked up again."""
        self._crowded_N[query] = True  # a limit may be overwritten by another thread, this not
        self._limit_N[query] = NOTHING

    # --- deciding --------------------------------------------------------------------------------

    def _decide(self, hits: Tensors, part: tuple[int, int]) -> Tensors:
        """Positions and cosines (N, K) of the nearest, for the queries from one up to another."""
        begin, end = part
        count, k = end - begin, self._k
        own = _where((hits[0] >= begin) & (hits[0] < end))
        query, row, score = _some(hits, own)
        possible = _where(score >= self._limit_N.index_select(0, query))
        query, row, score = _some((query - begin, row, score), possible)
        key = query * self._layout.rows + row
        order = _argsort(key)
        once = torch.ones_like(order, dtype=torch.bool)
        once[1:] = key.index_select(0, order).diff() != 0
        query, row, score = _some((query, row, score), order[once])
        order = _argsort(query * 2**32 - score)  # the best of each query first
        rank = _ranks(query, order, count)
        best = order[rank < k]
        product = torch.full_like(score, -torch.inf, dtype=torch.float64)
        product[best] = self._cosines(query[best] + begin, row[best])
        floor_N = torch.full((count,), torch.inf, dtype=torch.float64, device=query.device)
        floor_N.scatter_reduce_(0, query[best], product[best], "amin")
        limit_N = floor_N * self._unit - self._error_N[begin:end]
        others = order[(rank >= k) & (score >= limit_N.index_select(0, query))[order]]
        if not self._fine:
            crowded_N = torch.bincount(query[others], minlength=count) > CROWD + 8 * k
            self._leave(_where(crowded_N) + begin)
            others = others[~crowded_N[query[others]]]
        product[others] = self._cosines(query[others] + begin, row[others])
        query, row, product = _some((query, row, product), _where(product > -torch.inf))
        order = _ordered(-product).argsort(stable=True)
        order = order[query[order].argsort(stable=True)]
        rank = _ranks(query, order, count)
        order, rank = order[rank < k], rank[rank < k]
        products = torch.full((count, k), -torch.inf, dtype=torch.float64, device=query.device)
        positions = torch.full_like(products, -1, dtype=torch.int64)
        positions[query[order], rank] = row[order]
        products[query[order], rank] = product[order]
        return positions, products

    def _cosines(self, query: torch.Tensor, row: torch.Tensor) -> torch.Tensor:
        """Cosines (P,) float64 of pairs of a query and a row, summed in one fixed order."""
        product = torch.empty(len(query), dtype=torch.float64, device=query.device)
        step = max(1, PAIR_ELEMENTS[self._device] // self._rows.width)
        for at in range(0, len(query), step):
            part = slice(at, at + step)
            rows_PD = _take("hits", self._rows.rows, row[part])
            product_PD = _scratch("products", rows_PD.shape, torch.float64, rows_PD.device)
            product_PD.copy_(rows_PD)
            product_PD *= _take("hits", self._queries.rows, query[part])
            product[part] = fold_sum(product_PD)
        return product


def _reaching(score_SW: torch.Tensor, limit_S: torch.Tensor) -> Tensors:
    """Lines (P,) and columns (P,) of scores that reach the limit of their line, and the scores."""
    if score_SW.device.type != "cpu":
        line, column = (score_SW >= limit_S[:, None]).nonzero().unbind(1)
        return line, column, score_SW[line, column]
    reached = _scratch("reached", score_SW.shape, torch.bool, score_SW.device)
    np.greater_equal(score_SW.numpy(), limit_S.numpy()[:, None], out=reached.numpy())
    at = _where(reached.view(-1))
    line = at.div(score_SW.shape[1], rounding_mode="floor")
    return line, at - line * score_SW.shape[1], score_SW.reshape(-1).index_select(0, at)


def _where(mask: torch.Tensor) -> torch.Tensor:
    """The positions (P,) where a mask (M,) is true; on a CPU four times as fast as nonzero()."""
    if mask.device.type != "cpu":
        return mask.nonzero()[:, 0]
    return torch.from_numpy(np.flatnonzero(mask.numpy()))


def _ranks(query: torch.Tensor, order: torch.Tensor, queries: int) -> torch.Tensor:
    """The rank of each hit within its query, in an `order` in which those of a query follow each
    other."""
    sizes = torch.bincount(query, minlength=queries)
    starts = sizes.cumsum(0) - sizes
    return torch.arange(len(order), device=order.device) - starts[query[order]]


def _ordered(values: torch.Tensor) -> torch.Tensor:
    """Integers in the order of float64 values: they are sorted several times as fast."""
    bits = (values + 0.0).view(torch.int64)  # no -0.0
    return bits ^ ((bits >> 63) & (2**63 - 1))


def _argsort(keys: torch.Tensor) -> torch.Tensor:
    """The order of keys, equal ones in any."""
    return (
        torch.from_numpy(np.argsort(keys.numpy())) if keys.device.type == "cpu" else keys.argsort()
    )


def _some(hits: Tensors, which: torch.Tensor) -> Tensors:
    return tuple(part.index_select(0, which) for part in hits)


_kept = threading.local()


def _scratch(
    name: str, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device
) -> torch.Tensor:
    """Memory whose content is used up before the thread asks for it again under this name: on a
    CPU, to touch new memory costs as much as what is done with it."""
    size, key = math.prod(shape), f"{name} {dtype}"
    if device.type != "cpu":
        return torch.empty(shape, dtype=dtype, device=device)
    if len(_kept.__dict__.get(key, ())) < size:
        _kept.__dict__[key] = torch.empty(size, dtype=dtype)
    return _kept.__dict__[key][:size].view(shape)


def _take(name: str, rows_MD: torch.Tensor, number_P: torch.Tensor) -> torch.Tensor:
    """Rows (P, D) by number, in scratch memory."""
    out = _scratch(name, (len(number_P), rows_MD.shape[1]), rows_MD.dtype, rows_MD.device)
    return torch.index_select(rows_MD, 0, number_P, out=out)


@contextmanager
def in_threads(device: torch.device, few: bool) -> Iterator[Map]:
    """A `map` over as many threads as torch would use on a CPU, each of which computes alone; the
    built-in one where there is only one, or `few` to look up: one thread does it sooner than two
    would agree."""
    threads = torch.get_num_threads()
    if device.type != "cpu" or threads == 1 or few:
        yield map
        return
    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:

            def spread(work: Callable[[Any], Any], items: list[Any]) -> list[Any]:
                each = -(-len(items) // (PARTS * threads)) or 1
                parts = [items[at : at + each] for at in range(0, len(items), each)]
                found = pool.map(lambda part: [work(item) for item in part], parts)
                return [answer for part in found for answer in part]

            yield spread
    finally:
        torch.set_num_threads(threads)


def side_by_side(work: Callable[[Any], Any], items: list[Any], one_by_one: bool) -> None:
    """Do the work for each item, at a time with an equal share of torch's threads for each: where
    each spends a part of its time in one thread, this is sooner than `one_by_one`."""
    threads = torch.get_num_threads()
    if one_by_one or threads < len(items):
        for item in items:
            work(item)
        return
    begin, share = torch.set_num_threads, threads // len(items)
    try:
        with (
            full_precision(),
            ThreadPoolExecutor(len(items), initializer=begin, initargs=(share,)) as pool,
        ):
            list(pool.map(work, items))
    finally:
        torch.set_num_threads(threads)
