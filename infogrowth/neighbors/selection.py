"""The best of many scores: candidates of a block, stable orders, ties. Shapes as in exact.py, and
G groups of M = GROUP columns."""

from __future__ import annotations

import torch

GROUP = 32  # columns whose maximum is taken before the best are sought
NOTHING = -torch.inf  # the score of a row that is not there or may not be seen


def take_best(
    scores_NC: torch.Tensor, positions_NC: torch.Tensor, scores_NW: torch.Tensor, start: int
) -> None:
    """Merge a block of scores, whose first column is row `start`, into the running best C.

    The C best columns lie in the C groups with the highest maxima, so only those are sorted; and
    queries whose best so far no group beats are left alone. A group is made of GROUP columns that
    lie W / GROUP apart: such maxima are the cheapest, being taken lane by lane.
    """
    count, wanted = scores_NC.shape
    members_NMG = scores_NW.view(count, GROUP, -1)
    groups = members_NMG.shape[2]
    hot: slice | torch.Tensor = slice(None)
    if groups <= wanted:
        new_NC, columns_NC = scores_NW.topk(min(wanted, scores_NW.shape[1]), sorted=False)
    else:
        maxima_NG = members_NMG.amax(1)
        if scores_NC.device.type == "cpu":  # elsewhere asking costs more than it saves
            beaten = (maxima_NG.amax(1) > scores_NC[:, -1]).nonzero()[:, 0]
            if len(beaten) == 0:
                return
            if len(beaten) < 0.7 * count:
                hot, maxima_NG, members_NMG = beaten, maxima_NG[beaten], members_NMG[beaten]
        group_NC = maxima_NG.topk(wanted, sorted=False).indices
        picked = members_NMG.gather(2, group_NC[:, None].expand(-1, GROUP, -1))
        new_NC, at_NC = picked.flatten(1).topk(wanted, sorted=False)
        columns_NC = at_NC // wanted * groups + group_NC.gather(1, at_NC % wanted)
    all_scores = torch.cat([scores_NC[hot], new_NC.float()], 1)
    all_positions = torch.cat([positions_NC[hot], columns_NC + start], 1)
    scores, order = all_scores.topk(wanted)
    scores_NC[hot] = scores
    positions_NC[hot] = all_positions.gather(1, order)


def best_first(products_NC: torch.Tensor, positions_NC: torch.Tensor) -> torch.Tensor:
    """Columns by descending product; equal products by position, absent ones last."""
    by_position = positions_NC.masked_fill(positions_NC < 0, torch.iinfo(torch.int64).max)
    by_position = by_position.argsort(dim=1, stable=True)
    by_product = products_NC.gather(1, by_position).argsort(dim=1, stable=True, descending=True)
    return by_position.gather(1, by_product)


def keep_best_ties(
    best_NK: torch.Tensor,
    positions_NK: torch.Tensor,
    query: torch.Tensor,
    position: torch.Tensor,
    product: torch.Tensor,
) -> None:
    """Merge (query, position, product) triples, in order of query and position, into the best K."""
    k = best_NK.shape[1]
    order = product.argsort(stable=True, descending=True)
    order = order[query[order].argsort(stable=True)]
    query, position, product = query[order], position[order], product[order]
    concerned, sizes = torch.unique_consecutive(query, return_counts=True)
    offsets = torch.cumsum(sizes, 0) - sizes
    place = torch.arange(len(query), device=query.device) - offsets.repeat_interleave(sizes)
    line = torch.arange(len(concerned), device=query.device).repeat_interleave(sizes)
    first_k = place < k
    new_products = torch.full((len(concerned), k), NOTHING, dtype=product.dtype).to(query.device)
    new_positions = torch.full_like(new_products, -1, dtype=torch.int64)
    new_products[line[first_k], place[first_k]] = product[first_k]
    new_positions[line[first_k], place[first_k]] = position[first_k]
    products = torch.cat([best_NK[concerned], new_products], 1)
    positions = torch.cat([positions_NK[concerned], new_positions], 1)
    best = best_first(products, positions)[:, :k]
    best_NK[concerned] = products.gather(1, best)
    positions_NK[concerned] = positions.gather(1, best)


def whole_groups(columns: int) -> int:
    return -(-columns // GROUP) * GROUP
