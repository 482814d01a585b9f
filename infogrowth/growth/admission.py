"""The door of the growth engine: what is offered is checked as a whole before anything changes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from infogrowth.errors import UserError
from infogrowth.growth.cleaning import trouble_reasons
from infogrowth.neighbors.rows import as_matrix, unit_rows


@dataclass(frozen=True)
class Offer:
    """N samples, checked: unit rows (N, D) float32 (zeros where the feature is unusable), and
    `trouble` (N,) int8: the reason code of an unusable feature, or -1."""

    ids: list[str]
    captions: list[Any]
    image: np.ndarray
    text: np.ndarray | None
    trouble: np.ndarray

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def usable(self) -> np.ndarray:
        """(N,) bool: both features can be used."""
        return self.trouble < 0

    def parts(self, rows: int) -> Iterator[Offer]:
        """The samples in order, at most `rows` at a time."""
        for start in range(0, len(self), rows):
            yield self.part(slice(start, start + rows))

    def part(self, rows: slice) -> Offer:
        """The samples of a slice."""
        text = None if self.text is None else self.text[rows]
        columns = self.ids[rows], self.captions[rows], self.image[rows]
        return Offer(*columns, text, self.trouble[rows])


def admit(
    ids: Any,
    captions: Any,
    image_features: Any,
    text_features: Any,
    dimension: int | None,
    with_text: bool,
) -> Offer:
    """Check what is offered and bring the features to unit length.

    `dimension` is that of the dataset, None if it has none yet. Raises UserError, naming the
    argument, when the arrays do not fit each other or the dataset, or ids are no strings.
    """
    names = ids.tolist() if hasattr(ids, "tolist") else list(ids)
    for row, name in enumerate(names):
        if type(name) is not str and not isinstance(name, str):
            raise UserError(f"Sample ids must be strings; number {row} is {name!r}.")
    texts = captions.tolist() if hasattr(captions, "tolist") else list(captions)
    if len(texts) != len(names):
        raise UserError(f"There are {len(names)} ids but {len(texts)} captions.")
    if with_text and text_features is None:
        raise UserError("text_features are missing; images alone need modality='image'.")
    image, image_trouble = _admit_features(image_features, "image", len(names), dimension)
    if not with_text:
        return Offer(names, texts, image, None, trouble_reasons(image_trouble, None))
    text, text_trouble = _admit_features(text_features, "text", len(names), dimension)
    if len(names) and image.shape[1] != text.shape[1]:
        raise UserError(
            f"Image features have {image.shape[1]} columns but text features {text.shape[1]}; "
            "both must come from one dual encoder."
        )
    return Offer(names, texts, image, text, trouble_reasons(image_trouble, text_trouble))


def _admit_features(
    features: Any, space: str, expected: int, dimension: int | None
) -> tuple[np.ndarray, np.ndarray]:
    if expected == 0 and len(features) == 0:
        return np.empty((0, dimension or 1), np.float32), np.empty(0, np.int8)
    matrix = as_matrix(features, f"{space}_features")
    if len(matrix) != expected:
        raise UserError(f"There are {expected} ids but {len(matrix)} rows of {space}_features.")
    if dimension is not None and matrix.shape[1] != dimension:
        raise UserError(
            f"{space}_features have {matrix.shape[1]} columns, but the dataset has {dimension}; "
            "use the encoder that it was begun with."
        )
    return unit_rows(matrix)
