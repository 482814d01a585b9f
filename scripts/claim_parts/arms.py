"""The arms of the experiment: which pairs each trains on, and how it draws them.

All arms choose from the same source with the same scores; only the rule differs. `size` is the
size of the static subsets, the same for all of them.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from infogrowth.randomness import generator

Annotation = dict[str, Any]
_CELL_ROWS = 256  # rows per k-means cell of SemDeDup, on average


@dataclass(frozen=True)
class Scored:
    """The source and what is known of it.

    Attributes:
        pairs: all pairs in the order of their arrival.
        alignment: cosine of image and caption feature, (N,) float.
        images: unit image features, (N, D) float32.
        kept: position in `pairs` → the kept pair with its gains, in the order of arrival.
        min_align: the threshold that `grow` used.
        swapped: (N,) bool, the planted truth; only the oracle may look at it.
    """

    pairs: Sequence[Annotation]
    alignment: np.ndarray
    images: np.ndarray
    kept: dict[int, Annotation]
    min_align: float
    swapped: np.ndarray


@dataclass(frozen=True)
class Arm:
    """One way to choose: its sampler (of `train/pretrain_gain.py`), its rule, and its words."""

    sampler: str
    choose: Callable[[Scored, int, int], list[Annotation]]
    says: str


def _all(scored: Scored, size: int, seed: int) -> list[Annotation]:
    return list(scored.pairs)


def _random(scored: Scored, size: int, seed: int) -> list[Annotation]:
    chosen = generator(seed, "claim", "random arm").permutation(len(scored.pairs))[:size]
    return _rows(scored, np.sort(chosen))


def _top_alignment(scored: Scored, size: int, seed: int) -> list[Annotation]:
    return _rows(scored, np.sort(np.argsort(-scored.alignment, kind="stable")[:size]))


def _oracle(scored: Scored, size: int, seed: int) -> list[Annotation]:
    return _rows(scored, np.flatnonzero(~scored.swapped))


def _semantic_deduplication(scored: Scored, size: int, seed: int) -> list[Annotation]:
    """SemDeDup (arXiv 2303.09540) behind the same alignment filter as `grow`.

    k-means cells of the image features; inside a cell rows stand in the order of their distance
    from its centre, farthest first, and a row's redundancy is its largest cosine to a row before
    it. The `size` least redundant rows stay: the threshold that leaves exactly so many.
    """
    rows = np.flatnonzero(scored.alignment >= scored.min_align)
    images = scored.images[rows]
    cells, centres = _spherical_kmeans(images, max(1, len(rows) // _CELL_ROWS), seed)
    redundancy = np.full(len(rows), -1.0)
    for cell in range(len(centres)):
        members = np.flatnonzero(cells == cell)
        order = members[np.argsort(images[members] @ centres[cell], kind="stable")]
        cosines = np.tril(images[order] @ images[order].T, -1)
        if len(order) > 1:
            redundancy[order[1:]] = cosines[1:].max(axis=1, where=cosines[1:] != 0, initial=-1.0)
    return _rows(scored, np.sort(rows[np.argsort(redundancy, kind="stable")[:size]]))


def _spherical_kmeans(rows: np.ndarray, count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    start = generator(seed, "claim", "semdedup").permutation(len(rows))[:count]
    centres = rows[start]
    for _ in range(20):
        cells = np.argmax(rows @ centres.T, axis=1)
        sums = np.zeros_like(centres)
        np.add.at(sums, cells, rows)
        norms = np.linalg.norm(sums, axis=1, keepdims=True)
        centres = np.where(norms > 0, sums / np.maximum(norms, 1e-12), centres)
    return np.argmax(rows @ centres.T, axis=1), centres


def _kept(scored: Scored, size: int, seed: int) -> list[Annotation]:
    return list(scored.kept.values())


def _top_gain(scored: Scored, size: int, seed: int) -> list[Annotation]:
    """What `infogrowth select --top` takes: the largest mean gains, earlier pairs first."""
    kept = list(scored.kept.values())
    gains = np.array([np.mean(pair["gains"]) for pair in kept])
    return [kept[at] for at in np.sort(np.argsort(-gains, kind="stable")[:size])]


ARMS: dict[str, Arm] = {
    "full": Arm("uniform", _all, "the whole source"),
    "random": Arm("uniform", _random, "a random subset"),
    "alignment": Arm("uniform", _top_alignment, "the best aligned (as DataComp filters)"),
    "semdedup": Arm("uniform", _semantic_deduplication, "alignment filter + SemDeDup"),
    "grown_static": Arm("uniform", _top_gain, "grown, the largest gains"),
    "grown_uniform": Arm("uniform", _kept, "grown, all kept, drawn evenly"),
    "grown_proportional": Arm("proportional", _kept, "grown, drawn by gain"),
    "grown_two_phase": Arm("two_phase", _kept, "grown, two-phase (the default)"),
    "oracle": Arm("uniform", _oracle, "the source without its swapped captions"),
}


def _rows(scored: Scored, rows: np.ndarray) -> list[Annotation]:
    return [scored.pairs[row] for row in rows.tolist()]


def composition(arm: Sequence[Annotation], swapped_ids: set[str]) -> dict[str, Any]:
    """How many pairs, which share of them is swapped, and how many distinct captions."""
    table = pd.DataFrame(
        {"image": [a["image"] for a in arm], "caption": [a["caption"] for a in arm]}
    )
    return {
        "pairs": len(table),
        "wrong": float(table.image.isin(swapped_ids).mean()) if len(table) else 0.0,
        "captions": int(table.caption.nunique()),
    }
