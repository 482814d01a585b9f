"""Cleaning: does a caption belong to its image, and if not, is there one that does?

Paper: "Dataset Growth" (InfoGrowth), cleaning; spec §2 "Clean". Its measure of how well a caption
fits is the cosine of both features; the normalised cosine and columns of tables that other programs
made (`score`) can take its place.
"""

from __future__ import annotations

import hashlib
import os
import zipfile
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from infogrowth.errors import UserError, refusing
from infogrowth.files import atomic_write
from infogrowth.growth.decisions import Decisions, Reason, Recaption, one_row
from infogrowth.randomness import generator
from infogrowth.rows import Problem, as_matrix, row_products, unit_pairs, unit_rows

LABEL_BLOCK_ROWS = 512  # samples looked up together; within the block pairs are compared directly
_ROUNDING = 1e-9  # far above what a float64 matrix product of unit rows can be off
REFERENCE_ROWS = 4096
TEMPERATURE = 0.07
_BLOCK_ROWS = 256
_ALIGNED_ROWS, _ALIGNED_BLOCKS = 16_384, 64  # about a million say enough about a stream
_TOGETHER = 16  # rows of the reference that are neighbors in the features: fewer reads


class Measure:
    """Scores of N pairs by their unit rows or their ids; this one is the paper's, the cosine.

    Attributes:
        about: how growth.json names the measure; the paper's it does not name.
    """

    about: dict[str, Any] | None = None

    def __call__(
        self, image: np.ndarray, text: np.ndarray, ids: Sequence[str] = (), recaptions: bool = False
    ) -> np.ndarray:
        """(N,) float64, NaN where unknown.

        Args:
            image, text: (N, D) float32 unit rows.
            ids: of the samples, where scores were made elsewhere.
            recaptions: the texts are new captions.
        """
        return row_products(image, text)


cosine = Measure()


class ScoreColumn(Measure):
    """A measure made elsewhere: columns of score tables by id, NaN for ids that they do not have.
    Raises UserError: no such file or column.

    Args:
        paths: parquet files, or folders of them, as `score` writes them.
        column: the score of the samples' own captions; ``recaption_COLUMN`` is that of recaptions.
        recaptions: whether that one is needed too.
    """

    def __init__(self, paths: Sequence[str], column: str, recaptions: bool = False):
        self.about = {"score": column}
        self._columns = {False: column, True: f"recaption_{column}"}
        self._values: dict[bool, dict[str, float]] = {False: {}, True: {}}
        for file in [f for p in map(Path, paths) for f in (sorted(p.glob("*.parquet")) or [p])]:
            with refusing(file, "the score table", pa.ArrowException):
                table = pq.read_table(file)
            for is_recaption, name in self._columns.items():
                if {"id", column, name} <= set(table.column_names):
                    values = table[name].cast(pa.float64()).to_numpy().tolist()
                    ids = table["id"].to_pylist()
                    self._values[is_recaption].update(zip(ids, values, strict=True))
        if not self._values[False]:
            raise UserError(f"no file of --scores has columns id and {column}")
        if recaptions and not self._values[True]:
            raise UserError(f"--recaptions needs a column recaption_{column} in --scores")

    def __call__(
        self, image: np.ndarray, text: np.ndarray, ids: Sequence[str] = (), recaptions: bool = False
    ) -> np.ndarray:
        values = self._values[recaptions]
        return np.array([values.get(name, np.nan) for name in ids], np.float64)


class NegClip(Measure):
    """The negated CLIP loss of each pair (Wang et al., arXiv 2405.19547): its cosine, less what the
    image would give to other captions and the caption to other images,

        cos(x, y) − τ/2 · (log Σ_b exp(cos(x, y_b)/τ) + log Σ_b exp(cos(x_b, y)/τ)).

    There the sums go over the pair itself and the rest of a random batch, averaged over batches.
    Here the rest is one fixed reference set of R pairs, drawn once from the features with a seed:
    a pair's score depends on itself and the reference alone, never on batches, order or ranks. A
    pair that is in the reference is no other one to itself.

    Args:
        image, text: (R, D) float32 unit rows of the reference.
        temperature: τ; CLIP ends its training at 0.01, BLIP begins at 0.07.
    """

    def __init__(self, image: np.ndarray, text: np.ndarray, temperature: float = TEMPERATURE):
        self.image, self.text, self.temperature = image, text, float(temperature)
        self._pairs = {_bytes(image, text, row): row for row in range(len(image))}
        # In double precision, and rounded to single in the end: the bits are the same whatever
        # the number of rows that a matrix product is asked for at once.
        self._image, self._text = image.T.astype(np.float64), text.T.astype(np.float64)
        self.about = {
            "score": "negclip",
            "temperature": self.temperature,
            "reference": self.digest(),
        }

    def __call__(
        self, image: np.ndarray, text: np.ndarray, ids: Sequence[str] = (), recaptions: bool = False
    ) -> np.ndarray:
        cosines = row_products(image, text)
        own = cosines / self.temperature
        sums = np.empty((2, len(image)))
        for start in range(0, len(image), _BLOCK_ROWS):
            rows = slice(start, min(start + _BLOCK_ROWS, len(image)))
            itself = [self._pairs.get(_bytes(image, text, r), -1) for r in range(start, rows.stop)]
            sums[0, rows] = self._others(image[rows], self._text, itself)
            sums[1, rows] = self._others(text[rows], self._image, itself)
        losses = np.logaddexp(sums, own).sum(axis=0)
        return (cosines - self.temperature / 2 * losses).astype(np.float32).astype(np.float64)

    def digest(self) -> str:
        """A fingerprint of the reference and the temperature."""
        content = (self.image.tobytes(), self.text.tobytes(), repr(self.temperature).encode())
        return hashlib.blake2b(b"".join(content), digest_size=8).hexdigest()

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the reference as .npz, whole or not at all."""
        with atomic_write(path) as file:
            np.savez(file, image=self.image, text=self.text, temperature=self.temperature)

    @staticmethod
    def load(path: str | os.PathLike[str]) -> NegClip:
        """What :meth:`save` wrote; UserError when it is missing or damaged."""
        faults = (ValueError, KeyError, EOFError, zipfile.BadZipFile)
        with refusing(path, "the reference of negclip", *faults), np.load(path) as held:
            return NegClip(held["image"], held["text"], float(held["temperature"]))

    def _others(self, rows: np.ndarray, reference: np.ndarray, itself: list[int]) -> np.ndarray:
        """log Σ exp(cosine / τ) over the reference, but for the pair itself."""
        logits = (rows.astype(np.float64) @ reference) / self.temperature
        known = np.flatnonzero(np.array(itself) >= 0)
        logits[known, np.array(itself)[known]] = -np.inf
        largest = logits.max(axis=1, initial=-np.inf)
        largest[~np.isfinite(largest)] = 0.0
        with np.errstate(divide="ignore"):
            return largest + np.log(np.exp(logits - largest[:, None]).sum(axis=1))


def draw_reference(
    features: Any, temperature: float = TEMPERATURE, rows: int = REFERENCE_ROWS, seed: int = 0
) -> NegClip:
    """A reference of up to ``rows`` pairs drawn from a FeatureStream, the same for the same one.
    Raises UserError: none of them can be used."""
    blocks = np.arange(-(-features.rows // _TOGETHER))
    if features.rows > rows:
        number = -(-rows // _TOGETHER)
        blocks = np.sort(generator(seed, "negclip").choice(blocks, number, replace=False))
    read = _read_blocks(features, _TOGETHER, blocks)
    parts = [(image[usable], text[usable]) for _, image, text, usable in read]
    image, text = (np.concatenate(part)[:rows] for part in zip(*parts, strict=True))
    if not len(image):
        raise UserError(f"no pair of {features.path} has usable features")
    return NegClip(image, text, temperature)


def stream_alignments(
    features: Any, seed_ids: Collection[str] = (), measure: Measure = cosine
) -> np.ndarray:
    """Alignments of a FeatureStream's samples, without seeds, on which its purity is estimated.

    Of more than a million rows evenly spaced blocks are read: a choice that depends on nothing
    but the number of rows, and sees the beginning of the stream as well as its end.
    """
    blocks = -(-features.rows // _ALIGNED_ROWS)
    chosen = np.unique(np.linspace(0, blocks - 1, min(blocks, _ALIGNED_BLOCKS)).round().astype(int))
    parts = [np.empty(0)]
    for batch, image, text, usable in _read_blocks(features, _ALIGNED_ROWS, chosen):
        usable &= np.fromiter((name not in seed_ids for name in batch.ids), bool, len(batch))
        parts.append(measure(image, text)[usable])
    return np.concatenate(parts)


def _read_blocks(
    features: Any, size: int, blocks: np.ndarray
) -> Iterator[tuple[Any, np.ndarray, np.ndarray, np.ndarray]]:
    """These blocks of `size` rows of a FeatureStream: the samples, and what unit_pairs gives."""
    for start in (blocks * size).tolist():
        for batch in features.batches(size, start, min(start + size, features.rows)):
            yield batch, *unit_pairs(batch.image, batch.text)


def reference_path(growth: str | os.PathLike[str]) -> Path:
    """Where a growth folder keeps its reference."""
    return Path(growth) / "reference.npz"


def _bytes(image: np.ndarray, text: np.ndarray, row: int) -> bytes:
    return image[row].tobytes() + text[row].tobytes()


# --- image–caption pairs ------------------------------------------------------------------------


def is_below(alignment: np.ndarray, min_align: float) -> np.ndarray:
    """Which alignments fall short. Compared as float32, so 0.4 meets 0.4; NaN never falls short."""
    return alignment.astype(np.float32) < np.float32(min_align)


def clean_pairs(
    batch: Decisions,
    min_align: float,
    recaptions: Mapping[str, Recaption] | None,
    min_recaption_align: float,
    measure: Measure = cosine,
) -> np.ndarray:
    """Clean N image–caption pairs; returns which of them pass, (N,) bool.

    A sample under `min_align` takes its recaption if that reaches `min_recaption_align`; a sample
    that aligns is never recaptioned, and an alignment equal to its threshold passes. Alignments,
    reasons, captioners and new captions with their features are entered in `batch`. `measure` says
    how well captions fit; where it cannot (NaN) a sample does not pass, unless all do (seeds).
    """
    image, text = batch.features["image"], batch.features["text"]
    alignment = measure(image, text, batch.ids)
    alignment[~batch.usable] = np.nan
    unknown = batch.usable & np.isnan(alignment) & (min_align > -np.inf)
    low = is_below(alignment, min_align)
    batch.original_alignment, batch.alignment = alignment, alignment.copy()
    batch.reason[batch.usable & ~low] = Reason.ALIGNED
    batch.reason[low] = Reason.LOW_ALIGNMENT
    batch.reason[unknown] = Reason.SCORE_MISSING
    if recaptions:
        _recaption(batch, np.flatnonzero(low), min_recaption_align, recaptions, measure)
    return batch.usable & ~unknown & (~low | batch.recaptioned)


def _recaption(
    batch: Decisions,
    low_rows: np.ndarray,
    min_recaption_align: float,
    recaptions: Mapping[str, Recaption],
    measure: Measure,
) -> None:
    """Give the samples `low_rows` their recaptions where these align well enough."""
    image, tried = batch.features["image"], {}
    for row in low_rows.tolist():
        recaption = recaptions.get(batch.ids[row])
        if recaption is None:
            continue
        feature, batch.reason[row] = _recaption_feature(recaption, image.shape[1], batch.ids[row])
        batch.captioner[row] = recaption.captioner
        if feature is not None:
            tried[row] = recaption.caption, feature
    if not tried:
        return
    rows, ids = np.array(list(tried)), [batch.ids[row] for row in tried]
    features = np.concatenate([feature for _, feature in tried.values()])
    alignment = measure(image[rows], features, ids, recaptions=True)
    batch.recaption_alignment[rows] = alignment
    fits = alignment.astype(np.float32) >= np.float32(min_recaption_align)
    taken = rows[fits]
    batch.captions = list(batch.captions)
    for row in taken.tolist():
        batch.captions[row] = tried[row][0]
    batch.features["text"][taken] = features[fits]
    batch.alignment[taken] = alignment[fits]
    batch.recaptioned[taken] = True
    batch.reason[taken] = Reason.RECAPTIONED


def _recaption_feature(
    recaption: Recaption, dimension: int, sample_id: str
) -> tuple[np.ndarray | None, Reason]:
    """The recaption's unit row (1, D), or None and why there is none."""
    if not recaption.caption:
        return None, Reason.RECAPTION_WITHOUT_CAPTION
    if recaption.text_feature is None:
        return None, Reason.RECAPTION_WITHOUT_FEATURE
    what = f"The recaption feature of sample {sample_id!r}"
    matrix = as_matrix(one_row(recaption.text_feature), what)
    if matrix.shape[1] != dimension:
        return None, Reason.RECAPTION_MISFIT
    unit, problem = unit_rows(matrix)
    if problem[0] == Problem.NONE:
        return unit, Reason.LOW_RECAPTION
    return None, Reason[f"RECAPTION_{Problem(int(problem[0])).name}"]


# --- single-modal data: class labels in place of captions ------------------------------------


def clean_labels(
    batch: Decisions,
    rows: slice,
    min_align: float,
    passed: Reason,
    kept_labels: Sequence[Any],
    class_counts: Mapping[Any, int],
    known_ids: Collection[str],
) -> np.ndarray:
    """Which of the n samples `rows` of `batch` join the dataset, (n,) bool.

    The paper's second setting: features of images only, with a class label as the caption. The
    alignment of a sample is here the share of its nearest kept neighbors that carry its label, out
    of as many as could: min(k, kept samples of that class). The first sample of a class cannot
    disagree with anything and has alignment 1.

    `batch.neighbors` holds the nearest samples from before the block; those that join within the
    block are looked at one by one, as whether a sample joins depends on which ones did before it.
    Final neighbors, alignments and reasons are entered in `batch`. `kept_labels`, `class_counts`
    and `known_ids` are those of the dataset.
    """
    ids, labels, usable = batch.ids[rows], batch.captions[rows], batch.usable[rows]
    found, reasons = batch.neighbors["image"].part(rows), batch.reason[rows]
    count, k = len(kept_labels), found.positions.shape[1]
    near = _near_pairs(batch.features["image"][rows], usable, found.products[:, -1])
    alignment = np.full(len(ids), np.nan)
    counts, joined, joined_ids = Counter(class_counts), np.empty(0, np.int64), set[str]()
    for row, (sample, label) in enumerate(zip(ids, labels, strict=True)):
        if usable[row]:
            within = np.flatnonzero(near[row, joined] > -np.inf)
            positions = np.concatenate([found.positions[row], count + within])
            products = np.concatenate([found.products[row], near[row, joined[within]]])
            order = np.lexsort((positions, -products))[:k]
            found.positions[row], found.products[row] = positions[order], products[order]
            nearest = [
                kept_labels[at] if at < count else labels[joined[at - count]]
                for at in positions[order].tolist() if at >= 0
            ]  # fmt: skip
            possible = min(counts[label], k)
            alignment[row] = nearest.count(label) / possible if possible else 1.0
        aligned = bool(usable[row] and not is_below(alignment[row], min_align))
        if sample in known_ids or sample in joined_ids:
            reasons[row] = Reason.DUPLICATE_ID
        elif aligned:
            reasons[row] = passed
            joined = np.append(joined, row)
            joined_ids.add(sample)
            counts[label] += 1
        elif usable[row]:
            reasons[row] = Reason.LABEL_DISAGREES
    batch.alignment[rows] = batch.original_alignment[rows] = alignment
    joins = np.zeros(len(ids), bool)
    joins[joined] = True
    return joins


def _near_pairs(rows: np.ndarray, usable: np.ndarray, to_beat: np.ndarray) -> np.ndarray:
    """Cosines (n, n) of each row with the earlier ones; -inf where they cannot be among the
    nearest, as they do not reach `to_beat` (n,): few are computed in full precision."""
    wide = rows.astype(np.float64)
    reachable = wide @ wide.T >= to_beat[:, None] - _ROUNDING
    reachable &= np.tri(len(rows), k=-1, dtype=bool) & usable & usable[:, None]
    later, earlier = np.nonzero(reachable)
    cosines = np.full(reachable.shape, -np.inf)
    cosines[later, earlier] = row_products(rows[later], rows[earlier])
    return cosines
