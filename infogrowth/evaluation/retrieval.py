"""Image–text retrieval: scores by cosine first, then by the matching head on the best candidates,
and the recalls of both directions.

Every rank encodes and matches its own blocks of images. Blocks are split by the batch size alone
and pairs are grouped by image, so a pair is computed in the same company whatever the number of
ranks: the scores are the same at any world size, ranks without a block included.

Tie rule of the recalls: among equal scores the higher index ranks first. It is the order in which
the paper's code reads a reversed ascending sort, made exact; without it a table depends on the
sort's whims, because everything outside the re-ranked candidates has one and the same score.

Shapes: I images, T texts, D feature width, L image tokens, W width.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from torch.utils.data import Dataset
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from infogrowth import distributed
from infogrowth.blip.model import BlipDual
from infogrowth.blip.text import tokenize
from infogrowth.data.datasets import RetrievalEvaluation
from infogrowth.data.loading import open_loader
from infogrowth.errors import UserError
from infogrowth.files import atomic_write, atomic_write_json

# Text tokens per pass: enough to fill the device, few enough for its cache or memory.
TOKENS_AT_ONCE = {"cpu": 2_048, "cuda": 16_384}
# What a pair outside the candidates scores, as in BLIP: below every re-ranked pair.
NOT_RANKED = -100.0
DEPTHS = (1, 5, 10)
# The columns of a printed table.
_COLUMNS = {
    f"{side}_r{depth}": f"{head}@{depth}"
    for side, head in (("txt", "TR"), ("img", "IR"))
    for depth in DEPTHS
} | {"r_mean": "mean"}


class RetrievalScores(NamedTuple):
    """Scores in both directions, float32 on the CPU, and the cosines they started from."""

    i2t: torch.Tensor  # (I, T)
    t2i: torch.Tensor  # (T, I)
    cosine: torch.Tensor  # (I, T)


def retrieval_recall(
    model: BlipDual, tokenizer: PreTrainedTokenizerBase, images: RetrievalEvaluation, **options: Any
) -> dict[str, float]:
    """The recall table of an evaluation set; ``options`` as for :func:`retrieval_scores`."""
    scores = retrieval_scores(model, tokenizer, images, images.texts, **options)
    return recall_table(scores.i2t.numpy(), scores.t2i.numpy(), images.img2txt, images.txt2img)


@torch.inference_mode()
def retrieval_scores(
    model: BlipDual,
    tokenizer: PreTrainedTokenizerBase,
    images: Dataset,
    texts: list[str],
    *,
    k_test: int = 256,
    batch_size: int = 64,
    max_length: int = 35,
    workers: int = 0,
    autocast: Callable[[], AbstractContextManager] = nullcontext,
    progress: bool = False,
) -> RetrievalScores:
    """Score every image with every text; the model is put in eval mode and left as it was.

    Among the ``k_test`` candidates of a query (by cosine; of equal ones the lower index), the
    score is matching logit + cosine; elsewhere −100. ``k_test`` may exceed the set; with 0 the
    scores are the cosines themselves, and no pair is matched.

    Args:
        images: items ``{"image": (C, H, W)}`` by number.
        texts: the captions.
        batch_size: images or texts per encoder pass.
        autocast: the block of forward passes.

    Raises:
        UserError: an empty set, or an image that cannot be read.
    """
    count: int = len(images)  # type: ignore[arg-type]
    if not count or not texts:
        raise UserError("the evaluation set has no images or no captions")
    was_training = model.training
    model.eval()
    try:
        device = next(model.parameters()).device
        ids_TN, mask_TN = (t.to(device) for t in tokenize(tokenizer, texts, max_length))
        loader = open_loader(images, own_blocks(count, batch_size), workers, device)
        with autocast():
            text_TD = _encode_texts(model, ids_TN, mask_TN, batch_size)
            tokens, own_OD = _encode_images(model, loader, device, k_test > 0)
        image_ID = _of_all_ranks(own_OD, count, batch_size)
        # Outside autocast: which pairs are candidates must not depend on the number format.
        cosine_IT = image_ID @ text_TD.T
        if k_test == 0:
            cosine_IT = cosine_IT.cpu()
            return RetrievalScores(cosine_IT, cosine_IT.T.contiguous(), cosine_IT)
        own = [row for block in own_blocks(count, batch_size) for row in block]
        with autocast():
            own_rows = _match(model, own, tokens, ids_TN, mask_TN, cosine_IT, k_test, progress)
    finally:
        model.train(was_training)
    i2t, t2i = (_of_all_ranks(rows, count, batch_size).cpu() for rows in own_rows)
    return RetrievalScores(i2t, t2i.T.contiguous(), cosine_IT.cpu())


def top_candidates(scores_QN: torch.Tensor, k: int) -> torch.Tensor:
    """Which ``min(k, N)`` answers of each query score highest, as booleans ``(Q, N)``.

    Of equal scores at the border the lower index is taken.
    """
    k = min(k, scores_QN.shape[1])
    border_Q1 = scores_QN.topk(k, dim=1).values[:, -1:]
    above_QN = scores_QN > border_Q1
    level_QN = scores_QN == border_Q1
    left_Q1 = k - above_QN.sum(dim=1, keepdim=True)
    return above_QN | (level_QN & (level_QN.cumsum(dim=1) <= left_Q1))


def own_blocks(count: int, size: int, rank: int | None = None) -> list[list[int]]:
    """A rank's share (default: this one's) of 0 … count − 1: every W-th block of ``size``."""
    blocks = [list(range(s, min(s + size, count))) for s in range(0, count, size)]
    return blocks[distributed.rank() if rank is None else rank :: distributed.world_size()]


def _of_all_ranks(own: torch.Tensor, count: int, size: int) -> torch.Tensor:
    """The rows ``(count, …)`` of which each rank has those of its :func:`own_blocks`."""
    ranks = range(distributed.world_size())
    order = [row for rank in ranks for block in own_blocks(count, size, rank) for row in block]
    gathered = torch.cat(distributed.all_gather_ragged(own))
    return gathered[torch.tensor(order, device=own.device).argsort()]


def _encode_texts(
    model: BlipDual, ids_TN: torch.Tensor, mask_TN: torch.Tensor, batch_size: int
) -> torch.Tensor:
    """Unit features ``(T, D)`` of all texts, each rank encoding its blocks."""
    parts = [torch.empty(0, model.config.embed_dim, device=ids_TN.device)]
    for block in own_blocks(len(ids_TN), batch_size):
        longest = int(mask_TN[block].sum(dim=1).max())
        parts.append(model.encode_text(ids_TN[block, :longest], mask_TN[block, :longest])[1])
    return _of_all_ranks(torch.cat(parts).float(), len(ids_TN), batch_size)


def _encode_images(
    model: BlipDual, batches: Any, device: torch.device, keep_tokens: bool
) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Tokens of this rank's images, kept on the CPU in the format that matching casts them to (in
    pinned memory, so that nothing waits for them), and their features ``(own, D)``."""
    half = torch.is_autocast_enabled(device.type)
    features = [torch.empty(0, model.config.embed_dim, device=device)]
    tokens: list[torch.Tensor] = []
    for batch in batches:
        tokens_BLW, features_BD = model.encode_image(batch["image"].to(device, non_blocking=True))
        features.append(features_BD)
        if keep_tokens:
            kind = torch.get_autocast_dtype(device.type) if half else tokens_BLW.dtype
            host = torch.empty(tokens_BLW.shape, dtype=kind, pin_memory=device.type == "cuda")
            tokens += host.copy_(tokens_BLW.to(kind), non_blocking=True).unbind()
    return tokens, torch.cat(features).float()


def _match(
    model: BlipDual,
    own: list[int],
    tokens: list[torch.Tensor],
    ids_TN: torch.Tensor,
    mask_TN: torch.Tensor,
    cosine_IT: torch.Tensor,
    k_test: int,
    progress: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of this rank's images in both directions, ``(own, T)`` each."""
    device = cosine_IT.device
    wanted_i2t = top_candidates(cosine_IT[own], k_test)
    wanted_t2i = top_candidates(cosine_IT.T, k_test).T[own]
    # A pair that both directions want is computed once. Which ones is known on the host before
    # the first is computed, so nothing waits for the device in between.
    pairs_OT = (wanted_i2t | wanted_t2i).cpu()
    lengths_T = mask_TN.sum(dim=1).cpu()
    logits_OT = torch.zeros(wanted_i2t.shape, device=device)
    show = progress and distributed.is_main()
    for row, image_LW in enumerate(tqdm(tokens, desc="match", disable=None if show else True)):
        texts = pairs_OT[row].nonzero()[:, 0]
        texts = texts[lengths_T[texts].argsort(stable=True)]
        image_1LW = image_LW.to(device, non_blocking=True)[None]
        lengths = lengths_T[texts].tolist()
        for part in passes(lengths, TOKENS_AT_ONCE[device.type]):
            chosen, longest = texts[part].to(device, non_blocking=True), lengths[part][-1]
            logits_N2 = model.itm_logits(
                image_1LW,
                ids_TN[chosen, :longest],
                mask_TN[chosen, :longest],
                torch.zeros_like(chosen),
            )
            logits_OT[row, chosen] = logits_N2[:, 1]
    scores_OT = logits_OT + cosine_IT[own]
    return (
        scores_OT.masked_fill(~wanted_i2t, NOT_RANKED),
        scores_OT.masked_fill(~wanted_t2i, NOT_RANKED),
    )


def passes(lengths: list[int], budget: int) -> list[slice]:
    """Split ascending lengths into runs of at most ``budget`` padded tokens (at least one text)."""
    splits, start = [], 0
    for stop, length in enumerate(lengths):
        if stop > start and (stop + 1 - start) * length > budget:
            splits.append(slice(start, stop))
            start = stop
    return [*splits, slice(start, len(lengths))] if lengths else []


def recall_table(
    score_i2t: np.ndarray,
    score_t2i: np.ndarray,
    img2txt: Sequence[Sequence[int]],
    txt2img: Sequence[int],
) -> dict[str, float]:
    """Recalls in per cent under BLIP's names.

    ``txt_r1/5/10``: an image's right caption (any of them) is among its first 1/5/10 texts;
    ``img_r1/5/10``: a text's image is among its first images; ``txt_r_mean``, ``img_r_mean`` and
    ``r_mean`` are their means.

    Args:
        score_i2t: ``(I, T)`` real scores of every text for every image.
        score_t2i: ``(T, I)`` real scores of every image for every text.
        img2txt: the texts that belong to each image.
        txt2img: the image that each text belongs to.

    Raises:
        UserError: a score that is not a number (a broken checkpoint would otherwise look perfect).
    """
    table: dict[str, float] = {}
    for side, scores, right in (
        ("txt", score_i2t, img2txt),
        ("img", score_t2i, [[int(i)] for i in txt2img]),
    ):
        ranks = first_rank(scores, right)
        recalls = [100.0 * float((ranks < depth).sum()) / len(ranks) for depth in DEPTHS]
        table |= {f"{side}_r{depth}": value for depth, value in zip(DEPTHS, recalls, strict=True)}
        table[f"{side}_r_mean"] = sum(recalls) / len(recalls)
    table["r_mean"] = (table["txt_r_mean"] + table["img_r_mean"]) / 2
    return table


def first_rank(scores: np.ndarray, right: Sequence[Sequence[int]]) -> np.ndarray:
    """The rank (0 is best) of each query's best-ranked right answer, int64 ``(Q,)``.

    A query without a right answer ranks after everything.

    Args:
        scores: ``(Q, N)`` real numbers.
        right: the right answers of each query, indices below N.
    """
    queries, answers = scores.shape
    if not np.isfinite(scores).all():
        raise UserError("the model gives scores that are not finite; the checkpoint is broken")
    best = np.full(queries, answers, dtype=np.int64)
    index = np.arange(answers)
    for query, candidates in enumerate(right):
        row = scores[query]
        for candidate in candidates:
            ahead = (row > row[candidate]) | ((row == row[candidate]) & (index > candidate))
            best[query] = min(best[query], int(ahead.sum()))
    return best


def chance_table(images: int, texts: int) -> dict[str, float]:
    """What guessing gives: the chance of one right answer among the first 1/5/10, in per cent.

    Texts are counted as if each image had ``texts / images`` captions.
    """
    miss = np.cumprod([max(1 - texts / images / max(texts - i, 1), 0.0) for i in range(DEPTHS[-1])])
    table = {f"txt_r{depth}": 100 * (1 - float(miss[depth - 1])) for depth in DEPTHS}
    return table | {f"img_r{depth}": 100 * min(depth / images, 1.0) for depth in DEPTHS}


def as_text(tables: dict[str, dict[str, float]]) -> str:
    """Recall tables by name as aligned columns, in per cent."""
    frame = pd.DataFrame(tables).reindex(list(_COLUMNS)).T.rename(columns=_COLUMNS)
    text = frame.to_string(float_format="%.2f", na_rep="", col_space=6)
    return "\n".join(line.rstrip() for line in text.splitlines())


def save_tables(
    tables: dict[str, dict[str, float]], sets: dict[str, Any], path: str | Path
) -> None:
    """Print the tables beside what guessing gives, and write them as ``path``.json and .txt.

    Rank 0 only; nothing when there are no tables.

    Args:
        sets: the evaluation set of each table: as many images as its length, its ``texts``.
    """
    if not tables or not distributed.is_main():
        return
    rows: dict[str, dict[str, float]] = {}
    for name, table in tables.items():
        rows[name] = table
        rows[f"{name} (chance)"] = chance_table(len(sets[name]), len(sets[name].texts))
    text = as_text(rows)
    print(text)
    atomic_write_json(Path(f"{path}.json"), tables, indent=2)
    with atomic_write(Path(f"{path}.txt"), "w") as file:
        file.write(f"{text}\n")
