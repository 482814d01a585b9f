"""The index: rows that are added at the end, taken off the end, and searched."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from infogrowth.errors import UserError
from infogrowth.neighbors.base import Neighbors
from infogrowth.neighbors.candidates import Candidates, pair_products
from infogrowth.neighbors.cells import SAMPLE_PER_CELL, Cells, cell_count, learn_centers
from infogrowth.neighbors.copies import Copies
from infogrowth.neighbors.fast import FastRows, HalfRows, LeadingRows, summation_error
from infogrowth.neighbors.scan import Scan
from infogrowth.neighbors.shards import Shard
from infogrowth.neighbors.store import RowStore
from infogrowth.randomness import generator

log = logging.getLogger(__name__)

DENSE_QUERIES, CELL_QUERIES = 4096, 16384  # looked up at once
FEW_QUERIES = 256  # are multiplied in float32: preparing the fast product costs more than it saves
MANY_HITS = 96  # per query: more, and the fast product does not pay
LEARN_ROWS = 8192  # from which the leading directions are learned
RELEARN = 4  # they are learned anew when there are so many times as many
LEAST_COLUMNS = 64  # of which a part is worth a product of its own
PORTION = 65536  # rows copied at once

PROBE_ROWS = 1024  # rows on which the gain error is measured
READS = (6, 8, 10, 12, 14, 16, 20, 24, 28, 32, 40, 48, 64, 96, 128, 256, 512)
TOLERABLE_ERROR = 1.7e-3  # mean gain error that decides how many cells are read; 2e-3 is promised


class NeighborIndex:
    """Unit rows in order of insertion, and the `k` nearest of them by cosine.

    Exact, or from `cells_from` rows on among the rows of the nearest cells only; these are learned
    at `cells_from` rows and whenever there are twice as many. With a `shard` of several ranks each
    holds a part of the rows, and all must make the same calls. `memory_mb` bounds the scratch
    memory of a search (on a GPU it is a sixteenth of the card if that is more).
    """

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
        self._shard = shard or Shard()
        self._reason = reason
        self._memory = int(memory_mb * 2**20)
        if self.device.type == "cuda":
            total = torch.cuda.get_device_properties(self.device).total_memory
            self._memory = max(self._memory, total // 16)
        self._count = 0
        self._rows = RowStore(dimension, torch.float32, self.device)
        self._copies = Copies(dimension, k + 1)  # + 1: a probe is looked up without itself
        self._surplus = RowStore(1, torch.bool, self.device)  # which rows no answer can need
        self._half = half_precision(self.device)
        self._fast: FastRows | None = None
        self._fast_learned = 0
        self._fast_pays = True
        self._cells: Cells | None = None
        self._trained = 0
        self._searched = False
        self.gain_error: tuple[float, float, float] | None = None

    @property
    def count(self) -> int:
        """How many rows are held (over all ranks)."""
        return self._count

    @torch.inference_mode(False)
    @torch.no_grad()
    def extend(self, rows: np.ndarray) -> None:
        """Add (M, D) float32 unit rows."""
        self.truncate(self._count)  # what a failed call left
        own = np.ascontiguousarray(self._shard.own(rows, self._count))
        with self._enough_memory():
            surplus = self._shard.own(self._copies.add(rows), self._count)
            self._surplus.extend(torch.from_numpy(surplus[:, None].copy()))
            self._rows.extend(torch.from_numpy(own))
        self._count += len(rows)

    def truncate(self, count: int) -> None:
        """Forget all rows from position `count` on."""
        self._count = min(self._count, count)
        self._copies.truncate(self._count)
        own = self._shard.count(self._count)
        self._rows.truncate(own)
        self._surplus.truncate(own)
        if self._fast is not None:
            self._fast.store.truncate(own)
        if self._cells is not None:
            self._cells.truncate(own)

    def rows(self, start: int, stop: int) -> np.ndarray:
        """The rows from `start` up to `stop`, (stop − start, D) float32."""
        return self._take(np.arange(start, min(stop, self._count)))

    @torch.inference_mode(False)
    @torch.no_grad()
    def search(self, queries: np.ndarray, visible: np.ndarray) -> Neighbors:
        """The k nearest rows of each of (N, D) float32 unit `queries`.

        Query i sees the first `visible[i]` rows only; `visible` (N,) int64 must not decrease. So a
        whole batch is looked up at once, each sample among the samples that came before it.
        """
        trained = np.array([self._trained_for(int(number)) for number in np.unique(visible)])
        starts = np.searchsorted(visible, np.unique(visible))
        parts = []
        for rows in np.unique(trained):
            begin = starts[trained == rows][0]
            later = starts[trained > rows]
            part = slice(begin, later[0] if len(later) else len(queries))
            self._train(int(rows))
            parts.append(self._search(queries[part], visible[part], self.k, self._cells))
            self._searched = True
        if not parts:
            return Neighbors(np.empty((0, self.k), np.int64), np.empty((0, self.k)))
        return Neighbors(
            np.concatenate([part.positions for part in parts]),
            np.concatenate([part.products for part in parts]),
        )

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
            "cells": len(self._cells.centers_JD) if self._cells else None,
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
        """What a row takes on its rank: itself, its copy for fast products, its cell."""
        fast = 2 if self._half else 2.4 if self.cells_from is None else 0
        return round(self.dimension * (4 + fast)) + (0 if self.cells_from is None else 24)

    # --- one search --------------------------------------------------------------------------

    def _search(
        self, queries: np.ndarray, visible: np.ndarray, k: int, cells: Cells | None
    ) -> Neighbors:
        """The nearest rows over all ranks, with the positions they have in the whole dataset."""
        positions = np.full((len(queries), k), -1, np.int64)
        products = np.full((len(queries), k), -np.inf)
        step = DENSE_QUERIES if cells is None else CELL_QUERIES
        with self._enough_memory(), full_precision():
            for start in range(0, len(queries) if self._rows.count else 0, step):
                part = slice(start, start + step)
                found = self._nearest(
                    torch.from_numpy(np.ascontiguousarray(queries[part])).to(self.device),
                    torch.from_numpy(self._shard.count(visible[part])).to(self.device),
                    k,
                    cells,
                )
                positions[part], products[part] = (tensor.cpu().numpy() for tensor in found)
        return self._shard.merge(Neighbors(positions, products), k)

    def _nearest(
        self, queries_ND: torch.Tensor, visible_N: torch.Tensor, k: int, cells: Cells | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Positions (N, k) among this rank's rows, and cosines in float64."""

        def exact(query_P: torch.Tensor, position_P: torch.Tensor) -> torch.Tensor:
            return pair_products(queries_ND, query_P, self._rows.take, position_P)

        error = summation_error(self.dimension)
        candidates = Candidates(len(queries_ND), k, error, exact, self.device)
        fast = self._fast_rows(cells is not None) if len(queries_ND) >= FEW_QUERIES else None
        surplus = self._surplus if self._copies.surplus else None
        scan = Scan(queries_ND, visible_N, self._rows, fast, surplus, k, self._memory)
        if cells is not None:
            cells.extend(self._rows)
            scan.nearest_cells(cells, candidates)
        elif scan.all_rows(candidates) > MANY_HITS * len(queries_ND):
            self._fast_pays = False
            log.info("Neighbors lie too close for fast products; going on in float32.")
        return candidates.result()

    def _fast_rows(self, in_cells: bool) -> FastRows | None:
        """The copy for fast products, up to date; None where there is none that pays."""
        count = self._rows.count
        if in_cells and self.device.type == "cpu":  # 16-bit products of so many shapes, each
            self._fast = None  # prepared anew, take longer than float32 ones
            return None
        if self._half is not None:
            if self._fast is None:
                self._fast = HalfRows(self.dimension, self._half, self.device)
        elif self.dimension < LEAST_COLUMNS:
            self._fast = None
        elif count >= max(LEARN_ROWS, RELEARN * self._fast_learned):
            self._fast_learned = count
            leading = LeadingRows(torch.cat([x for _, x in self._rows.pieces(0, LEARN_ROWS)]))
            self._fast = leading if leading.pays else None
        if self._fast is None or not self._fast_pays:
            return None
        for _, rows_MD in self._rows.pieces(self._fast.store.count, count):
            for part_MD in rows_MD.split(PORTION):
                self._fast.extend(part_MD)
        return self._fast

    # --- cells -------------------------------------------------------------------------------

    def _trained_for(self, visible: int) -> int:
        """At how many rows the cells were learned that serve who sees `visible` rows; 0: none."""
        rows = self.cells_from
        if rows is None or visible < rows:
            return 0
        while 2 * rows <= visible:
            rows *= 2
        return rows

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
        sample = random.choice(rows, min(rows, SAMPLE_PER_CELL * count), replace=False)
        sample_SD = torch.from_numpy(self._take(np.sort(sample))).to(self.device)
        with self._enough_memory(), full_precision():
            cells = Cells(learn_centers(sample_SD, count, random))
            cells.extend(self._rows)
        learned = time.perf_counter() - begun
        mean, p99, largest = self.gain_error = self._measure(cells, rows)
        self._trained, self._cells = rows, cells
        log.info(
            "Cells learned from %s rows: %d, of which %d are read; mean gain error %.5f on %d rows "
            "(99th percentile %.5f, largest %.5f); %.1f s, and %.1f s to measure.",
            f"{rows:,}", count, cells.read, mean, PROBE_ROWS, p99, largest,
            learned, time.perf_counter() - begun - learned,
        )  # fmt: skip

    def _measure(self, cells: Cells, rows: int) -> tuple[float, float, float]:
        """Gain error against exact search, of a random probe of the first `rows` rows among the
        others; it decides how many cells are read."""
        random = generator(0, "cells probe", rows)
        chosen = np.sort(random.choice(rows, min(rows, PROBE_ROWS), replace=False))
        probe, visible = self._take(chosen), np.full(len(chosen), rows)

        def gains(cells: Cells | None) -> np.ndarray:
            found = self._search(probe, visible, self.k + 1, cells).without(chosen)
            return np.nan_to_num(found.distances, nan=1.0).mean(axis=1)

        exact = gains(None)
        for cells.read in READS:
            error = gains(cells) - exact
            if error.mean() <= TOLERABLE_ERROR or cells.read >= len(cells.centers_JD):
                break
        return float(error.mean()), float(np.quantile(error, 0.99)), float(error.max())

    def _take(self, positions: np.ndarray) -> np.ndarray:
        """The rows at `positions` (M,) of the dataset, (M, D) float32, on all ranks."""

        def own(positions: np.ndarray) -> np.ndarray:
            return self._rows.take(torch.from_numpy(positions).to(self.device)).cpu().numpy()

        return self._shard.collect(positions, own)

    @contextmanager
    def _enough_memory(self) -> Iterator[None]:
        """Running out of memory is told in one sentence."""
        try:
            yield
        except (torch.OutOfMemoryError, MemoryError) as error:
            raise self._too_large() from error
        except RuntimeError as error:
            if "allocate memory" not in str(error):
                raise
            raise self._too_large() from error

    def _too_large(self) -> UserError:
        held = self._rows.count * self.bytes_per_row / 2**30
        return UserError(
            f"{self.device} has no room for more than {self._rows.count:,} rows of "
            f"{self.dimension} columns ({held:.1f} GiB, {self.bytes_per_row} bytes a row in each "
            "space); spread them over more ranks, take a larger device, or lower memory_mb"
        )


@contextmanager
def full_precision() -> Iterator[None]:
    """Products in the precision of their factors, summed in float32: training may have allowed
    less, and what a product proves rests on its error."""
    cuda, cpu = torch.backends.cuda.matmul, torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    wanted: list[tuple[Any, str, Any]] = [
        (cuda, "fp32_precision", "ieee"),
        (cpu, "fp32_precision", "ieee"),
        (cuda, "allow_fp16_accumulation", False),
        (cuda, "allow_fp16_reduced_precision_reduction", False),
        (cuda, "allow_bf16_reduced_precision_reduction", False),
    ]
    before = [(place, name, getattr(place, name)) for place, name, _ in wanted]
    for place, name, value in wanted:
        setattr(place, name, value)
    try:
        with torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False):
            yield
    finally:
        for place, name, value in before:
            setattr(place, name, value)


def half_precision(device: torch.device) -> torch.dtype | None:
    """What this device multiplies faster than float32."""
    if device.type == "cuda":
        return torch.float16
    supported = getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    return torch.bfloat16 if supported() else None
