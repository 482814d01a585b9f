"""Recall@1/5/10 in both directions, from score matrices.

Tie rule: among equal scores the higher index ranks first. It is the order in which the paper's
code reads a reversed ascending sort, made exact; without it a table depends on the sort's whims,
because everything outside the re-ranked candidates has one and the same score.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from infogrowth import distributed
from infogrowth.errors import UserError
from infogrowth.files import atomic_write, atomic_write_json

DEPTHS = (1, 5, 10)


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
        UserError: nothing to rank, or a score that is not a number (a broken checkpoint would
            otherwise look perfect).
    """
    text = _recalls(first_rank(score_i2t, img2txt))
    image = _recalls(first_rank(score_t2i, [[int(i)] for i in txt2img]))
    table = {f"txt_r{depth}": value for depth, value in zip(DEPTHS, text, strict=True)}
    table["txt_r_mean"] = sum(text) / len(text)
    table |= {f"img_r{depth}": value for depth, value in zip(DEPTHS, image, strict=True)}
    table["img_r_mean"] = sum(image) / len(image)
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
    if not queries or not answers:
        raise UserError("there is nothing to rank: the evaluation set is empty")
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
    each = texts / images

    def miss(depth: int) -> float:
        return float(np.prod([max(1 - each / max(texts - i, 1), 0.0) for i in range(depth)]))

    table = {f"txt_r{depth}": 100 * (1 - miss(depth)) for depth in DEPTHS}
    return table | {f"img_r{depth}": 100 * min(depth / images, 1.0) for depth in DEPTHS}


def as_text(tables: dict[str, dict[str, Any]]) -> str:
    """Recall tables by name as aligned columns, in per cent."""
    columns = [f"{side}_r{depth}" for side in ("txt", "img") for depth in DEPTHS] + ["r_mean"]
    heads = ["TR@1", "TR@5", "TR@10", "IR@1", "IR@5", "IR@10", "mean"]
    width = max([len(name) for name in tables] + [4])
    lines = [" ".join([" " * width, *(f"{head:>6}" for head in heads)])]
    for name, table in tables.items():
        cells = [f"{table[c]:6.2f}" if c in table else " " * 6 for c in columns]
        lines.append(" ".join([f"{name:<{width}}", *cells]))
    return "\n".join(line.rstrip() for line in lines)


def _recalls(ranks: np.ndarray) -> list[float]:
    return [100.0 * float((ranks < depth).sum()) / len(ranks) for depth in DEPTHS]


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
    rows: dict[str, dict[str, Any]] = {}
    for name, table in tables.items():
        rows[name] = table
        rows[f"{name} (chance)"] = chance_table(len(sets[name]), len(sets[name].texts))
    text = as_text(rows)
    print(text)
    atomic_write_json(Path(f"{path}.json"), tables, indent=2)
    with atomic_write(Path(f"{path}.txt"), "w") as file:
        file.write(f"{text}\n")
