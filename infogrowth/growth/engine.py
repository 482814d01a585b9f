"""InfoGrowth: clean → gain → grow, one sample or millions at a time.

Paper: "Dataset Growth" (InfoGrowth), ECCV 2024; spec §2. Order is the contract: whatever the
batch size, device, number of ranks or interruptions, the result is that of processing the samples
one by one.
"""

from __future__ import annotations

import logging
from array import array
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any, Self

import numpy as np

from infogrowth.annotations import SPACES, Annotation
from infogrowth.errors import UserError
from infogrowth.growth.cleaning import LABEL_BLOCK_ROWS, Measure, clean_labels, clean_pairs, cosine
from infogrowth.growth.decisions import Decisions, Reason, Recaption, one_row, validate
from infogrowth.growth.thresholds import DEFAULT_MIN_ALIGN, Thresholds
from infogrowth.neighbors import INDEX_KINDS, NeighborIndex, create_index
from infogrowth.neighbors.base import no_neighbors
from infogrowth.neighbors.scan import side_by_side
from infogrowth.rows import as_matrix, unit_rows

__all__ = ["InfoGrowth", "Recaption"]

log = logging.getLogger(__name__)

BLOCK_ROWS = 32768  # samples looked up together
FEW = 1024  # samples that are looked up sooner than threads have begun
MAX_K = 1000  # searches hold k candidates per sample: more costs time and memory, for no insight


class InfoGrowth:
    """A dataset that grows: samples come in order, and each is kept or not, with its gain.

    Args:
        k: how many nearest kept samples the gain is the mean distance to.
        min_align: the lowest cosine of image and caption feature that is kept. "auto" takes the
            value that best separates the seeds' captions from swapped ones, "auto:0.98" the lowest
            that leaves the stream 98 % pure; both are found at the first call of `seed`.
        index: "exact", "approximate" (for millions of samples) or "auto".
        device: "auto" (a GPU if there is one), "cpu" or "cuda".
        modality: "pair" (image and caption) or "image" (images with class labels as captions).
        memory_mb: bound on the scratch memory of a search, per index.
        sharded: spread the kept features over the ranks of the process group; None: if there is one
            of several ranks. All ranks must then make the same calls with the same data.
        min_recaption_align: what a new caption must reach: a number, "auto" (the 0.75 quantile of
            the seeds' own alignments), or None, the paper's rule: `min_align`.

    Raises UserError for settings that make no sense. A call that fails changes nothing.
    """

    def __init__(
        self,
        k: int = 4,
        min_align: float | str = DEFAULT_MIN_ALIGN,
        index: str = "auto",
        device: str = "auto",
        modality: str = "pair",
        memory_mb: float = 256,
        sharded: bool | None = None,
        min_recaption_align: float | str | None = None,
    ) -> None:
        self.thresholds = Thresholds.requested(min_align, min_recaption_align)
        if isinstance(k, bool) or not isinstance(k, int | np.integer) or not 1 <= k <= MAX_K:
            raise UserError(
                f"k must be a whole number from 1 to {MAX_K}, not {k!r}: a gain is local."
            )
        if modality == "image" and not self.thresholds.resolved:
            raise UserError("min_align 'auto' needs captions; give a number for modality 'image'.")
        if index not in INDEX_KINDS or modality not in ("pair", "image") or not memory_mb > 0:
            raise UserError(
                f"index must be one of {', '.join(INDEX_KINDS)}, modality pair or image and "
                f"memory_mb more than 0, not {index!r}, {modality!r} and {memory_mb!r}."
            )
        self.k = k
        self.modality = modality
        self.spaces = SPACES if modality == "pair" else SPACES[:1]
        # What captions are judged by, seeds and all: others may be set before the first sample.
        self.measure: Measure = cosine
        self._index_kind = index
        self._device, self._memory_mb, self._sharded = device, memory_mb, sharded
        self._indexes: dict[str, NeighborIndex] = {}
        self._search: dict[str, Any] = {}  # what a restored dataset's indexes reported
        self._ids: list[str] = []
        self._known: set[str] = set()
        self._captions: list[Any] = []
        self._class_counts: Counter[Any] = Counter()  # kept samples by label, modality "image"
        self._gains = array("d")  # image, text, image, text, …

    def __len__(self) -> int:
        return len(self._ids)

    def seed(
        self,
        ids: Any,
        captions: Any,
        image_features: Any,
        text_features: Any = None,
        stream: Any = None,
    ) -> Decisions:
        """Insert a clean starting set, in order and unfiltered (unusable features and repeated ids
        excepted). Features (N, D), any float type, need not be unit length. `stream` (S,) are the
        alignments of the samples to come, or of a fair part of them; a purity is estimated there.
        """
        batch = self._validate(ids, captions, image_features, text_features)
        with self._all_or_nothing():
            if not self.thresholds.resolved:
                image, text = (batch.features[space][batch.usable] for space in SPACES)
                self.thresholds = self.thresholds.resolve(image, text, stream, self.measure)
            return self._grow(batch, -np.inf, None, Reason.SEED)

    def process(
        self,
        ids: Any,
        captions: Any,
        image_features: Any,
        text_features: Any = None,
        recaptions: Mapping[str, Recaption] | None = None,
    ) -> Any:
        """Decide about samples, in order; returns `Decisions`, or one `Decision` for a single
        sample (a plain string as `ids`, features (D,)). `recaptions` is asked for samples under
        `min_align` only."""
        single = isinstance(ids, str)
        if single:
            ids, captions = [ids], [captions]
            image_features, text_features = one_row(image_features), one_row(text_features)
        batch = self._validate(ids, captions, image_features, text_features)
        min_align = self.thresholds.min_align
        if min_align is None or not self.thresholds.resolved:
            name = "min_align" if min_align is None else "min_recaption_align"
            raise UserError(
                f"{name} auto is found from a clean starting set: call seed() first "
                "(--seed-features or --seed-ids), or give a number"
            )
        with self._all_or_nothing():
            decisions = self._grow(batch, min_align, recaptions, None)
        return decisions[0] if single else decisions

    # --- clean → gain → grow ---------------------------------------------------------------------

    def _grow(
        self,
        batch: Decisions,
        min_align: float,
        recaptions: Mapping[str, Recaption] | None,
        passed: Reason | None,
    ) -> Decisions:
        """The paper's algorithm: clean the samples, take each one's gain (its mean distance to the
        nearest kept before it), and keep those that passed. These get the reason `passed`, where
        one is given."""
        if not len(batch):
            return batch
        if not self._indexes:
            for space, features in batch.features.items():
                self._indexes[space] = self._new_index(space, features.shape[1])
        batch.neighbors |= {space: no_neighbors(len(batch), self.k) for space in self.spaces}
        if self.modality == "image":
            # Single-modal data: a sample joins if its label agrees with its nearest kept neighbors.
            for rows in batch.blocks(LABEL_BLOCK_ROWS):
                self._look_up(batch, rows, None)
                dataset = self._captions, self._class_counts, self._known
                agreed = passed or Reason.LABEL_AGREES
                joins = clean_labels(batch, rows, min_align, agreed, *dataset)
                self._indexes["image"].extend(batch.features["image"][rows][joins])
                self._keep(batch, rows, joins)
            return batch
        recaption_align = self.thresholds.min_recaption_align
        assert recaption_align is not None
        batch.recaption_rule = self.thresholds.recaption_rule
        aligned = clean_pairs(batch, min_align, recaptions, recaption_align, self.measure)
        if passed is not None:
            batch.reason[aligned] = passed
        for rows in batch.blocks(BLOCK_ROWS):
            repeated = self._repeated(batch.ids[rows], aligned[rows])
            batch.reason[rows][repeated] = Reason.DUPLICATE_ID
            joins = aligned[rows] & ~repeated
            self._look_up(batch, rows, joins)
            self._keep(batch, rows, joins)
        return batch

    def _look_up(self, batch: Decisions, rows: slice, joins: np.ndarray | None) -> None:
        """Enter the nearest samples of a block in `batch`: those of the dataset and, where it is
        known who `joins` (n,), those of the block that join before."""
        usable: Any = batch.usable[rows]
        if usable.all():
            usable = slice(None)  # spares copies

        def look_up(space: str) -> None:
            index, queries = self._indexes[space], batch.features[space][rows][usable]
            if joins is None:
                found = index.search(queries, np.full(len(queries), len(self)))
            else:
                found = index.search_and_extend(queries, joins[usable])
            entered = batch.neighbors[space].part(rows)
            entered.positions[usable], entered.products[usable] = found.positions, found.products

        alone = rows.stop - rows.start < FEW or any(i.alone for i in self._indexes.values())
        side_by_side(look_up, list(batch.features), one_by_one=alone)

    def _keep(self, batch: Decisions, rows: slice, joins: np.ndarray) -> None:
        """Enter the block's gains, and remember the samples that join, which the indexes hold."""
        usable = batch.usable[rows]
        for column, space in enumerate(self.spaces):
            distances = batch.neighbors[space].part(rows).distances
            batch.gains[rows, column][usable] = mean_distance(distances[usable])
        batch.kept[rows] = joins
        kept = (rows.start + np.flatnonzero(joins)).tolist()
        gains = batch.gains[kept] if self.modality == "pair" else batch.gains[kept][:, [0, 0]]
        self._remember(
            [batch.ids[row] for row in kept], [batch.captions[row] for row in kept], gains
        )

    def _remember(self, ids: list[str], captions: list[Any], gains: np.ndarray) -> None:
        self._ids += ids
        self._known.update(ids)
        self._captions += captions
        self._gains.frombytes(gains.tobytes())
        if self.modality == "image":
            self._class_counts.update(captions)

    def _repeated(self, ids: list[str], aligned: np.ndarray) -> np.ndarray:
        """(n,) bool: whose id is in the dataset already, or joins it with an earlier sample."""
        repeated = np.fromiter(map(self._known.__contains__, ids), bool, len(ids))
        if len(set(ids)) < len(ids):
            joined: set[str] = set()
            for row, name in enumerate(ids):
                if name in joined:
                    repeated[row] = True
                elif aligned[row] and not repeated[row]:
                    joined.add(name)
        return repeated

    def _validate(self, ids: Any, captions: Any, image: Any, text: Any) -> Decisions:
        dimension = self._indexes["image"].dimension if self._indexes else None
        features = dict(zip(self.spaces, (image, text), strict=False))
        return validate(ids, captions, features, dimension, self._ids)

    def _new_index(self, space: str, dimension: int) -> NeighborIndex:
        from infogrowth import distributed

        self._sharded = distributed.is_spread(self._sharded)
        device, before = distributed.choose_device(self._device), self._search.get(space, {})
        options = device, self._memory_mb, self._sharded, before.get("cells_from")
        return create_index(self._index_kind, dimension, self.k, *options)

    @contextmanager
    def _all_or_nothing(self) -> Iterator[None]:
        """Whatever goes wrong inside, the dataset is afterwards as it was before. Tensors made here
        outlive the call, so they must not be those of the caller's `torch.inference_mode`."""
        import torch

        count, indexes = len(self), dict(self._indexes)
        thresholds = self.thresholds
        try:
            with torch.inference_mode(False):
                yield
        except BaseException:
            self._indexes = indexes
            for index in indexes.values():
                index.truncate(count)
            self._known.difference_update(self._ids[count:])
            self._class_counts.subtract(self._captions[count:] if self.modality == "image" else [])
            del self._ids[count:], self._captions[count:], self._gains[2 * count :]
            self.thresholds = thresholds
            raise

    # --- what has grown --------------------------------------------------------------------------

    @property
    def kept_ids(self) -> list[str]:
        """Ids of the kept samples, in order."""
        return list(self._ids)

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

    def annotations(self) -> list[Annotation]:
        """The grown dataset: {"image", "caption", "gains": [image, text]}, in order."""
        rows = zip(self._ids, self._captions, self.kept_gains.tolist(), strict=True)
        return [{"image": name, "caption": cap, "gains": gains} for name, cap, gains in rows]

    @property
    def settings(self) -> dict[str, Any]:
        """What makes this dataset what it is, ready for JSON; `restore` takes it back."""
        indexes = self._indexes
        return {
            "k": self.k,
            **asdict(self.thresholds),
            "modality": self.modality,
            "index": self._index_kind,
            "dimension": {s: indexes[s].dimension if s in indexes else None for s in SPACES},
            "search": self._search | {s: r for s in indexes if (r := indexes[s].report())},
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
        **options: Any,
    ) -> Self:
        """The dataset that `settings`, the ids, captions and gains of `annotations()` and the two
        `kept_features` describe, as if it had never been put away; `options` as for the class.

        Features are (N, D) arrays, or iterables of such parts in order, each used and let go.
        Raises UserError if the parts do not belong together.
        """
        index = index or settings.get("index", "auto")
        modality = settings.get("modality", "pair")
        growth = cls(k=settings["k"], index=index, modality=modality, **options)
        growth.thresholds = Thresholds.of_settings(settings)
        growth._search = dict(settings.get("search") or {})
        gains = np.asarray(gains, np.float64).reshape(-1, 2)
        if not len(ids) == len(captions) == len(gains) == len(set(ids)):
            raise UserError(
                f"A saved dataset has {len(ids)} ids ({len(set(ids))} different), {len(captions)} "
                f"captions and {len(gains)} gains: they do not belong together."
            )
        with growth._all_or_nothing():
            for space, given in zip(growth.spaces, (image_features, text_features), strict=False):
                if given is None:
                    raise UserError(f"A saved dataset of {modality!r} data needs {space} features.")
                held = 0
                for part in [given] if hasattr(given, "shape") else given:
                    if not len(part):
                        continue
                    rows, invalid = unit_rows(as_matrix(part, f"The saved {space} features"))
                    if invalid.any():
                        raise UserError(
                            f"The saved {space} features hold rows that are no unit rows."
                        )
                    if space not in growth._indexes:
                        growth._indexes[space] = growth._new_index(space, rows.shape[1])
                    growth._indexes[space].extend(rows)
                    held += len(rows)
                if held != len(ids):
                    raise UserError(
                        f"A saved dataset has {len(ids)} ids but {held} {space} features."
                    )
        growth._remember(list(ids), list(captions), gains)
        return growth


def mean_distance(distances: np.ndarray) -> np.ndarray:
    """The gain of each sample: its mean cosine distance to its nearest neighbors (spec §2 "Gain").

    `distances` (N, k) float64, nearest first, NaN where a small dataset has no more neighbors.
    Returns (N,) float64: the mean over the neighbors that exist, in [0, 2], and exactly 1 for a
    sample that meets an empty dataset. Adds nearest first, so the bits never depend on N.
    """
    total = np.zeros(len(distances), np.float64)
    found = np.zeros(len(distances), np.int64)
    for column in distances.T:
        present = ~np.isnan(column)
        total[present] += column[present]
        found += present
    return np.where(found > 0, total / np.maximum(found, 1), 1.0)
