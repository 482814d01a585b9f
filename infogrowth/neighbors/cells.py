"""What lets exact search on a CPU skip most rows: cells of similar rows, and bounds on cosines.

Rows are grouped into cells. A row x of a cell with center c is x = c + e, and a query q splits
into its share in the M leading principal directions and the rest, so

    q·x = q·c + q·e  ≤  q·c + q₁·e₁ + |q₂| |e₂|      (Cauchy–Schwarz on the rest)

The right side is a product of M + 1 columns, once q·c is known for the cell. A query needs the
full product only in cells where this bound reaches its k-th best cosine so far. Few columns rule
out most cells, some more columns most of the others; and where q₁·e₁ ≤ |q₁| max|e₁| suffices, a
cell is ruled out without touching its rows. Every step errs upwards by more than float32 rounds,
so no row is skipped that could be among the nearest (the margins are several times what rounding
takes).

Rows are visited in blocks: a cell is one block, or several if it is large.

Shapes: N queries, W rows of a block, D dimension, J cells, M leading directions.
"""

from __future__ import annotations

from dataclasses import dataclass

import faiss
import numpy as np
import torch

from infogrowth.neighbors.base import GrowingRows

ROWS_PER_CELL = 192
MOST_CELLS = 1024  # visiting more costs more than smaller cells save
SAMPLE_PER_CELL = 24  # rows from which each center is learned
SAMPLE_ROWS = 16384  # rows from which the principal directions are learned
LEADING_SHARES = (1 / 12, 1 / 4)  # of the columns: what the two bounds look at
BLOCK_ROWS = 512  # of a block, at most
LANES = 8  # products with a multiple of so many rows are almost twice as fast
CACHED_PRODUCTS = 1 << 18  # that stay in a core's cache
PORTION = 65536  # rows handled at once while learning
MOSTLY = 0.7  # share of queries from which on picking them out costs more than it saves
SEED = 0


@dataclass(frozen=True)
class SplitQueries:
    """Queries as the bounds want them: (N, M + 1) per stage, the last column |q₂|."""

    stages_NM: tuple[torch.Tensor, ...]
    leading_N: torch.Tensor  # |q₁| of the first stage
    rest_N: torch.Tensor  # |q₂| of the first stage


class Blocks:
    """Which rows each block holds, given the cell (count,) of every row.

    In memory the last row of a block is repeated up to a multiple of LANES.
    """

    def __init__(self, cell_of_row: np.ndarray, cell_count: int) -> None:
        by_cell = np.argsort(cell_of_row, kind="stable")
        held = np.bincount(cell_of_row, minlength=cell_count)
        blocks = -(-held // BLOCK_ROWS)
        self._cell = np.repeat(np.arange(cell_count), blocks)
        self.first_of_cell = np.cumsum(blocks) - blocks
        place_in_cell = np.arange(len(self._cell)) - self.first_of_cell[self._cell]
        start = (np.cumsum(held) - held)[self._cell] + place_in_cell * BLOCK_ROWS
        self._sizes = np.minimum(held[self._cell] - place_in_cell * BLOCK_ROWS, BLOCK_ROWS)
        padded = -(-self._sizes // LANES) * LANES
        self._ends = np.concatenate([[0], np.cumsum(padded)])
        place = np.arange(self._ends[-1]) - np.repeat(self._ends[:-1], padded)
        place = np.minimum(place, np.repeat(self._sizes - 1, padded))
        self._positions = torch.from_numpy(by_cell[np.repeat(start, padded) + place])

    def __len__(self) -> int:
        return len(self._cell)

    def cell(self, block: int) -> int:
        return int(self._cell[block])

    def holds(self, cell: int) -> bool:
        """Whether a cell has any rows."""
        first = self.first_of_cell[cell]
        return bool(first < len(self) and self._cell[first] == cell)

    def size(self, block: int) -> int:
        """How many rows it holds."""
        return int(self._sizes[block])

    def padded(self, block: int) -> torch.Tensor:
        """Which rows it holds, ascending, and the last one again (W,)."""
        return self._positions[self._ends[block] : self._ends[block + 1]]


class Cells:
    """The cells of a growing set of rows: which rows each holds, and what its bounds need.

    The directions and centers are learned from `rows_ND` (float32 unit rows), which are then held;
    those that `extend` adds go to the cells there are.
    """

    def __init__(self, rows_ND: torch.Tensor) -> None:
        count, dimension = rows_ND.shape
        random = np.random.default_rng(SEED)
        widths = sorted({max(8, round(dimension * share / 8) * 8) for share in LEADING_SHARES})
        self.widths = [width for width in widths if width < dimension] or [dimension]
        sample = _sample(rows_ND, SAMPLE_ROWS, random)
        self._basis_DM = _principal_directions(sample, self.widths[-1])
        self.cell_count = min(max(1, count // ROWS_PER_CELL), MOST_CELLS)
        sample = _sample(rows_ND, self.cell_count * SAMPLE_PER_CELL, random) @ self._basis_DM
        self._learned_JM = _learn_centers(sample, self.cell_count)
        # (x−c)·q is rounded in several sums of at most D terms; squares of norms likewise.
        self._slack = 4 * dimension * 2.0**-24
        self._tables = [GrowingRows(width + 1, torch.float32, "cpu") for width in self.widths]
        self._leading_radius_J = torch.zeros(self.cell_count, dtype=torch.float32)
        self._rest_radius_J = torch.zeros(self.cell_count, dtype=torch.float32)
        self._cell_of_row = np.empty(0, np.int32)
        self._blocks: Blocks | None = None
        cell_N = torch.cat([self._place(part)[1] for part in rows_ND.split(PORTION)])
        self.centers_JD = _means(rows_ND, cell_N, self.cell_count)
        self.half_squares_J = self.centers_JD.square().sum(1) / 2
        self._leading_centers_JM = self.centers_JD @ self._basis_DM
        for part_ND, part_N in zip(rows_ND.split(PORTION), cell_N.split(PORTION), strict=True):
            self._append(part_ND, part_ND @ self._basis_DM, part_N)

    @property
    def count(self) -> int:
        return self._tables[0].count

    def extend(self, rows_MD: torch.Tensor) -> None:
        """Add (M, D) float32 unit rows, which follow those held already."""
        self._append(rows_MD, *self._place(rows_MD))

    def _append(self, rows_MD: torch.Tensor, leading: torch.Tensor, cell: torch.Tensor) -> None:
        """Add rows that lie in `cell` (M,), given their shares in the leading directions."""
        whole_M = (rows_MD - self.centers_JD[cell]).square_().sum(1)
        leading = leading - self._leading_centers_JM[cell]
        for number, (width, table) in enumerate(zip(self.widths, self._tables, strict=True)):
            part = leading[:, :width]
            inside_M = part.square().sum(1)
            rest_M = (whole_M - inside_M).clamp_(min=0).add_(self._slack).sqrt_()
            table.extend(torch.cat([part, rest_M[:, None]], 1))
            if number == 0:
                inside_M = inside_M.add_(self._slack).sqrt_()
                self._leading_radius_J.scatter_reduce_(0, cell, inside_M, "amax")
                self._rest_radius_J.scatter_reduce_(0, cell, rest_M, "amax")
        self._cell_of_row = np.concatenate([self._cell_of_row, cell.numpy().astype(np.int32)])
        self._blocks = None

    def truncate(self, count: int) -> None:
        """Forget all rows from `count` on (radii stay as they are: too large is never wrong)."""
        for table in self._tables:
            table.truncate(count)
        self._cell_of_row = self._cell_of_row[:count]
        self._blocks = None

    def blocks(self) -> Blocks:
        """All rows, block by block."""
        if self._blocks is None:
            self._blocks = Blocks(self._cell_of_row, self.cell_count)
        return self._blocks

    def split(self, queries_ND: torch.Tensor) -> SplitQueries:
        """Prepare unit queries for the bounds."""
        leading = queries_ND @ self._basis_DM
        stages, norms = [], []
        for width in self.widths:
            part = leading[:, :width]
            inside_N = part.square().sum(1)
            rest_N = (1 - inside_N).clamp_(min=0).add_(self._slack).sqrt_()
            stages.append(torch.cat([part, rest_N[:, None]], 1))
            norms.append((inside_N.add_(self._slack).sqrt_(), rest_N))
        return SplitQueries(tuple(stages), *norms[0])

    def within_reach(
        self,
        block: int,
        queries: SplitQueries,
        center_products_JN: torch.Tensor,
        reach_N: torch.Tensor,
        scratch: torch.Tensor,
    ) -> torch.Tensor:
        """Which queries (indices) could have a row of this block at a cosine of `reach` or more.

        `center_products_JN` are the queries' products with `centers_JD`; `scratch` has room for
        CACHED_PRODUCTS. A whole cell is judged by its radii first, then by the rows' bounds, stage
        by stage.
        """
        cell = self.blocks().cell(block)
        needed_N = reach_N - center_products_JN[cell]
        needed_N -= self._slack
        ball_N = queries.leading_N * float(self._leading_radius_J[cell])
        ball_N.add_(queries.rest_N, alpha=float(self._rest_radius_J[cell]))
        alive = (ball_N >= needed_N).nonzero()[:, 0]
        positions_W = self.blocks().padded(block)
        for stage_NM, table in zip(queries.stages_NM, self._tables, strict=True):
            if len(alive) == 0:
                break
            rows_WM = table.filled.index_select(0, positions_W)
            if len(alive) > MOSTLY * len(needed_N):
                alive = (_largest_products(stage_NM, rows_WM, scratch) >= needed_N).nonzero()[:, 0]
            else:
                bounds_N = _largest_products(stage_NM.index_select(0, alive), rows_WM, scratch)
                alive = alive[bounds_N >= needed_N.index_select(0, alive)]
        return alive

    def _place(self, rows_ND: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The rows' shares in the leading directions, and the cells (N,) nearest in these."""
        leading = rows_ND @ self._basis_DM
        half_squares_J = self._learned_JM.square().sum(1) / 2
        cell = [
            torch.addmm(half_squares_J, part, self._learned_JM.T, beta=-1).argmax(1)
            for part in leading.split(8192)
        ]
        return leading, torch.cat(cell)


def _largest_products(
    queries_NM: torch.Tensor, rows_WM: torch.Tensor, scratch: torch.Tensor
) -> torch.Tensor:
    """The largest product of each query with any of the rows (N,); so many queries at a time that
    the products stay in a core's cache."""
    largest_N = torch.empty(len(queries_NM), dtype=torch.float32)
    step = max(1, CACHED_PRODUCTS // len(rows_WM))
    for start in range(0, len(queries_NM), step):
        part_NM = queries_NM[start : start + step]
        products_NW = scratch[: len(part_NM) * len(rows_WM)].view(len(part_NM), len(rows_WM))
        torch.mm(part_NM, rows_WM.T, out=products_NW)
        torch.amax(products_NW, 1, out=largest_N[start : start + step])
    return largest_N


def _means(rows_ND: torch.Tensor, cell: torch.Tensor, cells: int) -> torch.Tensor:
    """The mean of the rows of each cell (J, D)."""
    sums_JD = torch.zeros(cells, rows_ND.shape[1], dtype=torch.float32).index_add_(0, cell, rows_ND)
    return sums_JD / torch.bincount(cell, minlength=cells).clamp(min=1)[:, None]


def _sample(rows_ND: torch.Tensor, count: int, random: np.random.Generator) -> torch.Tensor:
    if count >= len(rows_ND):
        return rows_ND
    chosen = np.sort(random.choice(len(rows_ND), count, replace=False))
    return rows_ND[torch.from_numpy(chosen)]


def _principal_directions(rows_ND: torch.Tensor, count: int) -> torch.Tensor:
    """The directions in which the rows extend most, (D, count), orthonormal."""
    moments_DD = rows_ND.double().T @ rows_ND.double()
    return torch.linalg.eigh(moments_DD).eigenvectors.flip(1)[:, :count].float().contiguous()


def _learn_centers(sample_NM: torch.Tensor, cells: int) -> torch.Tensor:
    kmeans = faiss.Kmeans(
        sample_NM.shape[1], cells, niter=4, seed=SEED + 1,
        min_points_per_centroid=1, max_points_per_centroid=len(sample_NM),
    )  # fmt: skip
    kmeans.train(sample_NM.numpy())
    return torch.from_numpy(kmeans.centroids)
