"""What is decided about each sample, and why: a batch as columns, one sample as a record.

A batch goes through growth as one :class:`Decisions`: validated here, filled in by cleaning and by
the engine, and written as a table of :data:`SCHEMA`, whose rows pandas reads without this package.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, overload

import numpy as np
import pyarrow as pa

from infogrowth.annotations import SPACES
from infogrowth.errors import UserError
from infogrowth.neighbors import Neighbors
from infogrowth.rows import Trouble, as_matrix, unit_rows


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


_VERDICTS = list(Verdict)
_REASONS = list(Reason)
REASON_CODE: dict[Reason, int] = {reason: code for code, reason in enumerate(_REASONS)}
UNDECIDED = -1  # in place of a reason's code

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
    """N samples as columns, and what was decided about each; indexing builds `Decision` records.

    Attributes:
        ids, captions: of the samples, N each; recaptioned ones have their new caption.
        features: per space (N, D) float32 unit rows, zeros where the feature is unusable; those of
            "text" belong to the final captions.
        reason_codes: (N,) int8, positions in the list of `Reason`; `UNDECIDED` until then.
        dataset_ids: ids of the growing dataset, in which neighbors' positions count.
        original_captions: the captions that the samples came with.
        usable: (N,) bool, both features can be used.
        kept: (N,) bool, the sample joined the dataset.
        recaptioned: (N,) bool, it took its recaption.
        alignment, original_alignment: (N,) float64, NaN where a feature is unusable.
        recaption_alignment: (N,) float64, that of the new caption that was tried, NaN without one.
        captioners: by row, who wrote it.
        recaption_rule: what it had to reach.
        gains: (N, 2) float64: image, text; NaN where there is none.
        neighbors: per space the nearest samples of the dataset before each sample.
    """

    ids: list[str]
    captions: list[Any]
    features: dict[str, np.ndarray]
    reason_codes: np.ndarray
    dataset_ids: list[str] = field(repr=False)

    def __post_init__(self) -> None:
        count = len(self.ids)
        self.original_captions = self.captions
        self.usable = self.reason_codes == UNDECIDED
        self.kept, self.recaptioned = np.zeros(count, bool), np.zeros(count, bool)
        self.alignment, self.original_alignment = np.full(count, np.nan), np.full(count, np.nan)
        self.recaption_alignment = np.full(count, np.nan)
        self.captioners: dict[int, str | None] = {}
        self.recaption_rule: str | None = None
        self.gains = np.full((count, 2), np.nan)
        self.neighbors = {space: no_neighbors(count, 0) for space in SPACES}

    def __len__(self) -> int:
        return len(self.ids)

    @overload
    def __getitem__(self, index: int) -> Decision: ...
    @overload
    def __getitem__(self, index: slice) -> list[Decision]: ...
    def __getitem__(self, index: int | slice) -> Decision | list[Decision]:
        rows = range(len(self))[index]
        return self._record(rows) if isinstance(rows, int) else [self._record(row) for row in rows]

    @property
    def verdicts(self) -> list[Verdict]:
        return [_VERDICTS[code] for code in self._verdict_codes.tolist()]

    @property
    def reasons(self) -> list[Reason]:
        return [_REASONS[code] for code in self.reason_codes.tolist()]

    @property
    def _verdict_codes(self) -> np.ndarray:
        return np.where(self.kept, 1 + self.recaptioned.astype(np.int8), 0)

    def table(self, source: int, source_rows: np.ndarray) -> pa.Table:
        """The columns of :data:`SCHEMA` but ``row``, NaN as null.

        Args:
            source: number of the source among those of the growth folder.
            source_rows: (N,) the samples' rows in its features.
        """
        numbers = {
            "alignment": self.alignment,
            "original_alignment": self.original_alignment,
            "gain_image": self.gains[:, 0],
            "gain_text": self.gains[:, 1],
            "recaption_alignment": self.recaption_alignment,
        }
        caption = pa.array(self.captions, pa.string())
        if self.original_captions is self.captions:
            original_caption = caption
        else:
            original_caption = pa.array(self.original_captions, pa.string())
        rule = [self.recaption_rule if taken else None for taken in self.recaptioned.tolist()]
        columns: dict[str, Any] = {
            "source": pa.array(np.full(len(self), source, np.int32)),
            "source_row": pa.array(source_rows, pa.int64()),
            "id": pa.array(self.ids, pa.string()),
            "verdict": pa.array(_VERDICTS, pa.string()).take(pa.array(self._verdict_codes)),
            "reason": pa.array(_REASONS, pa.string()).take(pa.array(self.reason_codes)),
            **{name: pa.array(values, from_pandas=True) for name, values in numbers.items()},
            "caption": caption,
            "original_caption": original_caption,
            "captioner": pa.array(map(self.captioners.get, range(len(self))), pa.string()),
            "recaption_rule": pa.array(rule, pa.string()),
        }
        for space, found in self.neighbors.items():
            present = found.positions >= 0
            starts = np.zeros(len(self) + 1, np.int32)
            np.cumsum(present.sum(axis=1), out=starts[1:])
            names = [self.dataset_ids[position] for position in found.positions[present].tolist()]
            distances = found.distances[present]
            for name, values in (("neighbors", pa.array(names, pa.string())),
                                 ("distances", pa.array(distances))):  # fmt: skip
                columns[f"{space}_{name}"] = pa.ListArray.from_arrays(pa.array(starts), values)
        return pa.table({name: columns[name] for name in SCHEMA.names[1:]})

    def blocks(self, size: int) -> Iterator[slice]:
        """All rows in order, `size` at a time."""
        for start in range(0, len(self), size):
            yield slice(start, min(start + size, len(self)))

    def _record(self, row: int) -> Decision:
        def number(value: np.float64) -> float | None:
            return None if np.isnan(value) else float(value)

        def nearest(space: str) -> list[tuple[str, float]]:
            found = self.neighbors[space].part(slice(row, row + 1))
            pairs = zip(found.positions[0].tolist(), found.distances[0].tolist(), strict=True)
            return [(self.dataset_ids[at], distance) for at, distance in pairs if at >= 0]

        return Decision(
            id=self.ids[row],
            verdict=_VERDICTS[(1 + self.recaptioned[row]) * self.kept[row]],
            reason=_REASONS[self.reason_codes[row]],
            alignment=number(self.alignment[row]),
            original_alignment=number(self.original_alignment[row]),
            gain_image=number(self.gains[row, 0]),
            gain_text=number(self.gains[row, 1]),
            image_neighbors=nearest("image"),
            text_neighbors=nearest("text"),
            caption=self.captions[row],
            original_caption=self.original_captions[row],
            recaption_alignment=number(self.recaption_alignment[row]),
            captioner=self.captioners.get(row),
            recaption_rule=self.recaption_rule if self.recaptioned[row] else None,
        )


def no_neighbors(count: int, k: int) -> Neighbors:
    """Room for `k` neighbors of `count` samples."""
    return Neighbors(np.full((count, k), -1, np.int64), np.full((count, k), -np.inf))


def validate(
    ids: Any,
    captions: Any,
    features: dict[str, Any],
    dimension: int | None = None,
    dataset_ids: list[str] | None = None,
) -> Decisions:
    """Candidates, checked as a whole before anything changes; their features at unit length.

    Args:
        ids, captions: N each; lists, arrays or columns.
        features: "image", and "text" where there is text: (N, D) of any float type.
        dimension: that of the dataset, None if it has none yet.

    Raises:
        UserError: the arrays do not fit each other or the dataset (the argument is named), or ids
            are not strings.
    """
    names, texts = (v.tolist() if hasattr(v, "tolist") else list(v) for v in (ids, captions))
    odd = next((row for row, name in enumerate(names) if not isinstance(name, str)), None)
    if odd is not None:
        raise UserError(f"Sample ids must be strings; number {odd} is {names[odd]!r}.")
    if len(texts) != len(names):
        raise UserError(f"There are {len(names)} ids but {len(texts)} captions.")
    if features.get("text", ()) is None:
        raise UserError("text_features are missing; images alone need modality='image'.")
    codes = np.full(len(names), UNDECIDED, np.int8)
    rows = {
        space: _validate_features(features[space], space, codes, dimension)
        for space in SPACES
        if space in features
    }
    widths = [unit.shape[1] for unit in rows.values()]
    if len(names) and len(set(widths)) > 1:
        raise UserError(
            "Image features have {} columns but text features {}; both must come from one dual "
            "encoder.".format(*widths)
        )
    return Decisions(names, texts, rows, codes, [] if dataset_ids is None else dataset_ids)


def _validate_features(
    features: Any, space: str, codes: np.ndarray, dimension: int | None
) -> np.ndarray:
    """The features as unit rows; the reason why one is unusable goes into `codes`."""
    if len(codes) == 0 and len(features) == 0:
        return np.empty((0, dimension or 1), np.float32)
    matrix = as_matrix(features, f"{space}_features")
    if len(matrix) != len(codes):
        raise UserError(f"There are {len(codes)} ids but {len(matrix)} rows of {space}_features.")
    if dimension is not None and matrix.shape[1] != dimension:
        raise UserError(
            f"{space}_features have {matrix.shape[1]} columns, but the dataset has {dimension}; "
            "use the encoder that it was begun with."
        )
    rows, problems = unit_rows(matrix)
    for kind in (Trouble.NOT_FINITE, Trouble.ZERO):  # of two unusable features the image's counts
        reason = Reason[f"{space.upper()}_{kind.name}"]
        codes[(problems == kind) & (codes == UNDECIDED)] = REASON_CODE[reason]
    return rows


def one_row(feature: Any) -> Any:
    """The feature of a single sample (D,), of any array type, as one row (1, D); None as None."""
    if feature is None:
        return None
    return feature.reshape(1, -1) if hasattr(feature, "reshape") else [feature]
