"""Which samples want a new caption: those that growth drops, or would drop, for their alignment."""

import logging
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow.compute as pc

from infogrowth.annotations import read_ids
from infogrowth.data.features import FeatureBatch, FeatureStream, open_features
from infogrowth.data.images import BadImage, decode_image
from infogrowth.errors import UserError
from infogrowth.growth.cleaning import is_below
from infogrowth.growth.decisions import Reason, validate
from infogrowth.growth.ledger import PENDING_REASONS, read_growth
from infogrowth.growth.scores import Measure, cosine
from infogrowth.growth.thresholds import Thresholds
from infogrowth.neighbors.rows import row_products

if TYPE_CHECKING:
    from infogrowth.encoders.protocols import Captioner, DualEncoder

logger = logging.getLogger(__name__)

_ROWS = 16_384
_CHECKED_AT_ONCE = 16
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
    features: FeatureStream, seed_ids: Collection[str] = (), measure: Measure = cosine
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
            parts.append(measure(image, text)[usable])
    return np.concatenate(parts)


def seeds_in_features(features: FeatureStream, ids: frozenset[str]) -> Iterable[FeatureBatch]:
    """The rows of a features folder whose ids are in the seed list, in row order."""
    for batch in features.batches(_ROWS):
        yield batch.take(np.flatnonzero([sample in ids for sample in batch.ids]))


@dataclass(frozen=True)
class Seeds:
    """Seeds with their true captions: ids, image rows (N, D), own alignments (N,), and where their
    images are, if that is recorded."""

    ids: list[str]
    image: np.ndarray
    alignment: np.ndarray
    images: str | None


def seeds_of(
    features: str | None, growth: str | None, seed_ids: str | None, seed_features: str | None
) -> Seeds | None:
    """The seeds that a run knows of, those with usable features; None if it knows of none.

    Raises:
        UserError: files that cannot be read.
    """
    if growth is not None:
        return _seeds_of_growth(growth)
    source = seed_features or (features if seed_ids else None)
    if source is None:
        return None
    stream = open_pairs(source)
    batches = stream.batches(_ROWS)
    if seed_features is None and seed_ids is not None:
        batches = iter(seeds_in_features(stream, read_ids(seed_ids)))
    joined = FeatureBatch.join([batch for batch in batches if len(batch)])
    image, text, usable = _unit_rows(joined)
    ids = [joined.ids[row] for row in np.flatnonzero(usable).tolist()]
    alignment = row_products(image[usable], text[usable])
    return Seeds(ids, image[usable], alignment, stream.description.get("images"))


def check_captioner(
    seeds: Seeds, images: str, captioner: "Captioner", encoder: "DualEncoder", limit: int
) -> dict[str, Any]:
    """How often a captioner's caption aligns better than the true one; evenly spaced seeds.

    A captioner that often beats the truth picks what the encoder likes: alignment says little
    about its captions.
    """
    from infogrowth.encoders.dataset import pairs_by_id

    rows = np.unique(np.linspace(0, len(seeds.ids) - 1, min(limit, len(seeds.ids))).astype(int))
    ids = [seeds.ids[row] for row in rows.tolist()]
    pairs = pairs_by_id(images, ids, [""] * len(ids))
    better, found, written = 0, 0, 0
    for start in range(0, len(ids), _CHECKED_AT_ONCE):
        prepared, owners = [], []
        for number in range(start, min(start + _CHECKED_AT_ONCE, len(ids))):
            try:
                prepared.append(captioner.preprocess(decode_image(pairs.read(number)[1])))
            except BadImage:
                continue
            owners.append(rows[number])
        if not prepared:
            continue
        found += len(owners)
        captions = captioner.caption(prepared)
        said = [number for number, caption in enumerate(captions) if caption]
        if said:
            owned = np.array(owners)[said]
            text = encoder.encode_texts([captions[number] for number in said]).numpy()
            better += int((row_products(seeds.image[owned], text) > seeds.alignment[owned]).sum())
            written += len(said)
    return {"seeds": found, "captioned": written, "better_than_true": better}


def _seeds_of_growth(directory: str) -> Seeds | None:
    growth = read_growth(directory)
    ids: list[str] = []
    alignment: list[float] = []
    for table in growth.decision_parts(("id", "reason", "original_alignment")):
        seeds = table.filter(pc.equal(table["reason"], Reason.SEED))
        ids += seeds["id"].to_pylist()
        alignment += seeds["original_alignment"].to_pylist()
    if not ids:
        return None
    image = growth.first_kept_features("image", len(ids))
    return Seeds(ids, image, np.array(alignment), growth.settings.get("images"))


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
