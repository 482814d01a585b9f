"""Cells of similar rows, so that a query need only be multiplied with the rows of the nearest ones.

A row lies in two cells: in that of its nearest center, and in the one whose center is near in a
direction in which the first is not. A query from whose view the first cell lies badly then meets
the row in the second (the idea of SOAR, Sun et al., NeurIPS 2023; it saves four fifths of the rows
read on real embeddings).

Everything that decides which rows a query meets is the same on every device, at any batch size and
number of ranks: centers are sums in integers, and where float32 leaves open which of two cells it
is, float64 decides. So the answer depends on the rows alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

from infogrowth.neighbors.candidates import SMALL_GROUP, pair_products, ranks
from infogrowth.neighbors.fast import summation_error
from infogrowth.neighbors.rows import fold_sum
from infogrowth.neighbors.store import RowStore

CELLS_PER_ROOT = 3  # cells per square root of the rows: what is read balances what is compared
SAMPLE_PER_CELL = 16  # rows from which a center is learned
ROUNDS = 3  # of k-means: more of either make no difference to the gain error
FIXED_POINT = 2.0**32  # of the integers that centers are summed in: exact for 2³¹ unit rows
NEAREST_FIRST = 2  # cells that are read before the others, whose rows then have a score to beat
PORTION = 4096  # rows compared with the centers at once
LEAST_SQUARE = 0.1  # of the distance from the first center, where directions mean something
NO_ROW = torch.iinfo(torch.int64).max


def cell_count(rows: int) -> int:
    """How many cells so many rows get."""
    return max(1, round(CELLS_PER_ROOT * rows**0.5))


def learn_centers(sample_SD: torch.Tensor, count: int, random: np.random.Generator) -> torch.Tensor:
    """Spherical k-means: `count` unit centers (J, D) float32 of float32 unit rows."""
    first = np.sort(random.choice(len(sample_SD), count, replace=False))
    centers_JD = sample_SD[torch.from_numpy(first).to(sample_SD.device)]
    fixed_SD = (sample_SD.double() * FIXED_POINT).round().long()
    for _ in range(ROUNDS):
        cell_S = nearest_centers(sample_SD, centers_JD, 1)[:, 0]
        sums_JD = torch.zeros(centers_JD.shape, dtype=torch.int64, device=sample_SD.device)
        sums_JD = sums_JD.index_add_(0, cell_S, fixed_SD).double() / FIXED_POINT
        length_J = fold_sum(sums_JD.square()).sqrt()
        moved = length_J > 1e-9  # an empty cell stays where it is
        centers_JD[moved] = (sums_JD[moved] / length_J[moved, None]).float()
    return centers_JD


def nearest_centers(rows_ND: torch.Tensor, centers_JD: torch.Tensor, count: int) -> torch.Tensor:
    """The nearest `count` cells of each row (N, count), roughly in order; of equally near ones the
    first. The set is that of float64 products."""
    found = [_nearest_centers(part, centers_JD, count) for part in rows_ND.split(PORTION)]
    return torch.cat(found)


def _nearest_centers(rows_ND: torch.Tensor, centers_JD: torch.Tensor, count: int) -> torch.Tensor:
    scores_NJ = rows_ND @ centers_JD.T
    best_NT, near_NT = scores_NJ.topk(min(count + 1, len(centers_JD)))
    if count >= len(centers_JD):
        return near_NT
    clear = 2 * summation_error(rows_ND.shape[1])
    reach_N = best_NT[:, count - 1] - clear
    unclear = (best_NT[:, count] >= reach_N).nonzero()[:, 0]
    if len(unclear):
        row, cell = (scores_NJ[unclear] >= reach_N[unclear, None]).nonzero().unbind(1)
        products = pair_products(rows_ND, unclear[row], centers_JD.__getitem__, cell)
        order, rank = ranks(row, products, len(unclear))
        order, rank = order[rank < count], rank[rank < count]
        near_NT[unclear[row[order]], rank] = cell[order]
    return near_NT[:, :count]


def two_cells(rows_MD: torch.Tensor, centers_JD: torch.Tensor) -> torch.Tensor:
    """The two cells (M, 2) of each row."""
    return torch.cat([_two_cells(part, centers_JD) for part in rows_MD.split(PORTION)])


def _two_cells(rows_MD: torch.Tensor, centers_JD: torch.Tensor) -> torch.Tensor:
    """With r and s the vectors from the two centers to the row, the second minimises
    |s|² + (r·s)² / |r|², and r·s = 1 − x·c − x·d + c·d for unit x, c and d."""
    first_M = nearest_centers(rows_MD, centers_JD, 1)[:, 0]
    if len(centers_JD) == 1:
        return first_M[:, None].expand(-1, 2)
    scores_MJ = rows_MD @ centers_JD.T
    score_M = scores_MJ.gather(1, first_M[:, None])
    loss_MJ = _loss(scores_MJ, score_M, centers_JD[first_M] @ centers_JD.T)
    loss_MJ.scatter_(1, first_M[:, None], torch.inf)
    best_M2, second_M2 = loss_MJ.topk(min(2, len(centers_JD)), largest=False)
    # How far a loss is off, given that its three products are off by `error` each.
    steep_M = ((best_M2[:, 0] + 0.1) / (2 - 2 * score_M[:, 0]).clamp(min=LEAST_SQUARE)).sqrt()
    error = summation_error(rows_MD.shape[1])
    reach_M = best_M2[:, 0] + 4 * error * (2 + 6 * steep_M + 2 * steep_M.square())
    unclear = (best_M2[:, -1] <= reach_M).nonzero()[:, 0]
    if len(unclear):
        at, cell = (loss_MJ[unclear] <= reach_M[unclear, None]).nonzero().unbind(1)
        row, first = unclear[at], first_M[unclear[at]]
        read = centers_JD.__getitem__
        loss = _loss(
            pair_products(rows_MD, row, read, cell),
            pair_products(rows_MD, row, read, first),
            pair_products(centers_JD, first, read, cell),
        )
        order, rank = ranks(at, -loss, len(unclear))
        second_M2[unclear, 0] = cell[order[rank == 0]]
    return torch.stack([first_M, second_M2[:, 0]], 1)


def _loss(second: torch.Tensor, first: torch.Tensor, between: torch.Tensor) -> torch.Tensor:
    """Of a second cell, given the products row · second, row · first and first · second center."""
    across = 1 - first - second + between
    return 2 - 2 * second + across.square() / (2 - 2 * first).clamp(min=LEAST_SQUARE)


@dataclass(frozen=True)
class Tile:
    """Queries (B, Q) to be multiplied with rows (B, W), by their numbers: N where there is no
    query, NO_ROW where there is no row."""

    query_BQ: torch.Tensor
    position_BW: torch.Tensor


class Cells:
    """Centers, and the two cells of every row of this rank, in order of the rows."""

    def __init__(self, centers_JD: torch.Tensor) -> None:
        self.centers_JD = centers_JD
        self.read = 1  # how many cells a query reads
        self._of_row_M2 = torch.empty((0, 2), dtype=torch.int32, device=centers_JD.device)
        self._rows: _Grouped | None = None

    @property
    def count(self) -> int:
        """How many rows have a cell."""
        return len(self._of_row_M2)

    def extend(self, rows: RowStore) -> None:
        """Put those of `rows` that have no cells yet into theirs."""
        if rows.count == self.count:
            return
        cells = [self._of_row_M2]
        for _, piece_MD in rows.pieces(self.count, rows.count):
            cells.append(two_cells(piece_MD, self.centers_JD).int())
        self._of_row_M2 = torch.cat(cells)
        self._rows = None

    def truncate(self, count: int) -> None:
        """Forget all rows from `count` on."""
        if count < self.count:
            self._of_row_M2 = self._of_row_M2[:count]
            self._rows = None

    def rounds(
        self, queries_ND: torch.Tensor, tile: tuple[int, int], together: int
    ) -> Iterator[Iterator[Tile]]:
        """What to multiply: the nearest cells first, then the others that are read.

        A tile's entries have at most `tile` queries and rows of one cell each, and are `together`.
        """
        near_NT = nearest_centers(queries_ND, self.centers_JD, min(self.read, len(self.centers_JD)))
        if self._rows is None:
            self._rows = _Grouped(self._of_row_M2, len(self.centers_JD))
        for columns_NT in (near_NT[:, :NEAREST_FIRST], near_NT[:, NEAREST_FIRST:]):
            if columns_NT.shape[1]:
                queries = _Grouped(columns_NT, len(self.centers_JD))
                yield _tiles(queries, self._rows, tile, together)


class _Grouped:
    """Lines of cell numbers (M, C), grouped by cell: `lines` of which each holds a number of
    `sizes` from `starts` on."""

    def __init__(self, cells_MC: torch.Tensor, cells: int) -> None:
        flat = cells_MC.flatten()
        self.lines = flat.argsort(stable=True) // cells_MC.shape[1]
        sizes = torch.bincount(flat, minlength=cells)
        self.starts = (sizes.cumsum(0) - sizes).cpu().numpy()
        self.sizes = sizes.cpu().numpy()
        self.count = len(cells_MC)

    def numbers(self, starts: np.ndarray, sizes: np.ndarray, none: int, step: int) -> torch.Tensor:
        """B runs of `lines` (B, W), `none` behind the end of each; W is a multiple of `step`."""
        width = -(-int(sizes.max()) // step) * step
        if len(starts) == 1:  # one cell: a CPU takes them one by one
            numbers = self.lines.new_full((1, width), none)
            numbers[0, : sizes[0]] = self.lines[starts[0] : starts[0] + sizes[0]]
            return numbers
        at_BW = torch.from_numpy(starts[:, None] + np.arange(width)).to(self.lines.device)
        there_BW = torch.from_numpy(np.arange(width) < sizes[:, None]).to(self.lines.device)
        numbers = self.lines[at_BW.clamp_(max=len(self.lines) - 1)]
        return numbers.masked_fill_(~there_BW, none)


def _tiles(
    queries: _Grouped, rows: _Grouped, tile: tuple[int, int], together: int
) -> Iterator[Tile]:
    wanted = np.flatnonzero((queries.sizes > 0) & (rows.sizes > 0))
    query_parts, row_parts = -(-queries.sizes[wanted] // tile[0]), -(-rows.sizes[wanted] // tile[1])
    parts = query_parts * row_parts
    cell, row_parts = np.repeat(wanted, parts), np.repeat(row_parts, parts)
    number = np.arange(len(cell)) - np.repeat(np.cumsum(parts) - parts, parts)
    query_at, row_at = number // row_parts * tile[0], number % row_parts * tile[1]
    query_size = np.minimum(queries.sizes[cell] - query_at, tile[0])
    row_size = np.minimum(rows.sizes[cell] - row_at, tile[1])
    query_at, row_at = query_at + queries.starts[cell], row_at + rows.starts[cell]
    for at in range(0, len(cell), together):
        some = slice(at, at + together)
        query_BQ = queries.numbers(query_at[some], query_size[some], queries.count, 1)
        position_BW = rows.numbers(row_at[some], row_size[some], NO_ROW, SMALL_GROUP)
        yield Tile(query_BQ, position_BW)
