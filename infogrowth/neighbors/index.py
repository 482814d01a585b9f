"""The index: rows that are added at the end, taken off the end, and searched."""

from __future__ import annotations

import logging
import time
from bisect import bisect_left
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import compress
from typing import Any

import numpy as np
import torch

from infogrowth.errors import UserError
from infogrowth.neighbors.base import Neighbors, Shard, no_neighbors
from infogrowth.neighbors.cells import (
    SAMPLE_PER_CELL,
    TOGETHER,
    Cells,
    Layout,
    cell_count,
    learn_centers,
)
from infogrowth.neighbors.codes import PORTION, Coder, full_precision
from infogrowth.neighbors.copies import Copies
from infogrowth.neighbors.scan import Map, Queries, Scan, Tensors, in_threads
from infogrowth.neighbors.store import RowStore
from infogrowth.randomness import generator

log = logging.getLogger(__name__)

AT_ONCE = {"cpu": (1024, 32768), "cuda": (4096, 65536)}  # queries: with all rows, with cells
RUN = {"cpu": 1 << 13, "cuda": 1 << 16}  # rows of which exact search makes a cell
MEMBERS = 16  # rows in a group of these
FEW_ROWS, FEW_PAIRS = 1 << 13, 1 << 18  # that one thread multiplies sooner than two would agree
HIT_BYTES = 512  # that the hits of a query take, for each neighbor

PROBE_ROWS = 1024  # rows on which the gain error is measured
READS = (8, 12, 16, 20, 24, 28, 32, 40, 48, 56, 64, 80, 96, 128, 192, 256, 384, 512)
TOLERABLE_ERROR = 1.5e-3  # mean gain error that decides how many cells are read; 2e-3 is promised


class NeighborIndex:
    """Unit rows in order of insertion, and the `k` nearest of them by cosine.

    Exact, or from `cells_from` rows on among the rows of the nearest cells only; these are learned
    at `cells_from` rows and whenever there are twice as many. With a `shard` of several ranks each
    holds a part of the rows, and all must make the same calls. `memory_mb` bounds the scratch
    memory of a search (on a GPU it is a sixteenth of the card if that is more).
    """

    @torch.inference_mode(False)
    def __init__(
        self,
        dimension: int,
        k: int,
        device: str | torch.device = "cpu",
        memory_mb: float = 256,
        cells_from: int | None = None,
        shard: Shard | None = None,
        reason: str = "",
    ) -> None:
        self.dimension, self.k, self.cells_from = dimension, k, cells_from
        self.device = torch.device(device)
        self._shard, self._reason = shard or Shard(), reason
        memory = int(memory_mb * 2**20)
        if self.device.type == "cuda":
            total = torch.cuda.get_device_properties(self.device).total_memory
            memory = max(memory, total // 16)
        self._at_once = max(1, memory // (8 * dimension + HIT_BYTES * k))  # queries
        self._count = 0
        self._coder = Coder(dimension, self.device)
        self._rows = RowStore(dimension, torch.float32, self.device)
        self._codes = RowStore(self._coder.width, torch.int8, self.device)
        self._code_error = 0.0  # the largest distance of a row from its code
        self._copies = Copies(k + 1)  # + 1: a probe is looked up without itself
        self._surplus = RowStore(1, torch.bool, self.device)  # which rows no answer can need
        self._cells: Cells | None = None
        self._trained = 0
        self._searched = False
        self.gain_error: tuple[float, float, float] | None = None

    @property
    def count(self) -> int:
        """How many rows are held (over all ranks)."""
        return self._count

    @property
    def alone(self) -> bool:
        """Whether no other index may be searched beside it: ranks exchange in one order, and a GPU
        is busy with one."""
        return self._shard.world_size > 1 or self.device.type != "cpu"

    @torch.inference_mode(False)
    @torch.no_grad()
    def extend(self, rows: np.ndarray) -> None:
        """Add (M, D) float32 unit rows."""
        self.truncate(self._count)  # what a failed call left
        for start in range(0, len(rows), TOGETHER):
            joining = rows[start : start + TOGETHER]
            own = self._shard.own(joining, self._count)
            with self._working(few=len(own) < PORTION) as threads:
                self._add(*self._encode(own, joining, threads))

    def truncate(self, count: int) -> None:
        """Forget all rows from position `count` on."""
        self._count = min(self._count, count)
        self._copies.truncate(self._count)
        own = self._shard.count(self._count)
        for held in (self._rows, self._codes, self._surplus, self._cells):
            if held is not None:
                held.truncate(own)

    def rows(self, start: int, stop: int) -> np.ndarray:
        """The rows from `start` up to `stop`, (stop − start, D) float32."""
        return self._take(np.arange(start, min(stop, self._count)), self._rows)

    def search(self, queries: np.ndarray, visible: np.ndarray) -> Neighbors:
        """The k nearest rows of each of (N, D) float32 unit `queries`.

        Query i sees the first `visible[i]` rows only; `visible` (N,) int64 must not decrease.
        """
        return self._search_as_trained(queries, visible, np.zeros(len(queries), bool))

    def search_and_extend(self, queries: np.ndarray, joins: np.ndarray) -> Neighbors:
        """The k nearest rows of each query, among those there are and the queries before it that
        join, `joins` (N,) bool. These are rows from then on."""
        self.truncate(self._count)
        visible = self._count + np.cumsum(joins) - joins
        return self._search_as_trained(queries, visible, joins)

    def report(self) -> dict[str, Any] | None:
        """How the last queries were looked up, ready for JSON: it depends on the rows they saw
        alone. None before the first search."""
        if not self._searched:
            return None
        error = dict(zip(("mean", "p99", "max"), self.gain_error or (), strict=False))
        return {
            "search": "exact" if self._cells is None else "cells",
            "reason": self._reason,
            "cells_from": self.cells_from,
            "rows_trained": self._trained,
            "cells": len(self._cells) if self._cells else None,
            "cells_read": self._cells.read if self._cells else None,
            "gain_error": error or None,
        }

    def describe(self) -> str:
        """One line on how this index searches."""
        how = "exact search"
        if self.cells_from is not None:
            how += f" below {self.cells_from:,} rows, the nearest cells from there on"
        if self._shard.world_size > 1:
            how += f", spread over {self._shard.world_size} ranks"
        return f"{how}, on {self.device}, {self.bytes_per_row} bytes a row"

    @property
    def bytes_per_row(self) -> int:
        """What a row takes on its rank: itself, its code, its cells."""
        return 4 * self.dimension + self._coder.width + (1 if self.cells_from is None else 17)

    # --- one search --------------------------------------------------------------------------

    @torch.inference_mode(False)
    @torch.no_grad()
    def _search_as_trained(
        self, queries: np.ndarray, visible: np.ndarray, joins: np.ndarray
    ) -> Neighbors:
        """Each query among the cells that serve what it sees."""
        found = no_neighbors(len(queries), self.k)
        trained = self._trained_for(visible)
        for rows in np.unique(trained).tolist():
            part = slice(*np.searchsorted(trained, (rows, rows + 1)))
            self._train(rows)
            given = queries[part], visible[part], joins[part]
            answer = self._search(*given, self.k, self._cells)
            found.positions[part], found.products[part] = answer.positions, answer.products
            self._searched = True
        return found

    def _search(
        self, queries: np.ndarray, visible: np.ndarray, joins: np.ndarray, k: int,
        cells: Cells | None,
    ) -> Neighbors:  # fmt: skip
        """The nearest rows over all ranks, with the positions they have in the whole dataset."""
        found = no_neighbors(len(queries), k)
        seen = self._shard.count(visible).astype(np.int32)
        own = joins & (visible % self._shard.world_size == self._shard.rank)
        step = min(AT_ONCE[self.device.type][cells is not None], self._at_once)
        few = len(queries) * min(self._count + 1, FEW_ROWS) < FEW_PAIRS
        for start in range(0, len(queries), step):
            part = slice(start, start + step)
            with self._working(few) as threads:
                joining = compress(queries[part], joins[part])
                coded, surplus = self._encode(queries[part], joining, threads)
                own_N = torch.from_numpy(own[part]).to(self.device)
                if len(surplus):
                    self._add(_those(own_N, coded), surplus)
                rows_ND, codes_ND, error_N = coded
                error_N = self._code_error + error_N.double() * (1 + self._code_error)
                sees_N = torch.from_numpy(seen[part]).to(self.device)
                begin = int(np.searchsorted(seen[part], 1))  # whoever comes before sees nothing
                if begin < len(rows_ND):
                    looking = Queries(rows_ND, codes_ND, error_N, sees_N)[begin:]
                    answer = self._nearest(looking, own_N[begin:], k, cells, threads)
                    entered = found.part(slice(start + begin, start + step))
                    entered.positions[:], entered.products[:] = (x.cpu().numpy() for x in answer)
        return self._shard.merge(found, k)

    def _encode(
        self, rows: np.ndarray, joining: Iterable[np.ndarray], threads: Map
    ) -> tuple[Tensors, np.ndarray]:
        """Rows (M, D) on the device, their codes and how far these are off; beside that, which of
        the rows `joining` are surplus."""
        rows_MD = torch.from_numpy(np.ascontiguousarray(rows)).to(self.device)
        count = partial(self._copies.add, joining)
        code = [partial(self._coder.encode, part) for part in rows_MD.split(PORTION)]
        surplus, *coded = threads(lambda work: work(), [count, *code])
        codes_MD, error_M = map(torch.cat, zip(*coded, strict=True))
        return (rows_MD, codes_MD, error_M), surplus

    def _add(self, own: Tensors, surplus: np.ndarray) -> None:
        """Hold this rank's rows, given with their codes and errors, of the ones that join."""
        rows_MD, codes_MD, error_M = own
        here = torch.from_numpy(self._shard.own(surplus, self._count).copy())
        self._surplus.extend(here[:, None])
        self._rows.extend(rows_MD)
        self._codes.extend(codes_MD)
        if len(error_M):
            self._code_error = max(self._code_error, float(error_M.max()))
        self._count += len(surplus)

    def _nearest(
        self, queries: Queries, own_N: torch.Tensor, k: int, cells: Cells | None, threads: Map
    ) -> Tensors:
        """Positions (N, k) among this rank's rows, and cosines in float64. Queries of `own_N` are
        the last rows themselves."""
        if cells is None:
            layout, passes = self._runs(int(queries.visible[-1]), len(queries))
        else:
            near = cells.nearest(queries.codes, threads)
            known = _those(own_N, near)
            cells.extend(self._codes.rows, self._surplus.rows[:, 0], known, threads)
            layout, passes = cells.layout, cells.passes(near)
        scan = Scan(layout, self._rows, self._codes, self._coder.unit, k, threads)
        return scan.nearest(queries, passes)

    def _runs(self, rows: int, queries: int) -> tuple[Layout, list[Tensors]]:
        """All rows, run by run: the cells of exact search, which every query reads in turn."""
        run = RUN[self.device.type]
        cell_M = torch.arange(rows, device=self.device, dtype=torch.int32) // run
        count = -(-rows // run)
        cell_M.masked_fill_(self._surplus.rows[:rows, 0], count)
        all_N = torch.arange(queries, device=self.device)
        passes: list[Tensors] = [(torch.full_like(all_N, cell), all_N) for cell in range(count)]
        return Layout(cell_M[:, None], count, MEMBERS), passes

    # --- cells -------------------------------------------------------------------------------

    def _trained_for(self, visible: np.ndarray) -> np.ndarray:
        """At how many rows the cells were learned that serve who sees `visible` rows; 0: none."""
        if self.cells_from is None:
            return np.zeros_like(visible)
        doublings = np.frexp(visible / self.cells_from)[1] - 1  # exact: ⌊log₂⌋
        return np.where(visible < self.cells_from, 0, self.cells_from << np.maximum(doublings, 0))

    def _train(self, rows: int) -> None:
        """Have the cells that are learned from the first `rows` rows, none for 0."""
        if rows == self._trained:
            return
        self._trained, self._cells, self.gain_error = 0, None, None
        if rows == 0:
            return
        begun = time.perf_counter()
        random = generator(0, "cells", rows)
        count = cell_count(rows)
        size = min(rows, SAMPLE_PER_CELL * count)
        drawn = random.choice(rows, min(rows, PROBE_ROWS + size), replace=False)
        sample, probe = np.sort(drawn[-size:]), np.sort(drawn[:PROBE_ROWS])
        with self._working(few=False) as threads:
            codes_SD = torch.from_numpy(self._take(sample, self._codes)).to(self.device)
            unit = self._coder.unit
            cells = Cells(learn_centers(codes_SD, count, unit, random, threads), unit)
        learned = time.perf_counter() - begun
        mean, p99, largest = self.gain_error = self._measure(cells, rows, probe)
        self._trained, self._cells = rows, cells
        log.info(
            "Cells learned from %s rows: %d, of which %d are read; mean gain error %.5f on %d rows "
            "(99th percentile %.5f, largest %.5f); %.1f s, and %.1f s to measure.",
            f"{rows:,}", count, cells.read, mean, PROBE_ROWS, p99, largest,
            learned, time.perf_counter() - begun - learned,
        )  # fmt: skip

    def _measure(self, cells: Cells, rows: int, chosen: np.ndarray) -> tuple[float, float, float]:
        """Gain error against exact search, of the rows `chosen` among the first `rows`; it decides
        how many cells are read."""
        given = (
            self._take(chosen, self._rows),
            np.full(len(chosen), rows),
            np.zeros(len(chosen), bool),
        )

        def gains(cells: Cells | None) -> np.ndarray:
            found = self._search(*given, self.k + 1, cells).without(chosen)
            return np.nan_to_num(found.distances, nan=1.0).mean(axis=1)

        exact, errors = gains(None), {}

        def suffices(read: int) -> bool:
            cells.read = read
            errors[read] = gains(cells) - exact
            return bool(errors[read].mean() <= TOLERABLE_ERROR)

        reads = sorted({min(read, len(cells)) for read in READS})
        cells.read = reads[bisect_left(reads[:-1], True, key=suffices)]
        error = errors.get(cells.read)
        if error is None:
            error = gains(cells) - exact
        return float(error.mean()), float(np.quantile(error, 0.99)), float(error.max())

    def _take(self, positions: np.ndarray, held: RowStore) -> np.ndarray:
        """What is held of the rows at `positions` (M,) of the dataset, (M, width), on all ranks."""

        def own(positions: np.ndarray) -> np.ndarray:
            return held.take(torch.from_numpy(positions).to(self.device)).cpu().numpy()

        return self._shard.collect(positions, own)

    @contextmanager
    def _working(self, few: bool) -> Iterator[Map]:
        """Threads that compute in full precision, one alone where there is little to do. Running
        out of memory is reported in one sentence."""
        try:
            with full_precision(), in_threads(self.device, few) as threads:
                yield threads
        except (MemoryError, RuntimeError) as error:  # OutOfMemoryError is a RuntimeError
            full = isinstance(error, (MemoryError, torch.OutOfMemoryError))
            if not full and "allocate memory" not in str(error):
                raise
            held = self._rows.count * self.bytes_per_row / 2**30
            raise UserError(
                f"{self.device} has no room for more than {self._rows.count:,} rows of "
                f"{self.dimension} columns ({held:.1f} GiB, {self.bytes_per_row} bytes a row in "
                "each space); spread them over more ranks, take a larger device, or lower memory_mb"
            ) from error


def _those(own_N: torch.Tensor, of_rows: Tensors) -> Tensors:
    """What is true of some rows only; if of all, it is not copied."""
    return of_rows if bool(own_N.all()) else tuple(of_row[own_N] for of_row in of_rows)
