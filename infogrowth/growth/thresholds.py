"""Thresholds of cleaning: given as numbers, or found from seeds and stream.

The alignments of a stream are a mixture: those of right captions and those of wrong ones. Seeds
(a clean set) show the first distribution, seeds with swapped captions the second, and the stream
then gives its share of wrong captions, and what each threshold would leave of them. That holds as
far as the seeds are like the stream's right pairs: from the same source, and unknown to the
encoder, since what it was trained on aligns better. Pure numpy; only "auto" and the plain numbers
are the paper's.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Self

import numpy as np

from infogrowth.errors import UserError
from infogrowth.growth.cleaning import Measure, cosine
from infogrowth.randomness import generator

log = logging.getLogger(__name__)

DEFAULT_MIN_ALIGN = 0.4  # the paper's, for BLIP base
PAPERS_RULE = "min_align"  # what a recaption must reach in the paper
RECAPTION_QUANTILE = 0.75  # of the seeds' alignments: what min_recaption_align "auto" asks for
MIN_SEEDS = 20  # fewer say too little about a tail of a few per cent
_SWAPS = 32  # swapped partners tried per seed
_BINS = 12  # of equal mass: enough for a proportion, with some seeds in each
_GROUPS = 20  # of the jackknife
_STEPS = 3000  # of the EM algorithm, which ends earlier when nothing moves any more
_FEWEST = 100  # a threshold keeps a hundredth of the stream: fewer say nothing about purity


@dataclass(frozen=True)
class Thresholds:
    """What a caption must reach; None where seeds (and the stream) have not been seen yet.

    Attributes:
        min_align: lowest alignment at which a sample is kept with its own caption.
        min_align_rule: "given"; "auto", the best balanced accuracy between the seeds' captions and
            swapped ones; or "auto:PURITY", the lowest that leaves the stream this pure. Once it is
            found, a colon and how.
        min_recaption_align: lowest alignment at which a new caption is taken, `min_align` or more.
        min_recaption_align_rule: "min_align", "given", or "auto", a quantile of the seeds' own.
        estimate: for "auto:PURITY" what was estimated when it was found, ready for JSON.
    """

    min_align: float | None
    min_align_rule: str
    min_recaption_align: float | None
    min_recaption_align_rule: str
    estimate: dict[str, Any] | None = None

    @classmethod
    def requested(
        cls, min_align: float | str, min_recaption_align: float | str | None = None
    ) -> Self:
        """What was asked for: numbers, "auto", "auto:0.98". UserError if it makes no sense."""
        align, align_rule = _parsed("min_align", min_align)
        if min_recaption_align is None:
            return cls(align, align_rule, align, PAPERS_RULE)
        recaption, recaption_rule = _parsed("min_recaption_align", min_recaption_align)
        if align is not None and recaption is not None and recaption < align:
            raise UserError(f"min_recaption_align {recaption:g} is below min_align {align:g}")
        return cls(align, align_rule, recaption, recaption_rule)

    @classmethod
    def of_settings(cls, settings: Mapping[str, Any]) -> Self:
        """Those recorded in growth.json; older folders have the paper's rule for recaptions."""
        align = settings["min_align"]
        older = {
            "min_align_rule": "given",
            "min_recaption_align": align,
            "min_recaption_align_rule": PAPERS_RULE,
            "estimate": None,
        }
        return cls(align, **{name: settings.get(name, value) for name, value in older.items()})

    @property
    def requests(self) -> dict[str, Any]:
        """What `requested` was given, by name."""
        asked: dict[str, Any] = {}
        for name in ("min_align", "min_recaption_align"):
            rule = getattr(self, f"{name}_rule").partition(": ")[0]
            asked[name] = {"given": getattr(self, name), PAPERS_RULE: None}.get(rule, rule)
        return asked

    @property
    def resolved(self) -> bool:
        """Both are known."""
        return self.min_align is not None and self.min_recaption_align is not None

    @property
    def purity(self) -> float | None:
        """The purity aimed at, if one is."""
        request = str(self.requests["min_align"])
        return float(request.removeprefix("auto:")) if request.startswith("auto:") else None

    @property
    def recaption_rule(self) -> str:
        """What lets a new caption in, for the record."""
        return f"{self.min_recaption_align:.4f} ({self.min_recaption_align_rule})"

    def resolve(
        self, image: np.ndarray, text: np.ndarray, stream: Any = None, measure: Measure = cosine
    ) -> Thresholds:
        """Find what is to be found. Raises UserError: too few seeds, no stream, or a purity that no
        threshold reaches.

        Args:
            image, text: (N, D) float32 unit rows of the seeds.
            stream: (S,) alignments of the samples to come; only a purity needs them.
        """
        align, align_rule, estimate = self.min_align, self.min_align_rule, self.estimate
        if (purity := self.purity) is not None:
            if stream is None:
                raise UserError(
                    f"min_align 'auto:{purity:g}' needs the alignments to come: seed(stream=…)"
                )
            found = estimate_stream(image, text, np.asarray(stream, np.float64), measure)
            align = found.threshold(purity)
            estimate = {"purity_aim": purity, **found.at(align)}
            if estimate["right_lost"] > 0.5:
                log.warning(
                    "a purity of %g costs about %.0f %% of the right captions with this encoder",
                    *(purity, 100 * estimate["right_lost"]),
                )
            align_rule += ": the lowest that leaves the stream this pure, estimated from "
            align_rule += f"{estimate['seeds']} seeds and {estimate['samples']} samples"
        elif align is None:
            align = choose_min_align(image, text, measure)
            align_rule += ": best balanced accuracy between the captions of "
            align_rule += f"{len(image)} seeds and swapped ones"
        recaption, rule = self.min_recaption_align, self.min_recaption_align_rule
        if rule == "auto":
            if not len(image):
                raise UserError("min_recaption_align 'auto' needs seeds: there are none")
            recaption = float(np.quantile(measure(image, text), RECAPTION_QUANTILE))
            rule += f": the {RECAPTION_QUANTILE:g} quantile of the alignments of {len(image)} seeds"
        recaption = align if recaption is None else max(recaption, align)
        if self.min_align is None:
            log.info("min_align = %.4f (%s)", align, align_rule)
        if rule != PAPERS_RULE:
            log.info("min_recaption_align = %.4f (%s)", recaption, rule)
        return Thresholds(align, align_rule, recaption, rule, estimate)


def choose_min_align(image: np.ndarray, text: np.ndarray, measure: Measure = cosine) -> float:
    """A threshold from the seeds themselves: what best separates right captions from swapped ones.

    `image` and `text` (N, D) float32 unit rows of a clean seed set. The alignments of the N right
    pairs are set against those of up to 32 N swapped ones (image i with the caption of seed
    i + 1, i + 2, …); the value with the highest balanced accuracy is returned (Youden's rule), the
    middle of the widest gap if several are equally good. Raises UserError if the seeds are too
    few or all alike.
    """
    right, (swapped, _, _) = measure(image, text), _swapped(image, text, measure)
    values = np.unique(np.concatenate([right, swapped]))
    if len(swapped) == 0 or len(values) < 2:
        raise UserError("min_align 'auto' needs two or more seeds with different captions")
    accuracy = (
        1 - np.searchsorted(np.sort(right), values[1:]) / len(right)
        + np.searchsorted(np.sort(swapped), values[1:]) / len(swapped)
    )  # fmt: skip
    gaps = np.where(np.isclose(accuracy, accuracy.max(), rtol=0, atol=1e-12), np.diff(values), -1)
    best = int(gaps.argmax())
    return float((values[best] + values[best + 1]) / 2)


@dataclass(frozen=True)
class StreamEstimate:
    """The share of wrong captions in a stream, and how many are left at each threshold.

    Attributes:
        noise: estimated share of wrong captions in the stream, in [0, 1].
        noise_interval: its 95 % interval, for the numbers of seeds and of samples.
        swapped: (W,) ascending alignments of seeds with swapped captions.
        stream: (S,) ascending alignments of the stream.
        seeds: how many seeds it rests on.
    """

    noise: float
    noise_interval: tuple[float, float]
    swapped: np.ndarray
    stream: np.ndarray
    seeds: int

    def purity(self, thresholds: Any) -> np.ndarray:
        """Share of right captions among what each threshold (T,) keeps; NaN where it keeps none."""
        kept = _share_from(self.stream, thresholds)
        wrong = self.noise * _share_from(self.swapped, thresholds)
        share = np.divide(wrong, kept, out=np.full_like(kept, np.nan), where=kept > 0)
        return np.clip(1 - share, 0, 1)

    def right_lost(self, thresholds: Any) -> np.ndarray:
        """Share of the stream's right captions that each threshold (T,) drops; it never falls as
        the threshold rises."""
        values, lost = self._loss
        at = np.searchsorted(values, np.asarray(thresholds, np.float32), side="left")
        return np.append(lost, 1.0)[at]

    @cached_property
    def _loss(self) -> tuple[np.ndarray, np.ndarray]:
        """All thresholds (T,) at which something more is dropped, ascending, and the loss at each.

        What is kept less the wrong ones kept is a difference of two samples, so it may fall where a
        loss cannot. Sorted, the estimates are monotone and nowhere further from the truth in the
        mean (rearrangement: Chernozhukov, Fernández-Val, Galichon, Biometrika 2009).
        """
        values = np.unique(np.concatenate([self.stream, self.swapped]).astype(np.float32))
        kept = _share_from(self.stream, values)
        if self.noise > 1 - 1e-9:  # nothing right to lose: what is dropped of all
            return values, 1 - kept
        right = kept - self.noise * _share_from(self.swapped, values)
        return values, np.sort(np.clip(1 - right / (1 - self.noise), 0, 1))

    def at(self, threshold: float) -> dict[str, Any]:
        """The estimate in plain numbers, with purity and loss at a threshold."""
        return {
            "noise": self.noise,
            "noise_interval": list(self.noise_interval),
            "purity": float(self.purity(threshold)),
            "right_lost": float(self.right_lost(threshold)),
            "seeds": self.seeds,
            "samples": len(self.stream),
        }

    def threshold(self, purity: float) -> float:
        """The lowest threshold that keeps the stream this pure; -1 if it is already. Raises
        UserError: none does."""
        values = np.unique(self.stream[: len(self.stream) - len(self.stream) // _FEWEST])
        between = np.concatenate([[-1.0], (values[:-1] + values[1:]) / 2])
        clean = np.flatnonzero(self.purity(between) >= purity)
        if len(clean) == 0:
            raise UserError(
                f"no threshold keeps this stream {purity:.1%} pure: {self.noise:.0%} of it seems "
                "wrong; use another encoder, or a lower purity"
            )
        return float(between[clean[0]])


def estimate_stream(
    image: np.ndarray, text: np.ndarray, stream: np.ndarray, measure: Measure = cosine
) -> StreamEstimate:
    """Estimate how many captions of a stream are wrong.

    `image` and `text` (N, D) float32 unit rows of the seeds; `stream` (S,) alignments of the
    stream's samples, without seeds (NaN: unusable, left out).

    The proportion is the nonparametric maximum likelihood over bins of equal mass: the swapped
    seeds give the bins of wrong captions, and those of right captions are found together with the
    proportion from seeds and stream (EM), so that few seeds do not make a biased estimate. The
    interval is that of a jackknife over random groups of seeds and samples (always the same).
    Raises UserError: fewer than 20 seeds, seeds all alike, or an empty stream.
    """
    stream = stream[np.isfinite(stream)].astype(np.float64)
    right = measure(image, text)
    swapped, first, second = _swapped(image, text, measure)
    if len(right) < MIN_SEEDS or len(swapped) < MIN_SEEDS:
        raise UserError(f"a purity needs {MIN_SEEDS} seeds or more, not {len(right)}")
    if len(stream) == 0:
        raise UserError("a purity is estimated on the stream, which holds no usable samples")
    # Inner edges of bins that hold equal parts of an even mixture of right and swapped ones.
    values = np.concatenate([right, swapped])
    weights = np.repeat([0.5 / len(right), 0.5 / len(swapped)], [len(right), len(swapped)])
    order = np.argsort(values, kind="stable")
    mass = np.cumsum(weights[order])
    edges = np.unique(values[order][np.searchsorted(mass, np.arange(1, _BINS) / _BINS)])
    seeds, samples = _left_out("seeds", len(right)), _left_out("stream", len(stream))
    shares = _mixture_proportions(
        _histograms(right, edges, seeds),
        _histograms(swapped, edges, seeds[:, first] & seeds[:, second]),
        _histograms(stream, edges, samples),
    )
    noise, without = float(shares[0]), shares[1:]
    spread = 2.09 * np.sqrt((_GROUPS - 1) / _GROUPS * np.square(without - without.mean()).sum())
    interval = max(0.0, noise - float(spread)), min(1.0, noise + float(spread))
    return StreamEstimate(noise, interval, np.sort(swapped), np.sort(stream), len(right))


def _parsed(name: str, value: float | str) -> tuple[float | None, str]:
    """A threshold as a number, or None and the rule by which it will be found."""
    if value == "auto":
        return None, "auto"
    with suppress(ValueError):
        if not isinstance(value, str):
            if -1 <= value <= 1:
                return float(value), "given"
        elif name == "min_align" and value.startswith("auto:") and 0 < float(value[5:]) < 1:
            return None, f"auto:{float(value[5:]):g}"
    or_purity = ", or 'auto:0.98' (a purity between 0 and 1)" if name == "min_align" else ""
    raise UserError(f"{name} must be a number from -1 to 1, or 'auto'{or_purity}, not {value!r}")


def _swapped(
    image: np.ndarray, text: np.ndarray, measure: Measure
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Alignments (M,) of seeds with the captions of the seeds that follow, and both rows (M,)."""
    rows = np.arange(len(image))
    parts = [(np.empty(0), rows[:0], rows[:0])]
    for shift in range(1, min(len(image), _SWAPS + 1)):
        other = np.roll(text, shift, axis=0)
        differs = (other != text).any(axis=1)  # an equal caption is no wrong one
        parts.append((measure(image, other)[differs], rows[differs], np.roll(rows, shift)[differs]))
    alignment, first, second = (np.concatenate(part) for part in zip(*parts, strict=True))
    return alignment, first, second


def _share_from(ascending: np.ndarray, thresholds: Any) -> np.ndarray:
    """Share of the values that each threshold keeps, compared in float32 as cleaning does."""
    values = ascending.astype(np.float32)
    below = np.searchsorted(values, np.asarray(thresholds, np.float32), side="left")
    return 1 - below / len(values)


def _left_out(name: str, count: int) -> np.ndarray:
    """(1 + groups, count) bool: all, then all but each of the jackknife's random groups, which are
    the same whatever order they came in."""
    group = generator(0, "groups", name).integers(0, _GROUPS, count)
    return np.arange(-1, _GROUPS)[:, None] != group


def _histograms(values: np.ndarray, edges: np.ndarray, parts: np.ndarray) -> np.ndarray:
    """(P, bins) counts of each part of the values; `parts` (P, values) bool."""
    bins = np.searchsorted(edges, values, side="right")
    counts = [np.bincount(bins[part], minlength=len(edges) + 1) for part in parts]
    return np.array(counts, np.float64)


def _mixture_proportions(right: np.ndarray, wrong: np.ndarray, stream: np.ndarray) -> np.ndarray:
    """Share (P,) of wrong ones in each stream; counts (P, bins) of P independent problems."""
    wrong_density = (wrong + 0.5) / (wrong + 0.5).sum(axis=1, keepdims=True)
    right_density = (right + 0.5) / (right + 0.5).sum(axis=1, keepdims=True)
    samples = np.maximum(stream.sum(axis=1, keepdims=True), 1)
    share = np.full((len(stream), 1), 0.5)
    for _ in range(_STEPS):
        wrong_part, right_part = share * wrong_density, (1 - share) * right_density
        is_wrong = wrong_part / np.maximum(wrong_part + right_part, 1e-300)
        before, share = share, (stream * is_wrong).sum(axis=1, keepdims=True) / samples
        right_density = right + stream * (1 - is_wrong)
        right_density /= np.maximum(right_density.sum(axis=1, keepdims=True), 1e-300)
        if np.abs(share - before).max() < 1e-7:
            break
    return share[:, 0]
