"""InfoGrowth: clean → gain → grow, one sample or millions at a time.

Paper: "Dataset Growth" (InfoGrowth), ECCV 2024; spec §2. Order is the contract: whatever the
batch size, device, number of ranks or interruptions, the result is that of offering the samples
one by one.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import numpy as np

from infogrowth.errors import UserError
from infogrowth.growth import labels
from infogrowth.growth.admission import Offer, admit
from infogrowth.growth.cleaning import (
    Cleaned,
    choose_min_align,
    clean_labels,
    clean_pairs,
    judge_labels,
)
from infogrowth.growth.dataset import GrownDataset
from infogrowth.growth.decisions import (
    REASON_CODE,
    VERDICT_CODE,
    DecisionBatch,
    Reason,
    Recaption,
    Verdict,
)
from infogrowth.growth.gain import mean_distance
from infogrowth.neighbors import Neighbors

__all__ = ["InfoGrowth", "Recaption"]

log = logging.getLogger(__name__)

BLOCK_ROWS = 16384  # samples that go through the three steps together


class InfoGrowth(GrownDataset):
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
        parts = offer.parts(BLOCK_ROWS if self.modality == "pair" else labels.BLOCK_ROWS)
        return DecisionBatch.concatenate([self._step(p, recaptions, is_seed) for p in parts])

    def _step(
        self, offer: Offer, recaptions: Mapping[str, Recaption] | None, is_seed: bool
    ) -> DecisionBatch:
        """Clean, gain, grow: the paper's algorithm for a block of samples."""
        if self.modality == "image":
            cleaned, joins, found = self._clean_labels(offer, is_seed)
        else:
            cleaned = self._clean(offer, recaptions, is_seed)
            joins = self._join(offer.ids, cleaned)
            found = self._grow_pairs(offer, cleaned, joins)
        gains = np.full((len(offer), 2), np.nan)
        for column, space in enumerate(self.spaces):
            gains[offer.usable, column] = mean_distance(found[space].distances[offer.usable])
        kept = np.flatnonzero(joins).tolist()
        kept_ids = [offer.ids[row] for row in kept]
        self._remember(kept_ids, [cleaned.captions[row] for row in kept], gains[joins])
        return self._decisions(offer, cleaned, joins, gains, found)

    def _clean(
        self, offer: Offer, recaptions: Mapping[str, Recaption] | None, is_seed: bool
    ) -> Cleaned:
        """Seeds are taken as they are; the others must align, or have a recaption that does."""
        assert offer.text is not None
        min_align = self.min_align if self.min_align is not None and not is_seed else -np.inf
        samples = offer.ids, offer.captions, offer.image, offer.text, offer.trouble
        cleaned = clean_pairs(*samples, min_align, recaptions)
        if is_seed:
            cleaned.reason_codes[cleaned.aligned] = REASON_CODE[Reason.SEED]
        return cleaned

    def _grow_pairs(
        self, offer: Offer, cleaned: Cleaned, joins: np.ndarray
    ) -> dict[str, Neighbors]:
        """Add what joins; look every sample up among what was kept before it."""
        visible = len(self) + np.cumsum(joins) - joins
        found = {}
        for space, rows in (("image", offer.image), ("text", cleaned.text)):
            self._indexes[space].extend(rows[joins])
            found[space] = self._look_up(space, rows, visible, offer.usable)
        return found

    def _clean_labels(
        self, offer: Offer, is_seed: bool
    ) -> tuple[Cleaned, np.ndarray, dict[str, Neighbors]]:
        """Single-modal data: a sample joins if its label agrees with its nearest kept neighbors."""
        assert self.min_align is not None
        min_align = -np.inf if is_seed else self.min_align
        visible = np.full(len(offer), len(self))
        before = self._look_up("image", offer.image, visible, offer.usable)
        classes = {label: code for code, label in enumerate(dict.fromkeys(offer.captions))}
        codes = np.array([classes[label] for label in offer.captions])
        cleaned = clean_labels(offer.captions, offer.trouble)

        def choose(agreement: np.ndarray) -> np.ndarray:
            judge_labels(cleaned, agreement, min_align, is_seed)
            return self._join(offer.ids, cleaned)

        settled = labels.settle_labels(
            codes,
            offer.image,
            offer.usable,
            before,
            self._label_codes(before.positions, classes),
            np.array([self._class_counts[label] for label in classes]),
            len(self),
            choose,
        )
        self._indexes["image"].extend(offer.image[settled.joins])
        return cleaned, settled.joins, {"image": settled.neighbors}

    def _label_codes(self, positions: np.ndarray, classes: dict[Any, int]) -> np.ndarray:
        """Codes of the labels of kept samples; -1 for none and for classes not in `classes`."""
        kept = self._captions
        codes = [classes.get(kept[p], -1) if p >= 0 else -1 for p in positions.flat]
        return np.array(codes, np.int64).reshape(positions.shape)

    def _join(self, ids: list[str], cleaned: Cleaned) -> np.ndarray:
        """Which samples join the dataset (N,) bool: those that align and whose id is new; tells
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

    def _admit(self, ids: Any, captions: Any, image: Any, text: Any) -> Offer:
        dimension = self._indexes["image"].dimension if self._indexes else None
        return admit(ids, captions, image, text, dimension, with_text="text" in self.spaces)

    def _choose_min_align(self, offer: Offer) -> None:
        usable = offer.usable
        assert offer.text is not None
        self.min_align = choose_min_align(offer.image[usable], offer.text[usable])
        self.min_align_rule = (
            f"auto: best balanced accuracy between the captions of {int(usable.sum())} seeds and "
            "swapped ones"
        )
        log.info("min_align = %.4f (%s)", self.min_align, self.min_align_rule)

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
