"""Cells of similar rows, so that a query need only be multiplied with the rows of the nearest ones.

A row lies in two cells: in that of its nearest center, and in the one whose center is near in a
direction in which the first is not. A query from whose view the first cell lies badly then meets
the row in the second (the idea of SOAR, Sun et al., NeurIPS 2023; it saves four fifths of the rows
read on real embeddings).

Rows and centers are codes, and sums and products of integers are exact. So which cells a row lies
in and which a query reads is the same on every device, at any batch size and number of ranks.
"""

from __future__ import annotations

from math import log
from typing import Any

import numpy as np
import torch

from infogrowth.neighbors.codes import best_of, multiply
from infogrowth.rows import fold_sum

CELLS_PER_ROOT = 5  # cells per square root of the rows: what is read balances what is compared
SAMPLE_PER_CELL = 16  # rows from which a center is learned
ROUNDS = 3  # of k-means: more of either make no difference to the gain error
SECOND_AMONG = 12  # nearest cells, one of which becomes a row's second
LEAST_SQUARE = 0.1  # of the distance from the first center, where directions mean something
NEARLY = 1 / 8  # of a cosine: how much less near a cell may be to be read
WIDTH = 16  # of which cells' widths are multiples, so that many are alike
PORTION = 1024  # rows compared with the centers at once
TOGETHER = 1 << 16  # rows that get their cells at once

Tensors = tuple[torch.Tensor, ...]


def cell_count(rows: int) -> int:
    """How many cells so many rows get."""
    return min(rows, round(CELLS_PER_ROOT * rows**0.5))


def learn_centers(
    codes_SD: torch.Tensor, count: int, unit: float, random: np.random.Generator,
    threads: Any = map,
) -> torch.Tensor:  # fmt: skip
    """Spherical k-means: `count` centers (J, D) int8 of codes."""
    first = np.sort(random.choice(len(codes_SD), count, replace=False))
    centers_JD = codes_SD[torch.from_numpy(first).to(codes_SD.device)]
    for _ in range(ROUNDS):
        cell_S = nearest(codes_SD, centers_JD, 1, threads)[0][:, 0]
        sums_JD = torch.zeros(centers_JD.shape, dtype=torch.int32, device=codes_SD.device)
        sums_JD = sums_JD.index_add_(0, cell_S, codes_SD.int()).double()
        length_J = fold_sum(sums_JD.square()).sqrt()
        moved = length_J > 0  # an empty cell stays where it is
        centers = (sums_JD[moved] * (unit**0.5 / length_J[moved, None])).round().clamp(-127, 127)
        centers_JD[moved] = centers.to(torch.int8)
    return centers_JD


def nearest(
    codes_ND: torch.Tensor, centers_JD: torch.Tensor, count: int, threads: Any = map
) -> tuple[torch.Tensor, torch.Tensor]:
    """The nearest `count` cells of each row (N, count), of equally near ones the first, and the
    products with their centers; nearest first."""
    cells = len(centers_JD)
    small = cells * centers_JD.shape[1] * 600 < 2**31
    dtype = torch.int32 if small else torch.int64
    last_first_J = torch.arange(cells - 1, -1, -1, device=codes_ND.device, dtype=dtype)
    shape = len(codes_ND), min(count, cells)
    # Into one tensor: small ones kept between large ones that go would scatter the memory.
    keys = torch.empty(shape, dtype=dtype, device=codes_ND.device)

    def enter(at: int) -> None:
        part = slice(at, at + PORTION)
        products = multiply(codes_ND[part], centers_JD).to(dtype)
        keys[part] = best_of(products.mul_(cells).add_(last_first_J), shape[1]).flip(1)

    list(threads(enter, list(range(0, len(codes_ND), PORTION))))
    products = keys.div(cells, rounding_mode="floor")
    return cells - 1 - (keys - products * cells), products


class Layout:
    """Rows by cell, in ascending order within each; a cell's part is filled up with `rows`.

    Cell j has `numbers` (int32) from `starts[j]` on, `widths[j]` of them, in groups of `members`:
    of L groups the l-th are those at l, l + L, l + 2 L …, for maxima of such are the cheapest.

    Args:
        cells_MC: the C cells of each row; rows with cell number `count` lie in none.
        count: how many cells there are.
        members: of a group; widths are multiples of it and of `WIDTH`.
    """

    def __init__(self, cells_MC: torch.Tensor, count: int, members: int = 1) -> None:
        (self.rows, copies), self.members = cells_MC.shape, members
        flat, step = cells_MC.flatten(), max(members, WIDTH)
        order = flat.argsort(stable=True)
        sizes = torch.bincount(flat, minlength=count + 1)[:count].cpu()
        widths = sizes.add(step - 1).div(step, rounding_mode="floor").mul(step)
        starts = widths.cumsum(0) - widths
        moved = (starts - (sizes.cumsum(0) - sizes)).repeat_interleave(sizes).to(flat.device)
        shape = int(widths.sum())
        self.numbers = torch.full((shape,), self.rows, dtype=torch.int32, device=flat.device)
        at = torch.arange(len(moved), device=flat.device) + moved
        self.numbers[at] = (order[: len(moved)] // copies).int()
        self.starts, self.widths = starts.numpy(), widths.numpy()

    def take(self, cells_B: np.ndarray) -> torch.Tensor:
        """The numbers (B, W) of cells of one width."""
        at = self.starts[cells_B, None] + np.arange(self.widths[cells_B[0]])
        return self.numbers[torch.from_numpy(at).to(self.numbers.device)]


class Cells:
    """Centers, and the two cells of every row of this rank, in order of the rows."""

    def __init__(self, centers_JD: torch.Tensor, unit: float) -> None:
        self.centers_JD, self._unit = centers_JD, unit
        self.read = 1  # how many cells a query reads
        self._between_JJ = multiply(centers_JD, centers_JD)
        self._of_row_M2 = torch.empty((0, 2), dtype=torch.int32, device=centers_JD.device)
        self._layout: Layout | None = None

    def __len__(self) -> int:
        return len(self.centers_JD)

    def nearest(self, codes_ND: torch.Tensor, threads: Any = map) -> Tensors:
        """The cells (N, T) nearest to each row, as many as a row or a query may need, and the
        products with their centers."""
        return nearest(codes_ND, self.centers_JD, max(self.read, SECOND_AMONG), threads)

    def extend(
        self, codes_MD: torch.Tensor, surplus_M: torch.Tensor, known: Tensors, threads: Any
    ) -> None:
        """Put those rows that have no cells yet into theirs, surplus ones into none. Of the last
        ones it is `known` which cells are nearest."""
        begun, rows = len(self._of_row_M2), len(codes_MD)
        if begun == rows:
            return
        first = max(begun, rows - len(known[0]))
        found = [self._of_row_M2]
        for at in range(begun, first, TOGETHER):
            part = codes_MD[at : min(at + TOGETHER, first)]
            found.append(self.pairs(*self.nearest(part, threads)))
        found.append(self.pairs(*(of_row[len(of_row) - (rows - first) :] for of_row in known)))
        self._of_row_M2, self._layout = torch.cat(found), None
        self._of_row_M2[begun:].masked_fill_(surplus_M[begun:, None], len(self))

    def truncate(self, count: int) -> None:
        """Forget all rows from `count` on."""
        if count < len(self._of_row_M2):
            self._of_row_M2, self._layout = self._of_row_M2[:count], None

    def passes(self, near: Tensors) -> list[Tensors]:
        """Which cells (S,) queries (S,) read, by those `near` them: each its nearest, then of the
        others that of rank r < T if its center is nearly as near, by at most `NEARLY` ·
        log(2 T / (r + 1)); or all."""
        cells_NT, products_NT = (of_query[:, : self.read] for of_query in near)
        number_T = range(1, cells_NT.shape[1] + 1)
        within = [int(self._unit * NEARLY * log(2 * self.read / number)) for number in number_T]
        if self.read >= len(self):
            within = [int(3 * self._unit)] * len(within)
        within_T = torch.tensor(within, dtype=products_NT.dtype, device=cells_NT.device)
        reads_NT = products_NT >= products_NT[:, :1] - within_T
        query_S, rank_S = reads_NT[:, 1:].nonzero().unbind(1)
        all_N = torch.arange(len(cells_NT), device=cells_NT.device)
        return [(cells_NT[:, 0], all_N), (cells_NT[query_S, rank_S + 1], query_S)]

    @property
    def layout(self) -> Layout:
        """The rows by cell."""
        if self._layout is None:
            self._layout = Layout(self._of_row_M2, len(self))
        return self._layout

    def pairs(self, cells_MT: torch.Tensor, products_MT: torch.Tensor) -> torch.Tensor:
        """The two cells (M, 2) int32 of rows, given the nearest ones and the products with these:
        with r and s the vectors from the centers c and d to the row x, the second minimises
        |s|² + (r·s)² / |r|², and r·s = 1 − x·c − x·d + c·d."""
        cells_MT, products_MT = cells_MT[:, :SECOND_AMONG], products_MT[:, :SECOND_AMONG]
        first_M = cells_MT[:, :1]
        if cells_MT.shape[1] == 1:
            return first_M.repeat(1, 2).int()
        near_MT = products_MT.double() / self._unit
        between_MT = self._between_JJ[first_M, cells_MT[:, 1:]].double() / self._unit
        first, second = near_MT[:, :1], near_MT[:, 1:]
        across = 1 - first - second + between_MT
        loss_MT = 2 - 2 * second + across.square() / (2 - 2 * first).clamp(min=LEAST_SQUARE)
        least = (loss_MT == loss_MT.amin(1, keepdim=True)).byte()  # of equal ones the nearest
        best = (least.cumsum(1) == 0).sum(1, keepdim=True)
        return torch.cat([first_M, cells_MT[:, 1:].gather(1, best)], 1).int()
