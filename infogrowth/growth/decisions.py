"""What the growth engine decided about each sample, and why: as columns, and as one record each."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, overload

import numpy as np

SPACES = ("image", "text")


class Verdict(StrEnum):
    """What became of a sample."""

    KEPT = "kept"
    RECAPTIONED = "recaptioned"
    DROPPED = "dropped"


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


VERDICTS: list[Verdict] = list(Verdict)
REASONS: list[Reason] = list(Reason)
VERDICT_CODE: dict[Verdict, int] = {verdict: code for code, verdict in enumerate(VERDICTS)}
REASON_CODE: dict[Reason, int] = {reason: code for code, reason in enumerate(REASONS)}

_LISTS = ("ids", "captions", "original_captions")
_ARRAYS = (
    *("verdict_codes", "reason_codes", "alignment", "original_alignment", "gains"),
    *("image_positions", "image_distances", "text_positions", "text_distances", "kept_image"),
)


@dataclass(frozen=True)
class Recaption:
    """Another caption for a sample, and the feature (D,) of that caption, of any length."""

    caption: str | None
    text_feature: Any


@dataclass(frozen=True)
class Decision:
    """The record of one sample. Numbers are None where the sample's features are unusable.

    `alignment` is that of the final caption, `original_alignment` that of the caption it came
    with. Neighbors are (id, cosine distance), nearest first, as they were when it was offered.
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


@dataclass(frozen=True)
class DecisionBatch(Sequence[Decision]):
    """Decisions about N samples, as columns; indexing and iterating build `Decision` records.

    NaN in a float column and -1 in a position column mean "absent". Positions count in the kept
    list, whose ids are `kept_ids`. `kept_image` and `kept_text` (M, D) float32 are the unit rows
    of the samples that were kept, in order (`kept_text` is None when there is no text).
    """

    ids: list[str]
    captions: list[Any]
    original_captions: list[Any]
    verdict_codes: np.ndarray
    reason_codes: np.ndarray
    alignment: np.ndarray
    original_alignment: np.ndarray
    gains: np.ndarray
    image_positions: np.ndarray
    image_distances: np.ndarray
    text_positions: np.ndarray
    text_distances: np.ndarray
    kept_image: np.ndarray
    kept_text: np.ndarray | None
    kept_ids: list[str] = field(repr=False)

    def __len__(self) -> int:
        return len(self.ids)

    @overload
    def __getitem__(self, index: int) -> Decision: ...
    @overload
    def __getitem__(self, index: slice) -> list[Decision]: ...
    def __getitem__(self, index: int | slice) -> Decision | list[Decision]:
        if isinstance(index, slice):
            return [self._record(row) for row in range(*index.indices(len(self)))]
        row = index + len(self) if index < 0 else index
        if not 0 <= row < len(self):
            raise IndexError("decision index out of range")
        return self._record(row)

    def __iter__(self) -> Iterator[Decision]:
        return (self._record(row) for row in range(len(self)))

    @property
    def kept(self) -> np.ndarray:
        """(N,) bool: which samples joined the dataset."""
        return self.verdict_codes != VERDICT_CODE[Verdict.DROPPED]

    @property
    def verdicts(self) -> list[str]:
        return [VERDICTS[code].value for code in self.verdict_codes.tolist()]

    @property
    def reasons(self) -> list[str]:
        return [REASONS[code].value for code in self.reason_codes.tolist()]

    def counts(self) -> dict[str, int]:
        """How many samples got each verdict."""
        numbers = np.bincount(self.verdict_codes, minlength=len(VERDICTS)).tolist()
        return {verdict.value: number for verdict, number in zip(VERDICTS, numbers, strict=True)}

    def reason_counts(self) -> dict[str, int]:
        """How many samples got each reason, reasons that occur only."""
        numbers = np.bincount(self.reason_codes, minlength=len(REASONS)).tolist()
        return {r.value: number for r, number in zip(REASONS, numbers, strict=True) if number}

    def neighbor_ids(self, space: str) -> tuple[list[str], np.ndarray]:
        """Ids of all samples' neighbors in `space`, end to end, and the (N + 1,) int32 offsets."""
        positions = self._positions(space)
        present = positions >= 0
        offsets = np.zeros(len(self) + 1, np.int32)
        np.cumsum(present.sum(axis=1), out=offsets[1:])
        kept_ids = self.kept_ids
        return [kept_ids[position] for position in positions[present].tolist()], offsets

    def neighbor_distances(self, space: str) -> tuple[np.ndarray, np.ndarray]:
        """Cosine distances beside `neighbor_ids`: (M,) float64 and the same offsets."""
        present = self._positions(space) >= 0
        offsets = np.zeros(len(self) + 1, np.int32)
        np.cumsum(present.sum(axis=1), out=offsets[1:])
        return self._distances(space)[present], offsets

    @staticmethod
    def empty(k: int, kept_ids: list[str]) -> DecisionBatch:
        """Decisions about no samples."""
        positions, distances = np.empty((0, k), np.int64), np.empty((0, k))
        codes, none, rows = np.empty(0, np.int8), np.empty(0), np.empty((0, 0), np.float32)
        return DecisionBatch(
            *([], [], [], codes, codes, none, none, np.empty((0, 2))),
            *(positions, distances, positions, distances, rows, rows, kept_ids),
        )

    @staticmethod
    def concatenate(batches: Sequence[DecisionBatch]) -> DecisionBatch:
        """One batch out of consecutive ones of the same dataset."""
        first = batches[0]
        if len(batches) == 1:
            return first

        def lists(name: str) -> list[Any]:
            return [item for batch in batches for item in getattr(batch, name)]

        def arrays(name: str) -> np.ndarray:
            return np.concatenate([getattr(batch, name) for batch in batches])

        joined: dict[str, Any] = {name: lists(name) for name in _LISTS}
        joined |= {name: arrays(name) for name in _ARRAYS}
        joined["kept_text"] = None if first.kept_text is None else arrays("kept_text")
        return DecisionBatch(**joined, kept_ids=first.kept_ids)

    def _positions(self, space: str) -> np.ndarray:
        return {"image": self.image_positions, "text": self.text_positions}[space]

    def _distances(self, space: str) -> np.ndarray:
        return {"image": self.image_distances, "text": self.text_distances}[space]

    def _neighbors(self, space: str, row: int) -> list[tuple[str, float]]:
        positions = self._positions(space)[row].tolist()
        distances = self._distances(space)[row].tolist()
        pairs = zip(positions, distances, strict=True)
        return [
            (self.kept_ids[position], distance) for position, distance in pairs if position >= 0
        ]

    def _record(self, row: int) -> Decision:
        return Decision(
            id=self.ids[row],
            verdict=VERDICTS[self.verdict_codes[row]],
            reason=REASONS[self.reason_codes[row]],
            alignment=_number(self.alignment[row]),
            original_alignment=_number(self.original_alignment[row]),
            gain_image=_number(self.gains[row, 0]),
            gain_text=_number(self.gains[row, 1]),
            image_neighbors=self._neighbors("image", row),
            text_neighbors=self._neighbors("text", row),
            caption=self.captions[row],
            original_caption=self.original_captions[row],
        )


def _number(value: np.float64) -> float | None:
    return None if np.isnan(value) else float(value)
