"""Which samples want a new caption: those that growth drops, or would drop, for their alignment;
and what the seeds say of thresholds and of a captioner."""

from collections.abc import Collection
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import pyarrow.compute as pc

from infogrowth.data.feature_stream import FeatureBatch, FeatureStream
from infogrowth.data.features import open_features
from infogrowth.errors import UserError
from infogrowth.growth.cleaning import Measure, cosine, is_below
from infogrowth.growth.decisions import Reason, validate
from infogrowth.growth.ledger import read_growth
from infogrowth.rows import row_products

if TYPE_CHECKING:
    from infogrowth.encoders.models import Captioner, DualEncoder

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
    features: FeatureStream, min_align: float | None, seeds: Collection[str] = ()
) -> PendingRecaptions:
    """Samples of a features folder with an alignment under ``min_align`` (None: all of them).

    The alignment is computed and compared exactly as growth does it. Seeds are never filtered, so
    they need none; nor do samples whose image feature is unusable.

    Raises:
        UserError: features that cannot be read.
    """
    pending = PendingRecaptions(min_align)
    for batch in features.batches(_ROWS):
        image, text, wanted = _unit_rows(batch)
        alignment = row_products(image, text)
        if min_align is not None:
            wanted = wanted & is_below(alignment, min_align)
        rows = [row for row in np.flatnonzero(wanted).tolist() if batch.ids[row] not in seeds]
        pending.ids += [batch.ids[row] for row in rows]
        pending.captions += [batch.captions[row] for row in rows]
        pending.alignments += alignment[rows].tolist()
        pending.examined += len(batch)
    return pending


def pending_in_growth(directory: str) -> PendingRecaptions:
    """Samples that a growth folder dropped for their alignment and that have not joined since.

    Raises:
        UserError: not a growth folder.
    """
    growth = read_growth(directory)
    ids, captions, alignments = (column.to_pylist() for column in growth.pending().columns)
    min_align = float(growth.settings["min_align"])
    return PendingRecaptions(min_align, ids, captions, alignments, growth.totals["pairs"])


@dataclass(frozen=True)
class Seeds:
    """Seeds with their true captions and usable features.

    Attributes:
        image, text: (N, D) float32 unit rows; ``text`` is None where only alignments are known.
        alignment: (N,) of each with its own caption.
        images: where their images are, if that is recorded.
    """

    ids: list[str]
    image: np.ndarray
    text: np.ndarray | None
    alignment: np.ndarray
    images: str | None


def seeds_of_features(path: str, ids: Collection[str] | None, what: str) -> Seeds:
    """The seeds in a features folder: the samples with these ids, in row order; None: all.

    Args:
        what: how an error calls them.

    Raises:
        UserError: there are none.
    """
    stream = open_pairs(path)
    batches = []
    for batch in stream.batches(_ROWS):
        if ids is not None:
            batch = batch.take(np.flatnonzero([name in ids for name in batch.ids]))
        if len(batch):
            batches.append(batch)
    if not batches:
        raise UserError(f"no sample of the features is in {what}")
    joined = FeatureBatch.join(batches)
    image, text, usable = _unit_rows(joined)
    names = [joined.ids[row] for row in np.flatnonzero(usable).tolist()]
    image, text = image[usable], text[usable]
    return Seeds(names, image, text, row_products(image, text), stream.description.get("images"))


def seeds_of_growth(directory: str) -> Seeds | None:
    """The seeds of a growth folder, None if it has none."""
    growth = read_growth(directory)
    ids: list[str] = []
    alignment: list[float] = []
    for table in growth.decision_parts(("id", "reason", "original_alignment")):
        seeds = table.filter(pc.equal(table["reason"], Reason.SEED))
        ids += seeds["id"].to_pylist()
        alignment += seeds["original_alignment"].to_pylist()
    if not ids:
        return None
    image = growth.kept_features("image", len(ids))
    return Seeds(ids, image, None, np.array(alignment), growth.settings.get("images"))


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


def check_captioner(
    seeds: Seeds, images: str, captioner: "Captioner", encoder: "DualEncoder", limit: int
) -> dict[str, int]:
    """How often a captioner's caption aligns better than the true one; evenly spaced seeds.

    A captioner that often beats the truth picks what the encoder likes: alignment says little
    about its captions.
    """
    from infogrowth.encoders.dataset import decoded_batches, pairs_by_id
    from infogrowth.encoders.embedding import captions_of

    rows = np.unique(np.linspace(0, len(seeds.ids) - 1, min(limit, len(seeds.ids))).astype(int))
    ids = [seeds.ids[row] for row in rows.tolist()]
    table = pairs_by_id(images, ids, [""] * len(ids))
    whole = [(0, range(len(ids)))]
    check = {"seeds": 0, "captioned": 0, "better_than_true": 0}
    for batch in decoded_batches(table, captioner.preprocess, None, whole, _CHECKED_AT_ONCE, 0):
        captions = captions_of(batch, captioner)
        check["seeds"] += len(captions)
        written = [number for number, caption in enumerate(captions) if caption]
        if written:
            own = rows[np.array(batch.rows)[written]]
            text = encoder.encode_texts([captions[number] for number in written]).numpy()
            better = row_products(seeds.image[own], text) > seeds.alignment[own]
            check["captioned"] += len(written)
            check["better_than_true"] += int(better.sum())
    return check


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
