"""Approximate search for CPU runs with millions of samples: faiss lists plus an exact tail.

The first rows lie in faiss inverted lists (only the lists nearest to a query are read), the most
recent ones in an exact tail. Which rows lie where depends only on how many rows a query may see,
never on batches: rows move over in whole segments, and the lists are trained anew when the index
has grown fourfold. So a run that is cut anywhere, or restored, gives the same answers, and a batch
still sees all earlier samples of its own.
"""

from __future__ import annotations

import logging

import faiss
import numpy as np
import torch

from infogrowth.neighbors.base import Neighbors, merge_neighbors
from infogrowth.neighbors.exact import full_float32
from infogrowth.neighbors.pruned import PrunedIndex
from infogrowth.neighbors.rows import row_products
from infogrowth.randomness import generator

log = logging.getLogger(__name__)

SEGMENT_ROWS = 16384  # rows move from the tail to the lists in portions of this many
GROWTH_FACTOR = 4  # the lists are trained anew when the index has grown by this factor
ROWS_PER_LIST_TO_TRAIN = 40
EXTRA_CANDIDATES = 4
PROBE_ROWS = 1024  # rows on which the gain error is measured
PROBES = (4, 8, 16, 32, 64)  # lists read per lookup, the first number that reaches
TOLERABLE_ERROR = 2e-3  # this mean gain error (that of the paper's loop is twice as large)


class ApproximateIndex:
    """Nearest rows by cosine among most rows (faiss IVF) and all of the recent ones.

    Exact until it holds `first_training` rows. Distances of what is found are recomputed in
    float64, so an error can only be a neighbor that was missed. After each training the gain error
    is measured on a random probe of the rows, and logged (`gain_error`: mean, 99th percentile,
    maximum); it decides how many lists are read per query, unless `probes` does.
    """

    def __init__(
        self,
        dimension: int,
        k: int,
        memory_mb: float = 256,
        first_training: int = 65536,
        probes: int | None = None,
    ) -> None:
        self.dimension = dimension
        self.k = k
        self.gain_error: tuple[float, float, float] | None = None
        self._exact = PrunedIndex(dimension, k, memory_mb)
        self._all = self._exact.dense
        self._first_training = -(-first_training // SEGMENT_ROWS) * SEGMENT_ROWS
        self._choices = PROBES if probes is None else (probes,)
        self._lists: faiss.IndexIVFFlat | None = None
        self._trained_at = 0

    @property
    def count(self) -> int:
        return self._all.count

    def describe(self) -> str:
        if self._lists is None:
            return f"exact search below {self._first_training} rows, then approximate (faiss IVF)"
        read = self._lists.nprobe
        return f"approximate search (faiss IVF, {self._lists.nlist} lists, {read} read)"

    def extend(self, rows: np.ndarray) -> None:
        self._exact.extend(rows)

    def truncate(self, count: int) -> None:
        self._exact.truncate(count)
        if self._lists is not None and count < self._lists.ntotal:
            self._lists, self._trained_at = None, 0  # built again from the rows when next needed

    def rows(self, start: int, stop: int) -> np.ndarray:
        return self._all.rows(start, stop)

    def take(self, positions: np.ndarray) -> np.ndarray:
        """The rows at `positions` (M,), as (M, D) float32."""
        return self._all.take(positions)

    def search(self, queries: np.ndarray, visible: np.ndarray) -> Neighbors:
        """As `NeighborIndex.search`; queries that see different segments are looked up apart."""
        if len(queries) == 0:
            return self._all.search(queries, visible)
        segments = visible // SEGMENT_ROWS * SEGMENT_ROWS
        parts = []
        for listed in np.unique(segments):
            part = slice(*np.searchsorted(segments, [listed, listed + 1]))
            parts.append(self._search_segment(queries[part], visible[part], int(listed)))
        return Neighbors(
            np.concatenate([part.positions for part in parts]),
            np.concatenate([part.products for part in parts]),
        )

    def _search_segment(self, queries: np.ndarray, visible: np.ndarray, listed: int) -> Neighbors:
        """Look up queries that see the first `listed` rows in the lists, the rest in the tail."""
        if listed < self._first_training:
            return self._exact.search(queries, visible)
        self._bring_lists_to(listed)
        tail = self._all.search(queries, visible, first_row=listed)
        return merge_neighbors([self._search_lists(queries), tail], self.k)

    def _search_lists(self, queries: np.ndarray, itself: np.ndarray | None = None) -> Neighbors:
        """The nearest listed rows; `itself` (N,) are positions that do not count."""
        assert self._lists is not None
        _, positions = self._lists.search(queries, self.k + EXTRA_CANDIDATES)
        absent = (
            positions < 0 if itself is None else (positions < 0) | (positions == itself[:, None])
        )
        positions = np.where(absent, -1, positions)
        rows = self._all.take(np.maximum(positions, 0).ravel())
        repeated = np.repeat(queries, positions.shape[1], axis=0)
        products = row_products(repeated, rows).reshape(positions.shape)
        products[absent] = -np.inf
        return merge_neighbors([Neighbors(positions, products)], self.k)

    def _bring_lists_to(self, listed: int) -> None:
        """Have exactly the first `listed` rows in lists trained at the right size."""
        train_at = self._first_training
        while train_at * GROWTH_FACTOR <= listed:
            train_at *= GROWTH_FACTOR
        if self._lists is None or train_at != self._trained_at or self._lists.ntotal > listed:
            self._train(train_at)
            self._add_up_to(train_at)
            self._measure(train_at)  # at this size in every run, so that all read as many lists
        self._add_up_to(listed)

    def _add_up_to(self, listed: int) -> None:
        assert self._lists is not None
        while self._lists.ntotal < listed:
            start = self._lists.ntotal
            self._lists.add(self._all.rows(start, min(start + SEGMENT_ROWS, listed)))

    def _train(self, rows: int) -> None:
        """New, empty lists whose centers are learned from a random sample of the first `rows`."""
        lists = int(4 * np.sqrt(rows))
        sample = min(rows, lists * ROWS_PER_LIST_TO_TRAIN)
        chosen = generator(0, "approximate index", rows).choice(rows, sample, replace=False)
        quantizer = faiss.IndexFlatIP(self.dimension)
        inverted = faiss.IndexIVFFlat(quantizer, self.dimension, lists, faiss.METRIC_INNER_PRODUCT)
        inverted.cp.niter = 10
        inverted.cp.max_points_per_centroid = ROWS_PER_LIST_TO_TRAIN
        inverted.cp.spherical = True
        inverted.train(self._all.take(np.sort(chosen)))
        self._lists, self._trained_at = inverted, rows
        self._exact.release()

    def _measure(self, listed: int) -> None:
        """Gain error against exact search, of a random probe of the listed rows among the others;
        settles how many lists are read."""
        assert self._lists is not None
        random = generator(0, "approximate index probe", listed)
        chosen = np.sort(random.choice(listed, min(listed, PROBE_ROWS), replace=False))
        probe = self._all.take(chosen)
        exact = self._true_gains(chosen, listed)
        for lists_read in self._choices:
            self._lists.nprobe = lists_read
            found = self._search_lists(probe, itself=chosen)
            error = np.nan_to_num(found.distances, nan=2.0).mean(axis=1) - exact
            if error.mean() <= TOLERABLE_ERROR:
                break
        self.gain_error = (
            float(error.mean()), float(np.quantile(error, 0.99)), float(error.max())
        )  # fmt: skip
        log.info(
            "Approximate index over %d rows, %d lists, %d read per lookup: measured gain error on "
            "%d rows is %.5f on average, %.5f at the 99th percentile, %.5f at most.",
            listed, self._lists.nlist, self._lists.nprobe, PROBE_ROWS, *self.gain_error,
        )  # fmt: skip

    def _true_gains(self, chosen: np.ndarray, listed: int) -> np.ndarray:
        """Mean distance of the rows at `chosen` (N,) to the k nearest other listed rows."""
        rows = self._all.filled[:listed]
        queries, itself = rows[torch.from_numpy(chosen)], torch.from_numpy(chosen)
        best = torch.full((len(chosen), self.k), -torch.inf, dtype=torch.float32)
        with full_float32():
            for start in range(0, listed, SEGMENT_ROWS):
                products = queries @ rows[start : start + SEGMENT_ROWS].T
                here = (itself >= start) & (itself < start + SEGMENT_ROWS)
                products[here, itself[here] - start] = -torch.inf
                best = torch.cat([best, products], 1).topk(self.k).values
        return (1 - best.double()).mean(1).numpy()
