"""The dataset that grows: what was kept, in order; saving, restoring and undoing it."""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal, Self

import numpy as np

from infogrowth.errors import UserError
from infogrowth.growth.decisions import SPACES
from infogrowth.neighbors import INDEX_KINDS, NeighborIndex, create_index
from infogrowth.neighbors.rows import as_matrix, unit_rows

MAX_K = 1000  # searches hold k candidates per sample: more costs time and memory, and tells nothing


class GrownDataset:
    """Kept samples in order of insertion, with their gains, and one neighbor index per space.

    Args:
        k: how many nearest kept samples the gain is the mean distance to.
        min_align: the least cosine of image and caption feature that is kept. "auto" takes the
            value that best tells the seeds' captions from swapped ones (`choose_min_align`), at
            the first call of `seed`.
        index: "exact", "approximate" (CPU, millions of samples) or "auto".
        device: "auto" (a GPU if there is one), "cpu" or "cuda".
        modality: "pair" (image and caption) or "image" (images with class labels as captions).
        memory_mb: bound on the scratch memory of a search, per index.
        sharded: spread the kept features over the ranks; None: if there is more than one. All
            ranks must then make the same calls with the same data.

    Raises UserError for settings that make no sense.
    """

    def __init__(
        self,
        k: int = 4,
        min_align: float | Literal["auto"] = 0.4,
        index: str = "auto",
        device: str = "auto",
        modality: str = "pair",
        memory_mb: float = 256,
        sharded: bool | None = None,
    ) -> None:
        _check_settings(k, min_align, index, modality, memory_mb)
        self.k = k
        self.modality = modality
        self.spaces = SPACES if modality == "pair" else SPACES[:1]
        self.min_align: float | None = None if min_align == "auto" else float(min_align)
        self.min_align_rule = "auto, not yet chosen" if min_align == "auto" else "given"
        self._index_kind = index
        self._device, self._memory_mb, self._sharded = device, memory_mb, sharded
        self._indexes: dict[str, NeighborIndex] = {}
        self._ids: list[str] = []
        self._known: set[str] = set()
        self._captions: list[Any] = []
        self._class_counts: Counter[Any] = Counter()  # kept samples by label, modality "image"
        self._gains = array("d")  # image, text, image, text, …

    def __len__(self) -> int:
        return len(self._ids)

    @property
    def kept_ids(self) -> list[str]:
        """Ids of the kept samples, in order."""
        return list(self._ids)

    @property
    def kept_captions(self) -> list[Any]:
        """Final captions of the kept samples, in order."""
        return list(self._captions)

    @property
    def kept_gains(self) -> np.ndarray:
        """(N, 2) float64 gains (image, text) of the kept samples, as they were when they joined.
        With modality "image" both columns hold the image gain, so that their mean is the gain."""
        return np.array(self._gains, np.float64).reshape(-1, 2)

    def kept_features(self, space: str, start: int = 0) -> np.ndarray:
        """Unit rows of the kept samples from position `start` on, (M, D) float32. When sharded, all
        ranks must call."""
        if space not in self.spaces:
            raise UserError(f"space must be one of {', '.join(self.spaces)}, not {space!r}.")
        if space not in self._indexes:
            return np.empty((0, 0), np.float32)
        return self._indexes[space].rows(start, len(self))

    def annotations(self) -> list[dict[str, Any]]:
        """The grown dataset: {"image", "caption", "gains": [image, text]}, in order."""
        rows = zip(self._ids, self._captions, self.kept_gains.tolist(), strict=True)
        return [{"image": name, "caption": cap, "gains": gains} for name, cap, gains in rows]

    @property
    def settings(self) -> dict[str, Any]:
        """What makes this dataset what it is, ready for JSON; `restore` takes it back."""
        sizes = {space: index.dimension for space, index in self._indexes.items()}
        return {
            "k": self.k,
            "min_align": self.min_align,
            "min_align_rule": self.min_align_rule,
            "modality": self.modality,
            "index": self._index_kind,
            "dimension": {space: sizes.get(space) for space in SPACES},
        }

    @classmethod
    def restore(
        cls,
        settings: Mapping[str, Any],
        ids: Sequence[str],
        captions: Sequence[Any],
        gains: Any,
        image_features: Any,
        text_features: Any = None,
        index: str | None = None,
        device: str = "auto",
        memory_mb: float = 256,
        sharded: bool | None = None,
    ) -> Self:
        """The dataset that `settings`, `kept_ids`, `kept_captions`, `kept_gains` and the two
        `kept_features` describe, as if it had never been put away.

        Features are (N, D) arrays, or lists of such parts in order (memory-mapped ones are fine).
        Raises UserError if the parts do not belong together.
        """
        unresolved = settings["min_align"] is None
        growth = cls(
            k=settings["k"],
            min_align="auto" if unresolved else settings["min_align"],
            index=index or settings.get("index", "auto"),
            device=device,
            modality=settings.get("modality", "pair"),
            memory_mb=memory_mb,
            sharded=sharded,
        )
        if not unresolved:
            growth.min_align_rule = settings.get("min_align_rule", "given")
        features = {"image": image_features, "text": text_features}
        for space in growth.spaces:
            growth._restore_index(space, features[space], len(ids))
        saved_gains = np.asarray(gains, np.float64).reshape(-1, 2)
        if not len(ids) == len(captions) == len(saved_gains) == len(set(ids)):
            raise UserError(
                f"A saved dataset has {len(ids)} ids ({len(set(ids))} different), {len(captions)} "
                f"captions and {len(saved_gains)} gains: they do not belong together."
            )
        growth._ids, growth._captions = list(ids), list(captions)
        growth._known = set(ids)
        if growth.modality == "image":
            growth._class_counts.update(captions)
        growth._gains.frombytes(saved_gains.tobytes())
        return growth

    def _restore_index(self, space: str, features: Any, expected: int) -> None:
        if features is None:
            raise UserError(
                f"A saved dataset of modality {self.modality!r} needs {space} features."
            )
        parts: Sequence[Any] = features if isinstance(features, (list, tuple)) else [features]
        for part in parts:
            if len(part) == 0:
                continue
            rows, trouble = unit_rows(as_matrix(part, f"The saved {space} features"))
            if trouble.any():
                raise UserError(f"The saved {space} features hold rows that are no unit rows.")
            if space not in self._indexes:
                self._indexes[space] = self._new_index(rows.shape[1])
            self._indexes[space].extend(rows)
        held = self._indexes[space].count if space in self._indexes else 0
        if held != expected:
            raise UserError(f"A saved dataset has {expected} ids but {held} {space} features.")

    def _new_index(self, dimension: int) -> NeighborIndex:
        from infogrowth import distributed

        spread = distributed.world_size() > 1 if self._sharded is None else self._sharded
        device = distributed.choose_device(self._device)
        return create_index(self._index_kind, dimension, self.k, device, self._memory_mb, spread)

    @contextmanager
    def _all_or_nothing(self) -> Iterator[None]:
        """Whatever goes wrong inside, the dataset is afterwards as it was before."""
        count, indexes = len(self), dict(self._indexes)
        rule = self.min_align, self.min_align_rule
        try:
            yield
        except BaseException:
            self._indexes = indexes
            for index in indexes.values():
                index.truncate(count)
            self._known.difference_update(self._ids[count:])
            self._class_counts.subtract(self._captions[count:] if self.modality == "image" else [])
            del self._ids[count:], self._captions[count:], self._gains[2 * count :]
            self.min_align, self.min_align_rule = rule
            raise

    def _remember(self, ids: list[str], captions: list[Any], gains: np.ndarray) -> None:
        """Add kept samples, whose rows the indexes already hold; `gains` (M, 2)."""
        self._ids += ids
        self._known.update(ids)
        self._captions += captions
        if self.modality == "image":
            self._class_counts.update(captions)
            gains = gains[:, [0, 0]]
        self._gains.frombytes(np.ascontiguousarray(gains, np.float64).tobytes())


def _check_settings(
    k: int, min_align: float | str, index: str, modality: str, memory_mb: float
) -> None:
    if isinstance(k, bool) or not isinstance(k, int | np.integer) or k < 1:
        raise UserError(f"k must be a whole number of at least 1, not {k!r}.")
    if k > MAX_K:
        raise UserError(f"k must be at most {MAX_K}, not {k!r}: a gain is local.")
    if isinstance(min_align, str):
        if min_align != "auto":
            raise UserError(f"min_align must be a number or 'auto', not {min_align!r}.")
        if modality == "image":
            raise UserError("min_align 'auto' needs captions; give a number for modality 'image'.")
    elif not -1 <= min_align <= 1:  # NaN is refused too
        raise UserError(f"min_align must lie between -1 and 1, not {min_align!r}.")
    if index not in INDEX_KINDS:
        raise UserError(f"index must be one of {', '.join(INDEX_KINDS)}, not {index!r}.")
    if modality not in ("pair", "image"):
        raise UserError(f"modality must be 'pair' or 'image', not {modality!r}.")
    if not memory_mb > 0:
        raise UserError(f"memory_mb must be more than 0, not {memory_mb!r}.")
