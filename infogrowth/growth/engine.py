"""InfoGrowth: clean → gain → grow, one sample or millions at a time.

Paper: "Dataset Growth" (InfoGrowth), ECCV 2024; spec §2. Order is the contract: whatever the
batch size, device, number of ranks or interruptions, the result is that of offering the samples
one by one.
"""

from __future__ import annotations

import logging
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import numpy as np

from infogrowth.errors import UserError
from infogrowth.growth.admission import Offer, admit
from infogrowth.growth.cleaning import Cleaned, choose_min_align, clean_pairs
from infogrowth.growth.decisions import (
    REASON_CODE,
    SPACES,
    VERDICT_CODE,
    Decision,
    DecisionBatch,
    Reason,
    Recaption,
    Verdict,
)
from infogrowth.growth.gain import mean_distance
from infogrowth.growth.neighbors import INDEX_KINDS, NeighborIndex, Neighbors, create_index
from infogrowth.growth.rows import as_matrix, row_products, unit_rows

__all__ = ["InfoGrowth", "Recaption"]

log = logging.getLogger(__name__)

BLOCK_ROWS = 16384  # samples that go through the three steps together


class InfoGrowth:
    """A dataset that grows: samples are offered in order, and each is kept or not, with its gain.

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

    Raises UserError for settings that make no sense. A call that fails changes nothing.
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
        self._index_options = {"device": device, "memory_mb": memory_mb, "sharded": sharded}
        self._indexes: dict[str, NeighborIndex] = {}
        self._ids: list[str] = []
        self._known: set[str] = set()
        self._captions: list[Any] = []
        self._gains = array("d")  # image, text, image, text, …

    # --- the algorithm ---------------------------------------------------------------------------

    def seed(
        self, ids: Any, captions: Any, image_features: Any, text_features: Any = None
    ) -> DecisionBatch:
        """Insert a clean starting set, in order and unfiltered (unusable features and repeated ids
        excepted). Features (N, D), any float type, need not be unit length."""
        offer = self._admit(ids, captions, image_features, text_features)
        with self._all_or_nothing():
            if self.min_align is None:
                self._choose_min_align(offer)
            return self._grow(offer, None, is_seed=True)

    def process(
        self,
        ids: Any,
        captions: Any,
        image_features: Any,
        text_features: Any = None,
        recaptions: Mapping[str, Recaption] | None = None,
    ) -> Any:
        """Offer samples, in order; returns a `DecisionBatch`, or one `Decision` for a single sample
        (a plain string as `ids`, features (D,)). `recaptions` is asked for samples under
        `min_align` only."""
        single = isinstance(ids, str)
        if single:
            ids, captions = [ids], [captions]
            image_features, text_features = _one_row(image_features), _one_row(text_features)
        offer = self._admit(ids, captions, image_features, text_features)
        if self.min_align is None:
            raise UserError(
                "min_align 'auto' is chosen from a clean starting set: call seed() first "
                "(--seed-features), or give a number."
            )
        with self._all_or_nothing():
            decisions = self._grow(offer, recaptions, is_seed=False)
        return decisions[0] if single else decisions

    def _grow(
        self, offer: Offer, recaptions: Mapping[str, Recaption] | None, is_seed: bool
    ) -> DecisionBatch:
        if len(offer) == 0:
            return DecisionBatch.empty(self.k, self._ids)
        if not self._indexes:
            self._indexes = {s: self._new_index(offer.image.shape[1]) for s in self.spaces}
        parts = offer.parts(BLOCK_ROWS)
        return DecisionBatch.concatenate([self._step(p, recaptions, is_seed) for p in parts])

    def _step(
        self, offer: Offer, recaptions: Mapping[str, Recaption] | None, is_seed: bool
    ) -> DecisionBatch:
        """Clean, gain, grow: the paper's algorithm for a block of samples."""
        cleaned = self._clean(offer, recaptions, is_seed)
        joins = self._join(offer.ids, cleaned)

        visible = len(self) + np.cumsum(joins) - joins  # what was kept before each sample
        rows = {"image": offer.image, "text": cleaned.text}
        for space in self.spaces:
            self._indexes[space].extend(rows[space][joins])
        found = {s: self._look_up(s, rows[s], visible, offer.usable) for s in self.spaces}
        gains = np.full((len(offer), 2), np.nan)
        for column, space in enumerate(self.spaces):
            gains[offer.usable, column] = mean_distance(found[space].distances[offer.usable])

        self._remember(offer, cleaned, joins, gains)
        return self._decisions(offer, cleaned, joins, gains, found)

    def _clean(
        self, offer: Offer, recaptions: Mapping[str, Recaption] | None, is_seed: bool
    ) -> Cleaned:
        """Seeds are taken as they are; the others must align, or have a recaption that does."""
        min_align = -np.inf if is_seed or self.min_align is None else self.min_align
        arguments = (offer.ids, offer.captions, offer.image, offer.text, offer.trouble)
        cleaned = clean_pairs(*arguments, min_align, recaptions)
        if is_seed:
            cleaned.reason_codes[cleaned.aligned] = REASON_CODE[Reason.SEED]
        return cleaned

    def _join(self, ids: list[str], cleaned: Cleaned) -> np.ndarray:
        """Which samples join the dataset (N,) bool: those that align and whose id is new. Tells
        the reason of repeated ids in `cleaned`."""
        known = self._known
        repeated = np.fromiter((name in known for name in ids), bool, len(ids))
        if len(set(ids)) < len(ids):
            joined_here: set[str] = set()
            for row, name in enumerate(ids):
                if name in joined_here:
                    repeated[row] = True
                elif cleaned.aligned[row] and not repeated[row]:
                    joined_here.add(name)
        cleaned.reason_codes[repeated] = REASON_CODE[Reason.DUPLICATE_ID]
        return cleaned.aligned & ~repeated

    def _look_up(
        self, space: str, rows: np.ndarray, visible: np.ndarray, usable: np.ndarray
    ) -> Neighbors:
        """Nearest kept samples of all samples with usable features; none for the others."""
        index = self._indexes[space]
        if usable.all():
            return index.search(rows, visible)
        found = index.search(rows[usable], visible[usable])
        positions = np.full((len(rows), self.k), -1, np.int64)
        products = np.full((len(rows), self.k), -np.inf)
        positions[usable], products[usable] = found.positions, found.products
        return Neighbors(positions, products)

    # --- the dataset -----------------------------------------------------------------------------

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
    ) -> InfoGrowth:
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
        growth._gains.frombytes(saved_gains.tobytes())
        return growth

    # --- underneath ------------------------------------------------------------------------------

    def _restore_index(self, space: str, features: Any, expected: int) -> None:
        if features is None:
            raise UserError(f"A saved dataset of modality {self.modality!r} needs {space} features.")
        parts: Iterable[Any] = features if isinstance(features, (list, tuple)) else [features]
        for part in parts:
            if len(part) == 0:
                continue
            rows, trouble = unit_rows(as_matrix(part, f"The saved {space} features"))
            if trouble.any():
                raise UserError(f"The saved {space} features hold rows that are no unit rows.")
            self._indexes.setdefault(space, self._new_index(rows.shape[1])).extend(rows)
        held = self._indexes[space].count if space in self._indexes else 0
        if held != expected:
            raise UserError(f"A saved dataset has {expected} ids but {held} {space} features.")

    def _admit(self, ids: Any, captions: Any, image: Any, text: Any) -> Offer:
        dimension = self._indexes["image"].dimension if self._indexes else None
        return admit(ids, captions, image, text, dimension, with_text="text" in self.spaces)

    def _choose_min_align(self, offer: Offer) -> None:
        usable = offer.usable
        self.min_align = choose_min_align(offer.image[usable], offer.text[usable])
        self.min_align_rule = (
            f"auto: best balanced accuracy between the captions of {int(usable.sum())} seeds and "
            "swapped ones"
        )
        log.info("min_align = %.4f (%s)", self.min_align, self.min_align_rule)

    def _new_index(self, dimension: int) -> NeighborIndex:
        from infogrowth import distributed

        options = dict(self._index_options)
        sharded = options.pop("sharded")
        return create_index(
            self._index_kind,
            dimension,
            self.k,
            device=distributed.choose_device(str(options["device"])),
            memory_mb=float(options["memory_mb"] or 256),
            sharded=distributed.world_size() > 1 if sharded is None else bool(sharded),
        )

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
            del self._ids[count:], self._captions[count:], self._gains[2 * count :]
            self.min_align, self.min_align_rule = rule
            raise

    def _remember(
        self, offer: Offer, cleaned: Cleaned, joins: np.ndarray, gains: np.ndarray
    ) -> None:
        rows = np.flatnonzero(joins).tolist()
        new_ids = [offer.ids[row] for row in rows]
        self._ids += new_ids
        self._known.update(new_ids)
        self._captions += [cleaned.captions[row] for row in rows]
        kept = gains[joins] if len(self.spaces) == 2 else gains[joins][:, [0, 0]]
        self._gains.frombytes(kept.tobytes())

    def _decisions(
        self,
        offer: Offer,
        cleaned: Cleaned,
        joins: np.ndarray,
        gains: np.ndarray,
        found: dict[str, Neighbors],
    ) -> DecisionBatch:
        verdicts = np.full(len(offer), VERDICT_CODE[Verdict.DROPPED], np.int8)
        verdicts[joins] = VERDICT_CODE[Verdict.KEPT]
        verdicts[joins & cleaned.recaptioned] = VERDICT_CODE[Verdict.RECAPTIONED]
        nothing = Neighbors(np.empty((len(offer), 0), np.int64), np.empty((len(offer), 0)))
        image, text = found["image"], found.get("text", nothing)
        return DecisionBatch(
            ids=offer.ids,
            captions=cleaned.captions,
            original_captions=offer.captions,
            verdict_codes=verdicts,
            reason_codes=cleaned.reason_codes,
            alignment=cleaned.alignment,
            original_alignment=cleaned.original_alignment,
            gains=gains,
            image_positions=image.positions,
            image_distances=image.distances,
            text_positions=text.positions,
            text_distances=text.distances,
            kept_image=offer.image[joins],
            kept_text=cleaned.text[joins] if "text" in found else None,
            kept_ids=self._ids,
        )


def _one_row(features: Any) -> Any:
    """The features of a single sample (D,) as one row (1, D)."""
    if features is None:
        return None
    return features.reshape(1, -1) if hasattr(features, "reshape") else [features]


def _check_settings(
    k: int, min_align: float | str, index: str, modality: str, memory_mb: float
) -> None:
    if isinstance(k, bool) or not isinstance(k, int | np.integer) or k < 1:
        raise UserError(f"k must be a whole number of at least 1, not {k!r}.")
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
