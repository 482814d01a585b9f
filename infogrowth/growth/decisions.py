"""What is decided about each sample, and why: a batch as columns, one sample as a record.

A batch goes through growth as one :class:`Decisions`: validated here, filled in by cleaning and by
the engine, and written as a table of :data:`SCHEMA`, whose rows pandas reads without this package.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa

from infogrowth.annotations import SPACES
from infogrowth.errors import UserError
from infogrowth.rows import Problem, as_matrix, unit_rows


class Verdict(StrEnum):
    """What became of a sample."""

    DROPPED = "dropped"
    KEPT = "kept"
    RECAPTIONED = "recaptioned"


class Reason(StrEnum):
    """Why. The vocabulary is fixed: reports and scripts count these sentences."""

    SEED = "seed"
    ALIGNED = "aligned"
    RECAPTIONED = "recaptioned"
    LABEL_AGREES = "label agrees with its neighbors"
    LOW_ALIGNMENT = "alignment below min_align"
    LOW_RECAPTION = "alignment and recaption below min_align"
    RECAPTION_WITHOUT_CAPTION = "alignment below min_align, recaption has no caption"
    RECAPTION_WITHOUT_FEATURE = "alignment below min_align, recaption has no text feature"
    RECAPTION_MISFIT = "alignment below min_align, recaption feature has another dimension"
    RECAPTION_NOT_FINITE = "alignment below min_align, recaption feature is not finite"
    RECAPTION_ZERO = "alignment below min_align, recaption feature is zero"
    LABEL_DISAGREES = "label disagrees with its neighbors"
    IMAGE_NOT_FINITE = "image feature is not finite"
    IMAGE_ZERO = "image feature is zero"
    TEXT_NOT_FINITE = "text feature is not finite"
    TEXT_ZERO = "text feature is zero"
    DUPLICATE_ID = "id is already in the dataset"
    ID_MISSING = "id is missing"
    CAPTION_MISSING = "caption is missing"
    SCORE_MISSING = "score is missing"


SCHEMA = pa.schema(
    [
        ("row", pa.int64()),  # running number of the decision in the growth folder
        ("source", pa.int32()),  # which of the manifest's sources the sample came from
        ("source_row", pa.int64()),  # its row in the features of that source
        ("id", pa.string()),
        ("verdict", pa.string()),
        ("reason", pa.string()),
        ("alignment", pa.float64()),
        ("original_alignment", pa.float64()),
        ("gain_image", pa.float64()),
        ("gain_text", pa.float64()),
        ("image_neighbors", pa.list_(pa.string())),  # nearest first
        ("image_distances", pa.list_(pa.float64())),
        ("text_neighbors", pa.list_(pa.string())),
        ("text_distances", pa.list_(pa.float64())),
        ("caption", pa.string()),
        ("original_caption", pa.string()),
        ("recaption_alignment", pa.float64()),  # of the new caption that was tried, taken or not
        ("captioner", pa.string()),  # who wrote it
        ("recaption_rule", pa.string()),  # what a new caption had to reach, where it was taken
    ]
)


@dataclass(frozen=True)
class Recaption:
    """Another caption for a sample, the feature (D,) of that caption, of any length, and who wrote
    it, for the record."""

    caption: str | None
    text_feature: Any
    captioner: str | None = None


@dataclass(frozen=True)
class Decision:
    """The record of one sample. Numbers are None where the sample's features are unusable.

    `alignment` is that of the final caption, `original_alignment` that of the caption it came
    with. Neighbors are (id, cosine distance), nearest first, as they were before it was decided.
    Where a new caption was tried, its alignment and its captioner are recorded, and if it was taken
    what it had to reach.
    """

    id: str
    verdict: Verdict
    reason: Reason
    alignment: float | None
    original_alignment: float | None
    gain_image: float | None
    gain_text: float | None
    image_neighbors: list[tuple[str, float]]
    text_neighbors: list[tuple[str, float]]
    caption: Any
    original_caption: Any
    recaption_alignment: float | None = None
    captioner: str | None = None
    recaption_rule: str | None = None


@dataclass
class Decisions(Sequence[Decision]):
    """N samples as columns, and what was decided about each; indexing gives `Decision` records.

    Attributes:
        ids, captions: of the samples, N each; recaptioned ones have their new caption.
        features: per space (N, D) float32 unit rows, zeros where the feature is unusable; those of
            "text" belong to the final captions.
        reason: (N,) object: a `Reason` each, None until it is decided.
        dataset_ids: ids of the growing dataset, in which neighbors' positions count.
        original_captions: the captions that the samples came with.
        usable: (N,) bool, both features can be used.
        kept: (N,) bool, the sample joined the dataset.
        recaptioned: (N,) bool, it took its recaption.
        alignment, original_alignment: (N,) float64, NaN where a feature is unusable.
        recaption_alignment: (N,) float64, that of the new caption that was tried, NaN without one.
        captioner: (N,) object, who wrote it.
        recaption_rule: what it had to reach.
        gains: (N, 2) float64: image, text; NaN where there is none.
        neighbors: per space the nearest samples of the dataset before each sample.
    """

    ids: list[str]
    captions: list[Any]
    features: dict[str, np.ndarray]
    reason: np.ndarray
    dataset_ids: list[str] = field(repr=False)

    def __post_init__(self) -> None:
        from infogrowth.neighbors.base import no_neighbors  # torch comes with it: slow to import

        count = len(self.ids)
        self.original_captions = self.captions
        self.usable = np.array([reason is None for reason in self.reason], bool)
        self.kept, self.recaptioned = np.zeros((2, count), bool)
        self.alignment, self.original_alignment = np.full((2, count), np.nan)
        self.recaption_alignment = np.full(count, np.nan)
        self.captioner = np.full(count, None)
        self.recaption_rule: str | None = None
        self.gains = np.full((count, 2), np.nan)
        self.neighbors = {space: no_neighbors(count, 0) for space in SPACES}

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int | slice) -> Any:
        return self._records[index]

    @property
    def verdicts(self) -> list[Verdict]:
        return np.array(list(Verdict), object)[self.kept * (1 + self.recaptioned)].tolist()

    def table(self, source: int, source_rows: np.ndarray) -> pa.Table:
        """The columns of :data:`SCHEMA` but ``row``, NaN as null.

        Args:
            source: number of the source among those of the growth folder.
            source_rows: (N,) the samples' rows in its features.
        """
        columns = self._columns | {"source": np.full(len(self), source), "source_row": source_rows}
        for space, found in self.neighbors.items():
            present = found.positions >= 0
            ends = pa.array(np.r_[0, present.sum(axis=1).cumsum()], pa.int32())
            names = [self.dataset_ids[position] for position in found.positions[present].tolist()]
            for name, values in (("neighbors", pa.array(names, pa.string())),
                                 ("distances", pa.array(found.distances[present]))):  # fmt: skip
                columns[f"{space}_{name}"] = pa.ListArray.from_arrays(ends, values)
        arrays = {
            field.name: pa.array(columns[field.name], field.type, from_pandas=True)
            for field in list(SCHEMA)[1:]
        }
        return pa.table(arrays)

    def blocks(self, size: int) -> Iterator[slice]:
        """All rows in order, `size` at a time."""
        for start in range(0, len(self), size):
            yield slice(start, min(start + size, len(self)))

    @property
    def _columns(self) -> dict[str, Any]:
        """What a record holds, but for the neighbors: N values each, NaN where unknown."""
        rule: Any = self.recaption_rule
        return {
            "id": self.ids,
            "verdict": self.verdicts,
            "reason": self.reason,
            "alignment": self.alignment,
            "original_alignment": self.original_alignment,
            "gain_image": self.gains[:, 0],
            "gain_text": self.gains[:, 1],
            "caption": self.captions,
            "original_caption": self.original_captions,
            "recaption_alignment": self.recaption_alignment,
            "captioner": self.captioner,
            "recaption_rule": np.where(self.recaptioned, rule, None),
        }

    @cached_property
    def _records(self) -> list[Decision]:
        columns = {
            name: [None if v != v else v for v in values.tolist()]
            if isinstance(values, np.ndarray) else values
            for name, values in self._columns.items()
        }  # fmt: skip
        for space, found in self.neighbors.items():
            columns[f"{space}_neighbors"] = [
                [(self.dataset_ids[at], distance) for at, distance in pairs if at >= 0]
                for pairs in map(zip, found.positions.tolist(), found.distances.tolist())
            ]
        rows = zip(*columns.values(), strict=True)
        return [Decision(**dict(zip(columns, row, strict=True))) for row in rows]


def validate(
    ids: Any,
    captions: Any,
    features: dict[str, Any],
    dimension: int | None = None,
    dataset_ids: list[str] | None = None,
) -> Decisions:
    """Candidates, checked as a whole before anything changes; their features at unit length. Raises
    UserError: the arrays do not fit each other or the dataset (the argument is named), or ids are
    not strings.

    Args:
        ids, captions: N each; lists, arrays or columns.
        features: "image", and "text" where there is text: (N, D) of any float type.
        dimension: that of the dataset, None if it has none yet.
    """
    names, texts = (v.tolist() if hasattr(v, "tolist") else list(v) for v in (ids, captions))
    for row, name in enumerate(names):
        if not isinstance(name, str):
            raise UserError(f"Sample ids must be strings; number {row} is {name!r}.")
    if len(texts) != len(names):
        raise UserError(f"There are {len(names)} ids but {len(texts)} captions.")
    if features.get("text", ()) is None:
        raise UserError("text_features are missing; images alone need modality='image'.")
    reason, rows = np.full(len(names), None), {}
    for space, given in features.items():
        if len(names) == 0 and len(given) == 0:
            rows[space] = np.empty((0, dimension or 1), np.float32)
            continue
        matrix = as_matrix(given, f"{space}_features")
        if len(matrix) != len(names):
            raise UserError(f"{len(names)} ids, but {len(matrix)} rows of {space}_features.")
        if dimension is not None and matrix.shape[1] != dimension:
            raise UserError(
                f"{space}_features have {matrix.shape[1]} columns, but the dataset has "
                f"{dimension}; use the encoder that it was begun with."
            )
        rows[space], problems = unit_rows(matrix)
        for row in np.flatnonzero(problems).tolist():
            if reason[row] is None:  # of two unusable features the image's counts
                reason[row] = Reason[f"{space.upper()}_{Problem(problems[row]).name}"]
    widths = [unit.shape[1] for unit in rows.values()]
    if len(names) and len(set(widths)) > 1:
        raise UserError(f"Image and text features have {widths} columns: use one dual encoder.")
    return Decisions(names, texts, rows, reason, [] if dataset_ids is None else dataset_ids)


def one_row(feature: Any) -> Any:
    """The feature of a single sample (D,), of any array type, as one row (1, D); None as None."""
    if feature is None:
        return None
    return feature.reshape(1, -1) if hasattr(feature, "reshape") else [feature]
