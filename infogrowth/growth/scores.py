"""How well a caption fits its image: what cleaning compares with its thresholds.

The paper's measure is the cosine of both features; the normalised cosine and columns of tables that
other programs made (`score`) can take its place.
"""

import hashlib
import os
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from infogrowth.errors import UserError, refusing
from infogrowth.files import atomic_write
from infogrowth.randomness import generator
from infogrowth.rows import row_products, unit_rows

REFERENCE_ROWS = 4096
TEMPERATURE = 0.07
_BLOCK_ROWS = 256
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

    Args:
        paths: parquet files, or folders of them, as `score` writes them.
        column: the score of the samples' own captions; ``recaption_COLUMN`` is that of recaptions.

    Raises:
        UserError: no such file or column.
    """

    def __init__(self, paths: Sequence[str], column: str):
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

    @property
    def has_recaptions(self) -> bool:
        """Whether the tables score recaptions."""
        return bool(self._values[True])

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
        if not 0 < temperature < 10:
            raise UserError(f"the temperature must be above 0 and below 10, not {temperature!r}")
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
    def load(path: str | os.PathLike[str]) -> "NegClip":
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
    features: Any,
    temperature: float = TEMPERATURE,
    rows: int = REFERENCE_ROWS,
    seed: int = 0,
) -> NegClip:
    """A reference of up to ``rows`` pairs drawn from a FeatureStream, the same for the same one.

    Raises:
        UserError: none of them can be used.
    """
    blocks = np.arange(-(-features.rows // _TOGETHER))
    if features.rows > rows:
        number = -(-rows // _TOGETHER)
        blocks = np.sort(generator(seed, "negclip").choice(blocks, number, replace=False))
    starts = (blocks * _TOGETHER).tolist()
    parts = [
        next(features.batches(_TOGETHER, start, min(start + _TOGETHER, features.rows)))
        for start in starts
    ]
    image, image_faults = unit_rows(np.concatenate([part.image for part in parts]))
    text, text_faults = unit_rows(np.concatenate([part.text for part in parts]))
    usable = (image_faults == 0) & (text_faults == 0)
    if not usable.any():
        raise UserError(f"no pair of {features.path} has usable features")
    return NegClip(image[usable][:rows], text[usable][:rows], temperature)


def reference_path(growth: str | os.PathLike[str]) -> Path:
    """Where a growth folder keeps its reference."""
    return Path(growth) / "reference.npz"


def _bytes(image: np.ndarray, text: np.ndarray, row: int) -> bytes:
    return image[row].tobytes() + text[row].tobytes()
