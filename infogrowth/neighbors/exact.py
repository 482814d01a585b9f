"""Exact search: a blocked matrix product with a running best, checked so that no winner is missed.

The product is fast but rounded. So it only nominates a few more candidates than asked for; their
cosines are recomputed in float64, and a certificate tells whether rounding could have hidden a
winner. Rows without certificate are searched again more carefully. The answer is therefore that
of a float64 brute force, at any block size, batch size, precision or device.

Shapes: N queries, W rows in a block, D dimension, C candidates, K neighbors.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch

from infogrowth.neighbors.base import GrowingRows, Neighbors
from infogrowth.neighbors.rows import fold_sum
from infogrowth.neighbors.selection import (
    GROUP,
    NOTHING,
    best_first,
    keep_best_ties,
    take_best,
    whole_groups,
)

log = logging.getLogger(__name__)

EXTRA_CANDIDATES = {torch.float32: 4, torch.float16: 12, torch.bfloat16: 12}
QUERY_ROWS = 4096  # queries looked up at once
TAIL_ROWS = 2048  # block size where queries of one batch see different numbers of rows
PATIENCE = 0.5  # share of rows without certificate above which half precision does not pay
SMALL_WORK = 1 << 27  # multiplications that one thread does sooner than two would agree
HALF_QUERIES = 256  # fewer are looked up in float32: preparing the product costs more than it


class ExactIndex:
    """Exact nearest rows by cosine, on any torch device.

    `precision` is that of the nominating product: "float32", "bfloat16", "float16" or "auto"
    (float16 on CUDA, bfloat16 on CPUs with instructions for it, else float32). It changes the
    speed, never the answer. `memory_mb` bounds the scratch memory of a search.
    """

    def __init__(
        self,
        dimension: int,
        k: int,
        device: str | torch.device = "cpu",
        memory_mb: float = 256,
        precision: str = "auto",
    ) -> None:
        self.dimension = dimension
        self.k = k
        self.device = torch.device(device)
        self.precision = _fast_precision(self.device) if precision == "auto" else (
            getattr(torch, precision)
        )  # fmt: skip
        self._memory = int(memory_mb * 2**20)
        self._rows = GrowingRows(dimension, torch.float32, self.device)
        self._halves: GrowingRows | None = None
        self._rounding = 0.0  # the largest distance of a row from its half-precision copy
        self._half_pays = True
        if self.precision != torch.float32:
            self._halves = GrowingRows(dimension, self.precision, self.device)

    @property
    def count(self) -> int:
        return self._rows.count

    def describe(self) -> str:
        return f"exact search ({str(self.precision).removeprefix('torch.')} on {self.device})"

    def extend(self, rows: np.ndarray) -> None:
        if len(rows) == 0:
            return
        added_MD = torch.from_numpy(np.ascontiguousarray(rows)).to(self.device)
        self._rows.extend(added_MD)
        if self._halves is not None:
            halves_MD = added_MD.to(self.precision)
            self._rounding = max(self._rounding, float(_rounding(added_MD, halves_MD).max()))
            self._halves.extend(halves_MD)

    def truncate(self, count: int) -> None:
        self._rows.truncate(count)
        if self._halves is not None:
            self._halves.truncate(count)

    def rows(self, start: int, stop: int) -> np.ndarray:
        return self._rows.filled[start:stop].cpu().numpy().copy()

    @property
    def filled(self) -> torch.Tensor:
        """All rows held, (count, D), a view."""
        return self._rows.filled

    def take(self, positions: np.ndarray) -> np.ndarray:
        """The rows at `positions` (M,), as (M, D) float32."""
        at_M = torch.from_numpy(positions).to(self.device)
        return self._rows.filled.index_select(0, at_M).cpu().numpy()

    @torch.inference_mode()
    def search(self, queries: np.ndarray, visible: np.ndarray, first_row: int = 0) -> Neighbors:
        """As `NeighborIndex.search`; rows before `first_row` are left out."""
        positions = np.full((len(queries), self.k), -1, np.int64)
        products = np.full((len(queries), self.k), -np.inf, np.float64)
        if self.count == 0:  # nothing was kept yet: no neighbors
            return Neighbors(positions, products)
        work = len(queries) * self.count * self.dimension
        with full_float32(), _threads_worth(work):
            for start in range(0, len(queries), QUERY_ROWS):
                part = slice(start, start + QUERY_ROWS)
                queries_ND = torch.from_numpy(np.ascontiguousarray(queries[part])).to(self.device)
                visible_N = torch.from_numpy(np.ascontiguousarray(visible[part])).to(self.device)
                found = self._search_certainly(queries_ND, visible_N, first_row)
                positions[part], products[part] = (tensor.cpu().numpy() for tensor in found)
        return Neighbors(positions, products)

    def _search_certainly(
        self, queries_ND: torch.Tensor, visible_N: torch.Tensor, first_row: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Half precision where it pays, float32 for the rows in doubt, every tie for the rest."""
        positions_NK, products_NK, doubtful = None, None, torch.arange(len(queries_ND))
        doubtful = doubtful.to(self.device)
        for precision in self._precisions(len(queries_ND)):
            asked = queries_ND[doubtful], visible_N[doubtful], first_row
            found = self._nominate(*asked, precision)
            if positions_NK is None or products_NK is None:
                positions_NK, products_NK = found[0], found[1]
            else:
                positions_NK[doubtful], products_NK[doubtful] = found[0], found[1]
            doubtful = doubtful[~found[2]]
            if precision != torch.float32 and len(doubtful) > PATIENCE * len(queries_ND) > 32:
                self._half_pays = False
                log.info("Neighbors lie too close for %s; going on in float32.", precision)
            if len(doubtful) == 0:
                return positions_NK, products_NK
        assert positions_NK is not None and products_NK is not None
        asked = queries_ND[doubtful], visible_N[doubtful], first_row
        found_all = self._search_ties(*asked, products_NK[doubtful])
        positions_NK[doubtful], products_NK[doubtful] = found_all
        return positions_NK, products_NK

    def _precisions(self, queries: int) -> list[torch.dtype]:
        use_half = self._halves is not None and self._half_pays and queries >= HALF_QUERIES
        return [self.precision, torch.float32] if use_half else [torch.float32]

    def _nominate(
        self,
        queries_ND: torch.Tensor,
        visible_N: torch.Tensor,
        first_row: int,
        precision: torch.dtype,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Best K of the candidates that a product in `precision` nominates, and the certificates.

        Returns positions (N, K), products (N, K) float64, certain (N,) bool.
        """
        wanted = self.k + EXTRA_CANDIDATES[precision]
        scores_NC, positions_NC = self._scan(queries_ND.to(precision), visible_N, first_row, wanted)
        worst_N = scores_NC[:, -1].double()  # whatever was not nominated scored no better
        could_be_N = worst_N + self._error_bound(queries_ND, worst_N, precision)
        if precision != torch.float32:
            scores_NC, positions_NC = self._rescore(queries_ND, positions_NC)
        positions_NK, products_NK = self._settle(queries_ND, scores_NC, positions_NC)
        certain_N = (products_NK[:, -1] > could_be_N) | (visible_N - first_row <= wanted)
        return positions_NK, products_NK, certain_N

    def _rescore(
        self, queries_ND: torch.Tensor, positions_NC: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The candidates' scores in float32, and the candidates, both by descending score."""
        scores_NC = torch.empty(positions_NC.shape, device=self.device)
        step = self._rows_at_once(4 * positions_NC.shape[1])
        for start in range(0, len(positions_NC), step):
            at_NC = positions_NC[start : start + step]
            rows_ND = self._rows.filled.index_select(0, at_NC.clamp(min=0).flatten())
            rows_NCD = rows_ND.view(*at_NC.shape, self.dimension)
            torch.bmm(
                rows_NCD, queries_ND[start : start + step, :, None],
                out=scores_NC[start : start + step, :, None],
            )  # fmt: skip
        scores_NC, order_NC = scores_NC.masked_fill_(positions_NC < 0, NOTHING).sort(
            descending=True
        )
        return scores_NC, positions_NC.gather(1, order_NC)

    def _settle(
        self, queries_ND: torch.Tensor, scores_NC: torch.Tensor, positions_NC: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The best K candidates by float64 cosine, given float32 scores in descending order.

        Where the K-th score stands clear of the next one, only K cosines need recomputing.
        """
        k = self.k
        positions_NK, products_NK = self._best_exact(queries_ND, positions_NC[:, :k])
        clear = 2 * self.summation_error
        unsettled = (~(scores_NC[:, k - 1] - scores_NC[:, k] > clear)).nonzero()[:, 0]
        if len(unsettled):
            found = self._best_exact(queries_ND[unsettled], positions_NC[unsettled])
            positions_NK[unsettled], products_NK[unsettled] = found
        return positions_NK, products_NK

    def _best_exact(
        self, queries_ND: torch.Tensor, positions_NC: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Positions (N, K) and float64 cosines of the best K of all candidates given."""
        products_NC = self._exact_products(queries_ND, positions_NC)
        order_NC = best_first(products_NC, positions_NC)[:, : self.k]
        return positions_NC.gather(1, order_NC), products_NC.gather(1, order_NC)

    @property
    def summation_error(self) -> float:
        """How far a float32 dot product of unit rows can be off, summed in any order (Higham)."""
        unit = 2.0**-24
        return self.dimension * unit / (1 - self.dimension * unit) * (1 + 1e-5)

    def _error_bound(
        self, queries_ND: torch.Tensor, scores_N: torch.Tensor, precision: torch.dtype
    ) -> torch.Tensor:
        """How far a true cosine can lie above its score: float32 summation, plus the rounding of
        rows, queries and scores to half precision."""
        bound_N = torch.full_like(scores_N, self.summation_error)
        if precision != torch.float32:
            queries_rounding_N = _rounding(queries_ND, queries_ND.to(precision)).double()
            bound_N += (self._rounding + queries_rounding_N * (1 + self._rounding)) * (1 + 1e-5)
            half_unit = torch.finfo(precision).eps / 2
            bound_N += scores_N.abs() * half_unit / (1 - half_unit)
        return torch.where(scores_N == NOTHING, 0.0, bound_N)

    def _scan(
        self, queries_ND: torch.Tensor, visible_N: torch.Tensor, first_row: int, wanted: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The `wanted` best scores (N, C) and their positions, -1 where fewer rows are visible."""
        scores_NC = torch.full((len(queries_ND), wanted), NOTHING, device=self.device)
        positions_NC = torch.full_like(scores_NC, -1, dtype=torch.int64)
        for first, start, scores_MW in self._blocks(queries_ND, visible_N, first_row):
            take_best(scores_NC[first:], positions_NC[first:], scores_MW, start)
        positions_NC[scores_NC == NOTHING] = -1
        return scores_NC, positions_NC

    def _blocks(
        self, queries_ND: torch.Tensor, visible_N: torch.Tensor, first_row: int
    ) -> Iterator[tuple[int, int, torch.Tensor]]:
        """Scores block by block: (first query, first row, scores (M, W) of the queries from
        `first` on). W is a multiple of GROUP; rows that a query may not see score -inf."""
        precision = queries_ND.dtype
        held = self._rows if precision == torch.float32 else self._halves
        assert held is not None
        rows_PD = held.filled
        all_see, some_see = max(first_row, int(visible_N[0])), int(visible_N[-1])
        width = self._block_width(len(queries_ND), precision)
        steps = [(at, min(at + width, all_see)) for at in range(first_row, all_see, width)]
        width = min(width, TAIL_ROWS)
        steps += [(at, min(at + width, some_see)) for at in range(all_see, some_see, width)]
        widest = max((stop - start for start, stop in steps), default=0)
        scratch = torch.empty(
            len(queries_ND) * whole_groups(widest), dtype=precision, device=self.device
        )
        for start, stop in steps:
            first = int(torch.searchsorted(visible_N, start, right=True)) if start else 0
            seeing, padded = len(queries_ND) - first, whole_groups(stop - start)
            scores_MW = scratch[: seeing * padded].view(seeing, padded)
            scores_MW[:, stop - start :] = NOTHING
            torch.mm(queries_ND[first:], rows_PD[start:stop].T, out=scores_MW[:, : stop - start])
            if stop > all_see:
                at_W = torch.arange(start, start + padded, device=self.device)
                scores_MW.masked_fill_(at_W >= visible_N[first:, None], NOTHING)
            yield first, start, scores_MW

    def _rows_at_once(self, bytes_per_element: int) -> int:
        """Queries whose candidates are recomputed at once: they should stay in a CPU's cache."""
        budget = min(self._memory // 4, 4 << 20 if self.device.type == "cpu" else 1 << 28)
        return max(1, budget // (bytes_per_element * self.dimension))

    def _block_width(self, queries: int, precision: torch.dtype) -> int:
        # Half for the scores; the group maxima and candidates need less than the other half.
        fitting = self._memory // 2 // (max(1, queries) * precision.itemsize)
        return max(GROUP, min(1 << 16, fitting // GROUP * GROUP))

    def _exact_products(self, queries_ND: torch.Tensor, positions_NC: torch.Tensor) -> torch.Tensor:
        """Cosines in float64 of each query with its candidates, -inf where there is none."""
        products_NC = torch.empty(positions_NC.shape, dtype=torch.float64, device=self.device)
        step = self._rows_at_once(8 * positions_NC.shape[1])
        for start in range(0, len(positions_NC), step):
            at_NC = positions_NC[start : start + step]
            rows_ND = self._rows.filled.index_select(0, at_NC.clamp(min=0).flatten()).double()
            rows_ND.view(*at_NC.shape, -1).mul_(queries_ND[start : start + step, None])
            products_NC[start : start + step] = fold_sum(rows_ND).view(at_NC.shape)
        return products_NC.masked_fill_(positions_NC < 0, NOTHING)

    def pair_products(
        self, queries_ND: torch.Tensor, query_P: torch.Tensor, position_P: torch.Tensor
    ) -> torch.Tensor:
        """Cosines in float64 of pairs of a query and a row, given by their numbers (P,)."""
        products_P = torch.empty(len(query_P), dtype=torch.float64, device=self.device)
        step = self._rows_at_once(8)
        for start in range(0, len(query_P), step):
            part = slice(start, start + step)
            rows_PD = self._rows.filled[position_P[part]].double()
            products_P[part] = fold_sum(rows_PD.mul_(queries_ND[query_P[part]]))
        return products_P

    def _search_ties(
        self,
        queries_ND: torch.Tensor,
        visible_N: torch.Tensor,
        first_row: int,
        products_NK: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Search among dense near-copies: every row that could reach a query's K-th best so far
        (`products_NK`, a lower bound) is recomputed in float64."""
        best_NK = torch.full_like(products_NK, NOTHING)
        positions_NK = torch.full_like(best_NK, -1, dtype=torch.int64)
        floor_N = products_NK[:, -1]
        reach_N = floor_N - self._error_bound(queries_ND, floor_N, torch.float32)
        for first, start, scores_MW in self._blocks(queries_ND, visible_N, first_row):
            hits = (scores_MW.double() >= reach_N[first:, None]).nonzero()
            if len(hits) == 0:
                continue
            query, position = hits[:, 0] + first, hits[:, 1] + start
            product = self.pair_products(queries_ND, query, position)
            keep_best_ties(best_NK, positions_NK, query, position, product)
        return positions_NK, best_NK


def _rounding(rows_ND: torch.Tensor, halves_ND: torch.Tensor) -> torch.Tensor:
    """Length of what rounding took from each row (N,)."""
    return torch.linalg.vector_norm(rows_ND - halves_ND.float(), dim=1) * (1 + 1e-5)


def _fast_precision(device: torch.device) -> torch.dtype:
    if device.type == "cuda":
        return torch.float16
    supported = getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    return torch.bfloat16 if device.type == "cpu" and supported() else torch.float32


@contextmanager
def full_float32() -> Iterator[None]:
    """Float32 products in real float32: training may have allowed TF32 or bfloat16 for them."""
    allowed = torch.get_float32_matmul_precision()
    reduced = torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction
    torch.set_float32_matmul_precision("highest")
    torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False
    try:
        with torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False):
            yield
    finally:
        torch.set_float32_matmul_precision(allowed)
        torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = reduced


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
