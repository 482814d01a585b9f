"""The arms of the experiment: which pairs each trains on, and how it draws them.

All arms choose from the same source with the same scores; only the rule differs. `size` is the
size of the static subsets, the same for all of them.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from infogrowth.growth.thresholds import StreamEstimate
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
        gains: row in `pairs` → gains of the kept pair, in the order of arrival.
        min_align: the threshold that `grow` used.
        right: (N,) float, the estimated probability that a caption is right.
        swapped: (N,) bool, the planted truth; only the oracle may look at it.
    """

    pairs: Sequence[Annotation]
    alignment: np.ndarray
    images: np.ndarray
    gains: dict[int, Sequence[float]]
    min_align: float
    right: np.ndarray
    swapped: np.ndarray

    def entry(self, row: int, arm: "Arm") -> Annotation:
        """A pair as it is trained on: with its gains, if it was kept."""
        if row not in self.gains:
            return self.pairs[row]
        weight = float(self.right[row]) if arm.by_right else 1.0
        return {**self.pairs[row], "gains": [weight * gain for gain in self.gains[row]]}

    def composition(self, rows: Sequence[int]) -> dict[str, Any]:
        """How many pairs, which share of them is swapped, how many distinct captions."""
        captions = {self.pairs[row]["caption"] for row in rows}
        wrong = float(self.swapped[rows].mean()) if len(rows) else 0.0
        return {"pairs": len(rows), "wrong": wrong, "captions": len(captions)}


@dataclass(frozen=True)
class Arm:
    """One way to choose rows of the source: its sampler (of `train/pretrain_gain.py`), its rule,
    and its words."""

    sampler: str
    choose: Callable[[Scored, int, int], list[int]]
    says: str
    static: bool = False  # of the size that is asked for
    by_right: bool = False  # gains are multiplied by the probability that the caption is right


def _all(scored: Scored, size: int, seed: int) -> list[int]:
    return list(range(len(scored.pairs)))


def _random(scored: Scored, size: int, seed: int) -> list[int]:
    chosen = generator(seed, "claim", "random arm").permutation(len(scored.pairs))[:size]
    return sorted(chosen.tolist())


def _top_alignment(scored: Scored, size: int, seed: int) -> list[int]:
    return sorted(np.argsort(-scored.alignment, kind="stable")[:size].tolist())


def _oracle(scored: Scored, size: int, seed: int) -> list[int]:
    return np.flatnonzero(~scored.swapped).tolist()


def _semantic_deduplication(scored: Scored, size: int, seed: int) -> list[int]:
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
        cosines = images[order] @ images[order].T
        before = np.tri(len(order), k=-1, dtype=bool)
        redundancy[order] = cosines.max(axis=1, where=before, initial=-1.0)
    return sorted(rows[np.argsort(redundancy, kind="stable")[:size]].tolist())


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


def _kept(scored: Scored, size: int, seed: int) -> list[int]:
    return list(scored.gains)


def _top_gain(scored: Scored, size: int, seed: int) -> list[int]:
    """What `infogrowth select --top` takes: the largest mean gains, earlier pairs first."""
    kept = np.array(list(scored.gains))
    gains = np.array([np.mean(gains) for gains in scored.gains.values()])
    return sorted(kept[np.argsort(-gains, kind="stable")[:size]].tolist())


ARMS: dict[str, Arm] = {
    "full": Arm("uniform", _all, "the whole source"),
    "random": Arm("uniform", _random, "a random subset", True),
    "alignment": Arm("uniform", _top_alignment, "the best aligned (as DataComp filters)", True),
    "semdedup": Arm("uniform", _semantic_deduplication, "alignment filter + SemDeDup", True),
    "grown_static": Arm("uniform", _top_gain, "grown, the largest gains", True),
    "grown_uniform": Arm("uniform", _kept, "grown, all kept, drawn evenly"),
    "grown_proportional": Arm("proportional", _kept, "grown, drawn by gain"),
    "grown_two_phase": Arm("two_phase", _kept, "grown, two-phase (the default)"),
    "grown_by_right": Arm("two_phase", _kept, "grown, two-phase by gain × P(right)", by_right=True),
    "oracle": Arm("uniform", _oracle, "the source without its swapped captions"),
}


def right_given_alignment(alignment: np.ndarray, estimate: StreamEstimate) -> np.ndarray:
    """The probability that a caption is right, for each (N,) alignment.

    By Bayes over intervals that hold equal shares of the stream: 1 - noise × the wrong captions'
    share of the interval / the stream's; made to rise with alignment, halfway between the least
    rising curve above it and the largest below it.
    """
    edges = np.quantile(estimate.stream, np.linspace(0, 1, 21))
    wrong, stream = (
        np.histogram(part, edges)[0] / len(part) for part in (estimate.swapped, estimate.stream)
    )
    right = np.clip(1 - estimate.noise * wrong / np.maximum(stream, 1e-12), 0, 1)
    above, below = np.maximum.accumulate(right), np.minimum.accumulate(right[::-1])[::-1]
    return np.interp(alignment, (edges[1:] + edges[:-1]) / 2, (above + below) / 2)


def quality(scored: Scored) -> dict[str, Any]:
    """How well the encoder's alignment separates right from swapped captions; what gains are.

    None stands for what has no value: without swapped captions there is no AUROC.
    """
    ranks = pd.Series(scored.alignment).rank().to_numpy()
    right, wrong = ~scored.swapped, scored.swapped
    above = ranks[right].sum() - right.sum() * (right.sum() + 1) / 2
    gains = pd.Series({row: float(np.mean(gains)) for row, gains in scored.gains.items()})
    kept_wrong = pd.Series(wrong[gains.index], gains.index)
    return {
        "auroc": above / (right.sum() * wrong.sum()) if wrong.any() else None,
        "threshold": scored.min_align,
        "gain_deciles": [round(float(g), 4) for g in gains.quantile(np.linspace(0, 1, 11))],
        "gain_right": float(gains[~kept_wrong].mean()),
        "gain_wrong": float(gains[kept_wrong].mean()) if kept_wrong.any() else None,
    }
