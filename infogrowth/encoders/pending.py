"""Which samples want a new caption: those that growth drops, or would drop, for their alignment."""

import logging
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field

import numpy as np

from infogrowth.data.features import FeatureBatch, FeatureStream, open_features
from infogrowth.errors import UserError
from infogrowth.growth.cleaning import is_below
from infogrowth.growth.decisions import validate
from infogrowth.growth.ledger import PENDING_REASONS, read_growth
from infogrowth.growth.scores import Score
from infogrowth.growth.thresholds import Thresholds
from infogrowth.neighbors.rows import row_products

logger = logging.getLogger(__name__)

_ROWS = 16_384
_MAX_BLOCKS = 64  # about a million alignments say enough about a stream


@dataclass
class PendingRecaptions:
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


def pending_in_features(
    features: FeatureStream, min_align: float | None, seeds: frozenset[str] = frozenset()
) -> PendingRecaptions:
    """Samples of a features folder with an alignment under ``min_align`` (None: all of them).

    The alignment is computed and compared exactly as growth does it. Seeds are never filtered, so
    they need none; nor do samples whose image feature is unusable.

    Raises:
        UserError: features that cannot be read.
    """
    pending = PendingRecaptions(min_align)
    for batch in features.batches(_ROWS):
        image, text, usable = _unit_rows(batch)
        alignment = row_products(image, text)
        wanted = usable.copy()
        if min_align is not None:
            wanted &= is_below(alignment, min_align)
        for row in np.flatnonzero(wanted).tolist():
            if batch.ids[row] not in seeds:
                pending.ids.append(batch.ids[row])
                pending.captions.append(batch.captions[row])
                pending.alignments.append(float(alignment[row]))
        pending.examined += len(batch)
    return pending


def pending_in_growth(directory: str) -> PendingRecaptions:
    """Samples that a growth folder dropped for their alignment and that have not joined since.

    Raises:
        UserError: not a growth folder.
    """
    growth = read_growth(directory)
    wanted = growth.pending_ids()
    pending = PendingRecaptions(float(growth.settings["min_align"]))
    found: dict[str, tuple[str, float]] = {}
    names = ("id", "verdict", "reason", "original_caption", "original_alignment")
    for table in growth.decision_parts(names):
        columns = (table[name].to_pylist() for name in names)
        for sample, verdict, reason, caption, alignment in zip(*columns, strict=True):
            pending.examined += 1
            if verdict == "dropped" and reason in PENDING_REASONS and sample in wanted:
                found.setdefault(sample, (caption, alignment))
    pending.ids = list(found)
    pending.captions = [caption for caption, _ in found.values()]
    pending.alignments = [alignment for _, alignment in found.values()]
    return pending


def thresholds_of_seeds(
    requested: Thresholds,
    seeds: Iterable[FeatureBatch],
    what: str,
    features: FeatureStream,
    seed_ids: Collection[str] = (),
) -> Thresholds:
    """What ``auto`` means with these seeds and features; the very rules of growth.

    Args:
        seeds: batches that hold nothing but seeds, in order.
        what: how an error calls them.
        features: the stream.
        seed_ids: its samples that are seeds.

    Raises:
        UserError: there are none, or too few.
    """
    batches = [batch for batch in seeds if len(batch)]
    if not batches:
        raise UserError(f"no sample of the features is in {what}")
    image, text, usable = _unit_rows(FeatureBatch.join(batches))
    stream = stream_alignments(features, seed_ids) if requested.purity else None
    return requested.resolve(image[usable], text[usable], stream)


def stream_alignments(
    features: FeatureStream, seed_ids: Collection[str] = (), score: Score = row_products
) -> np.ndarray:
    """Alignments of a stream's samples, without seeds, on which its purity is estimated.

    Of more than a million rows evenly spaced blocks are read: a choice that depends on nothing
    but the number of rows, and sees the beginning of the stream as well as its end.
    """
    blocks = -(-features.rows // _ROWS)
    chosen = np.unique(np.linspace(0, blocks - 1, min(blocks, _MAX_BLOCKS)).round().astype(int))
    parts = [np.empty(0)]
    for block in chosen.tolist():
        stop = min((block + 1) * _ROWS, features.rows)
        for batch in features.batches(_ROWS, block * _ROWS, stop):
            image, text, usable = _unit_rows(batch)
            usable &= np.fromiter((name not in seed_ids for name in batch.ids), bool, len(batch))
            parts.append(score(image, text)[usable])
    return np.concatenate(parts)


def seeds_in_features(features: FeatureStream, ids: frozenset[str]) -> Iterable[FeatureBatch]:
    """The rows of a features folder whose ids are in the seed list, in row order."""
    for batch in features.batches(_ROWS):
        yield batch.take(np.flatnonzero([sample in ids for sample in batch.ids]))


def open_pairs(path: str) -> FeatureStream:
    """Features of image and text that lie in one space."""
    features = open_features(path)
    _ = features.dimension  # raises where image and text differ
    return features


def _unit_rows(batch: FeatureBatch) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Image and text rows at unit length and which are usable, as growth validates them."""
    features = {"image": batch.image, "text": batch.text}
    validated = validate(batch.ids, batch.captions, features)
    return validated.features["image"], validated.features["text"], validated.usable
