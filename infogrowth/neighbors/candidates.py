"""Rows that could be among the nearest: found in blocks of scores, pooled, decided in float64.

A score is a cosine that rounding has moved, by `error` at most. Whatever scores so well that it
could be among the K nearest is a hit; only hits are computed again in float64, in one fixed order
of additions. So the answer has the same bits for any block, batch, precision or device.

Shapes: N queries, B blocks of Q queries and W rows each, P hits, K neighbors.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from infogrowth.neighbors.rows import fold_sum

NOTHING = -torch.inf  # the score of a row that is not there or may not be seen
GROUP = 32  # columns whose maximum is compared before they are themselves
SMALL_GROUP = 8  # the same in blocks of few rows, whose number is a multiple of this
PAIR_ELEMENTS = {"cpu": 1 << 18, "cuda": 1 << 26}  # multiplied at once; a CPU keeps them in cache
MAX_HITS = 1 << 21  # held at once; near-copies in great number are decided portion by portion


@dataclass(frozen=True)
class Hits:
    """Pairs of a query and a row, by their numbers, and their scores: columns of one length."""

    query: torch.Tensor
    position: torch.Tensor
    score: torch.Tensor

    def __len__(self) -> int:
        return len(self.query)

    def take(self, which: torch.Tensor) -> Hits:
        return Hits(self.query[which], self.position[which], self.score[which])

    def distinct(self) -> Hits:
        """Each pair once, in order of query and position."""
        if len(self) == 0:
            return self
        key = self.query * (self.position.max() + 1) + self.position
        order = key.argsort(stable=True)
        key = key[order]
        new = torch.ones(len(key), dtype=torch.bool, device=key.device)
        torch.ne(key[1:], key[:-1], out=new[1:])
        return self.take(order[new])

    @staticmethod
    def joined(parts: list[Hits]) -> Hits:
        columns = ("query", "position", "score")
        return Hits(*(torch.cat([getattr(part, name) for part in parts]) for name in columns))


def group_maxima(scores_BQW: torch.Tensor) -> torch.Tensor:
    """The largest score in each group of columns (B, Q, groups). A group's columns lie W / GROUP
    apart: such maxima are the cheapest, being taken lane by lane."""
    return _groups(scores_BQW).amax(2)


def kth_best(maxima_BQG: torch.Tensor, k: int) -> torch.Tensor:
    """A score (B, Q) that k rows reach at least, -inf where there are not k groups."""
    if maxima_BQG.shape[2] < k:
        return torch.full_like(maxima_BQG[:, :, 0], NOTHING)
    return maxima_BQG.topk(k, sorted=False).values.amin(2)


def find_hits(
    scores_BQW: torch.Tensor, maxima_BQG: torch.Tensor, floor_BQ: torch.Tensor
) -> Iterator[Hits]:
    """The scores of at least `floor`, in portions; `query` counts through B and Q, `position` is
    the column."""
    groups_BQMG = _groups(scores_BQW)
    queries, groups = floor_BQ.shape[1], groups_BQMG.shape[3]
    promising = (maxima_BQG >= floor_BQ[:, :, None]).nonzero()
    for part in promising.split(MAX_HITS // groups_BQMG.shape[2]):
        block, query, group = part.unbind(1)
        members = groups_BQMG[block, query, :, group]
        line, member = (members >= floor_BQ[block, query][:, None]).nonzero().unbind(1)
        yield Hits(
            (block * queries + query)[line],
            member * groups + group[line],
            members[line, member].float(),
        )


def _groups(scores_BQW: torch.Tensor) -> torch.Tensor:
    blocks, queries, width = scores_BQW.shape
    members = GROUP if width % GROUP == 0 and width >= GROUP * GROUP else SMALL_GROUP
    return scores_BQW.view(blocks, queries, members, width // members)


class Candidates:
    """The hits of N queries so far, and the K best scores among them.

    `exact` computes the cosines of hits in float64; a score is at most `error` away from them.
    """

    def __init__(
        self,
        queries: int,
        k: int,
        error: float,
        exact: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
        device: torch.device,
    ) -> None:
        self._k, self._error, self._exact = k, error, exact
        self._best_NK = torch.full((queries, k), NOTHING, device=device)
        self._hits: list[Hits] = []

    @property
    def floor(self) -> torch.Tensor:
        """The score (N,) below which no row can be among the nearest of a query."""
        return self._best_NK[:, -1] - 2 * self._error

    def add(self, hits: Hits) -> None:
        """Take float32 scores into account; a hit may come more than once."""
        hits = hits.take(hits.score >= self.floor[hits.query])
        if len(hits) == 0:
            return
        if sum(map(len, self._hits)) + len(hits) > MAX_HITS:
            self._hits = [self._nearest()[0]] if self._hits else []
        hits = Hits.joined([*self._hits, hits]).distinct()
        order, rank = ranks(hits.query, hits.score, len(self._best_NK))
        order, rank = order[rank < self._k], rank[rank < self._k]
        self._best_NK = torch.full_like(self._best_NK, NOTHING)
        self._best_NK[hits.query[order], rank] = hits.score[order]
        self._hits = [hits.take(hits.score >= self.floor[hits.query])]

    def result(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Positions (N, K), -1 where there are fewer, and cosines (N, K) float64."""
        products_NK = torch.full_like(self._best_NK, NOTHING, dtype=torch.float64)
        positions_NK = torch.full_like(products_NK, -1, dtype=torch.int64)
        if self._hits:
            hits, rank, products = self._nearest()
            positions_NK[hits.query, rank] = hits.position
            products_NK[hits.query, rank] = products
        return positions_NK, products_NK

    def _nearest(self) -> tuple[Hits, torch.Tensor, torch.Tensor]:
        """The K nearest hits of each query, which of these each is, and its cosine."""
        hits = Hits.joined(self._hits)
        hits = hits.take(hits.score >= self.floor[hits.query])
        hits = hits.distinct()  # in order of position, by which equal cosines go
        products = self._exact(hits.query, hits.position)
        order, rank = ranks(hits.query, products, len(self._best_NK))
        order, rank = order[rank < self._k], rank[rank < self._k]
        return hits.take(order), rank, products[order]


def ranks(query: torch.Tensor, keys: torch.Tensor, queries: int) -> tuple[torch.Tensor, ...]:
    """The order of pairs by query (P,) and descending key (P,), and in this order the rank of each
    within its query."""
    order = keys.argsort(descending=True, stable=True)
    order = order[query[order].argsort(stable=True)]
    sizes = torch.bincount(query, minlength=queries)
    starts = sizes.cumsum(0) - sizes
    return order, torch.arange(len(order), device=order.device) - starts[query[order]]


def pair_products(
    queries_ND: torch.Tensor,
    query_P: torch.Tensor,
    take: Callable[[torch.Tensor], torch.Tensor],
    position_P: torch.Tensor,
) -> torch.Tensor:
    """Cosines (P,) float64 of pairs of a query and a row, which `take` reads by its position."""
    products_P = torch.empty(len(query_P), dtype=torch.float64, device=queries_ND.device)
    step = max(1, PAIR_ELEMENTS[queries_ND.device.type] // queries_ND.shape[1])
    for start in range(0, len(query_P), step):
        part = slice(start, start + step)
        rows_PD = take(position_P[part]).double()
        products_P[part] = fold_sum(rows_PD.mul_(queries_ND[query_P[part]]))
    return products_P
