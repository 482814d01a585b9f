"""Which samples want a new caption: those that growth drops, or would drop, for their alignment."""

import logging
from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np

from infogrowth.data.features import FeatureBatch, FeatureStream, open_features
from infogrowth.errors import UserError
from infogrowth.files import read_json
from infogrowth.growth.admission import admit
from infogrowth.growth.cleaning import choose_min_align, is_below
from infogrowth.growth.ledger import read_growth
from infogrowth.growth.passes import WAITING_REASONS, waiting_ids
from infogrowth.neighbors.rows import row_products

logger = logging.getLogger(__name__)

_ROWS = 16_384


@dataclass
class Awaiting:
    """Samples that want a caption, in the order in which growth sees them.

    Attributes:
        min_align: alignment under which they lie, None when all samples were asked for.
        alignments: of each with the caption that it has.
        examined: how many samples were looked at.
    """

    min_align: float | None
    ids: list[str] = field(default_factory=list)
    captions: list[str] = field(default_factory=list)
    alignments: list[float] = field(default_factory=list)
    examined: int = 0


def awaiting_in_features(
    features: FeatureStream, min_align: float | None, seeds: frozenset[str] = frozenset()
) -> Awaiting:
    """Samples of a features folder with an alignment under ``min_align`` (None: all of them).

    The alignment is computed and compared exactly as growth does it. Seeds are never filtered, so
    they wait for nothing; nor do samples whose image feature is unusable.

    Raises:
        UserError: features that cannot be read.
    """
    awaiting = Awaiting(min_align)
    for batch in features.batches(_ROWS):
        image, text, usable = _unit_rows(batch)
        alignment = row_products(image, text)
        wanted = usable.copy()
        if min_align is not None:
            wanted &= is_below(alignment, min_align)
        for row in np.flatnonzero(wanted).tolist():
            if batch.ids[row] not in seeds:
                awaiting.ids.append(batch.ids[row])
                awaiting.captions.append(batch.captions[row])
                awaiting.alignments.append(float(alignment[row]))
        awaiting.examined += len(batch)
    return awaiting


def awaiting_in_growth(directory: str) -> Awaiting:
    """Samples that a growth folder dropped for their alignment and that have not joined since.

    Raises:
        UserError: not a growth folder.
    """
    growth = read_growth(directory)
    waiting = waiting_ids(growth, len(growth.sources))
    awaiting = Awaiting(float(growth.settings["min_align"]))
    found: dict[str, tuple[str, float]] = {}
    names = ("id", "verdict", "reason", "original_caption", "original_alignment")
    for table in growth.decision_parts(names):
        columns = (table[name].to_pylist() for name in names)
        for sample, verdict, reason, caption, alignment in zip(*columns, strict=True):
            awaiting.examined += 1
            if verdict == "dropped" and reason in WAITING_REASONS and sample in waiting:
                found.setdefault(sample, (caption, alignment))
    awaiting.ids = list(found)
    awaiting.captions = [caption for caption, _ in found.values()]
    awaiting.alignments = [alignment for _, alignment in found.values()]
    return awaiting


def min_align_of_seeds(seeds: Iterable[FeatureBatch], what: str) -> float:
    """What ``min_align: auto`` means with these seeds; the very rule of growth.

    Args:
        seeds: batches that hold nothing but seeds, in order.
        what: how an error calls them.

    Raises:
        UserError: there are none, or too few.
    """
    batches = [batch for batch in seeds if len(batch)]
    if not batches:
        raise UserError(f"no sample of the features is in {what}")
    image, text, usable = _unit_rows(FeatureBatch.join(batches))
    chosen = choose_min_align(image[usable], text[usable])
    logger.info("min_align = %.4f (auto, from %d seeds)", chosen, int(usable.sum()))
    return chosen


def seeds_in_features(features: FeatureStream, ids: frozenset[str]) -> Iterable[FeatureBatch]:
    """The rows of a features folder whose ids are in the seed list, in row order."""
    for batch in features.batches(_ROWS):
        yield batch.take(np.flatnonzero([sample in ids for sample in batch.ids]))


def read_seed_ids(path: str) -> frozenset[str]:
    """A JSON list of ids.

    Raises:
        UserError: not that.
    """
    ids = read_json(path, "the list of seed ids")
    if not isinstance(ids, list) or not all(isinstance(sample, str) for sample in ids):
        raise UserError(f"the list of seed ids {path} must be a JSON list of text")
    return frozenset(ids)


def open_pairs(path: str) -> FeatureStream:
    """Features of image and text that lie in one space."""
    features = open_features(path)
    _ = features.dimension  # raises where image and text differ
    return features


def _unit_rows(batch: FeatureBatch) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Image and text rows at unit length and which are usable, as growth brings them about."""
    offer = admit(batch.ids, batch.captions, batch.image, batch.text, None, with_text=True)
    assert offer.text is not None
    return offer.image, offer.text, offer.usable
