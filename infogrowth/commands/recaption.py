"""`infogrowth recaption`: write new captions and their features for badly aligned samples.

Which samples want one: those that growth drops, or would drop, for their alignment.
"""

from collections.abc import Collection
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from infogrowth.annotations import SPACES, read_ids
from infogrowth.commands.embed import (
    EncodingConfig,
    encoder_identity,
    images_of,
    parse_part,
    print_summary,
)
from infogrowth.config import option
from infogrowth.data.feature_stream import FeatureBatch, FeatureStream
from infogrowth.data.features import open_features
from infogrowth.errors import UserError
from infogrowth.files import read_json
from infogrowth.growth.cleaning import is_below, stream_alignments
from infogrowth.growth.decisions import Reason
from infogrowth.growth.ledger import read_growth
from infogrowth.growth.thresholds import Thresholds
from infogrowth.rows import row_products, unit_pairs

if TYPE_CHECKING:
    import torch

    from infogrowth.encoders.dataset import Pairs
    from infogrowth.encoders.models import Captioner, DualEncoder


_ROWS = 16_384  # examined at once
_CHECKED_AT_ONCE = 16
_SAMPLES = pa.schema(
    {"id": pa.string(), "original_caption": pa.string(), "original_alignment": pa.float64()}
)


@dataclass(frozen=True, kw_only=True)
class Config(EncodingConfig):
    """Options of `recaption`."""

    features: str | None = option(
        None, help="before growing: recaption what lies under --min-align in this features folder"
    )
    growth: str | None = option(
        None,
        help="after growing: recaption what this growth folder dropped for its alignment",
        excludes="features",
    )
    min_align: float | str = option(
        0.4, help="with --features: a number, auto or auto:0.98 (from the seeds, as `grow` does)"
    )
    seed_ids: str | None = option(None, help="JSON list of seed ids; seeds are left as they are")
    seed_features: str | None = option(None, help="features folder of the seeds")
    all: bool = option(False, help="with --features: recaption every sample", needs="features")
    captions: str | None = option(
        None, help='import captions made elsewhere, [{"image", "caption"}], instead of a captioner'
    )
    captioner: str = option(
        "tiny",
        help="tiny, a BLIP with a text decoder, a Hugging Face image-to-text model, or "
        "nearest:FILE: the nearest caption of a trusted list (an annotation JSON, or text lines)",
    )
    prompt: str = option("", help="words that the caption continues, or a chat model's question")
    beams: int = option(3, help="hypotheses of the beam search", min=1)
    max_tokens: int = option(30, help="longest caption, in tokens", min=1)
    min_margin: float = option(0.0, "with nearest:FILE: lead of the best over the next one")
    seed_check: int = option(100, "seeds on which new captions are compared with the true ones")
    lmdb: str | None = option(None, help="LMDB or source of the images [that of the features]")
    encoder: str | None = option(None, help="encoder of the text [that of the features]")


def run(config: Config) -> int:
    """Recaption; under the launcher each rank takes the next shard when it is free."""
    part = parse_part(config.part)
    _refuse_nonsense(config)
    # torch is slow to import: bad input is refused first.
    from infogrowth import distributed
    from infogrowth.data.feature_writer import FeatureWriter
    from infogrowth.encoders.embedding import embed_pairs
    from infogrowth.encoders.loading import load_captioner

    with distributed.process_group(config.device, collectives_on="cpu") as device:
        about, pending = _pending(config)
        pairs = _pairs(config, about, pending)
        captioner = None
        with distributed.main_first():  # rank 0 downloads, the others find the files
            encoder = _encoder(config, about, device)
            if config.captions is None:
                captioner = load_captioner(
                    config.captioner, device, config.vocabulary, encoder, config.min_margin,
                    prompt=config.prompt, beams=config.beams, max_tokens=config.max_tokens,
                )  # fmt: skip
        checked = {}
        if captioner is not None:
            check = partial(_seed_check, config, about, captioner, encoder)
            checked["seed_check"] = distributed.on_main(check)
        identity = {
            "kind": "recaptions",
            "encoder": encoder_identity(encoder),
            "captioner": captioner and {n: getattr(captioner, n) for n in ("name", "fingerprint")},
            **pairs.origin,
            **checked,
            "min_align": pending and pending.min_align,
        }
        output = FeatureWriter(config.output, identity, len(pairs.ids), config.shard_size, part)
        batch_size = config.batch_size or {"cpu": 16, "cuda": 128}[device.type]
        extra: dict[str, list[Any]] = {}
        if captioner is not None and pending is not None:
            extra = {name: pending.samples[name].to_pylist() for name in _SAMPLES.names[1:]}
        workers = config.workers if captioner is not None else 0
        result = embed_pairs(pairs, encoder, output, device, batch_size, workers, captioner, extra)
        if distributed.is_main():
            if pending is not None:
                under = "" if pending.min_align is None else f" under {pending.min_align:.4f}"
                print(f"{len(pending.samples):,} of {pending.examined:,} samples{under}")
            if found := checked.get("seed_check"):
                _print_seed_check(found)
            print_summary(config.output, result)
    return 0


def _pairs(config: Config, about: dict[str, Any], pending: "_Pending | None") -> "Pairs":
    """Captions from a file (of all in it, if no samples are known), or the pending images."""
    from infogrowth.encoders.dataset import captions_of_file, pairs_by_id

    if pending is None:
        return captions_of_file(str(config.captions), None)
    ids, captions, _ = (column.to_pylist() for column in pending.samples.columns)
    if config.captions is not None:
        return captions_of_file(config.captions, ids)
    path = config.features or config.growth
    return pairs_by_id(images_of(path, about, config.lmdb, "--lmdb"), ids, captions)


def _encoder(config: Config, about: dict[str, Any], device: "torch.device") -> "DualEncoder":
    """The encoder of the images: a caption's feature must lie in their space."""
    from infogrowth.encoders.loading import load_encoder

    known = about.get("encoder") or {}
    name = config.encoder or known.get("name")
    if name is None:
        raise UserError("give --encoder: that of the images, whose space a caption must share")
    encoder = load_encoder(name, device, config.vocabulary)
    if known.get("fingerprint") not in (None, encoder.fingerprint):
        raise UserError(
            f"{config.features or config.growth} was made with the encoder {known['name']} "
            f"({known['fingerprint'][:8]}), not {encoder.name} ({encoder.fingerprint[:8]}): "
            "captions and images must share one feature space"
        )
    return encoder


class _Pending(NamedTuple):
    """Samples that want a caption, in the order in which growth sees them.

    Attributes:
        samples: their ``id``, ``original_caption`` and ``original_alignment``.
        min_align: alignment under which they lie, None when all samples were asked for.
        examined: how many samples were looked at.
    """

    samples: pa.Table
    min_align: float | None
    examined: int


def _pending(config: Config) -> tuple[dict[str, Any], _Pending | None]:
    """What is known of the features, and the samples that want a caption; none where only a file
    of captions was given."""
    if config.growth is not None:
        growth = read_growth(config.growth)
        min_align = float(growth.settings["min_align"])
        return growth.settings, _Pending(growth.pending(), min_align, growth.totals["pairs"])
    if config.features is None:
        return {}, None
    features = open_features(config.features)
    if config.all:
        return features.description, _badly_aligned(features, None)
    thresholds = Thresholds.requested(config.min_align)
    seed_ids = read_ids(config.seed_ids) if config.seed_ids else frozenset()
    if not thresholds.resolved:
        seeds = _seeds(config)
        assert seeds is not None
        stream = stream_alignments(features, seed_ids) if thresholds.purity else None
        thresholds = thresholds.resolve(seeds.image, seeds.text, stream)  # the rules of growth
    return features.description, _badly_aligned(features, thresholds.min_align, seed_ids)


def _badly_aligned(
    features: FeatureStream, min_align: float | None, seeds: Collection[str] = ()
) -> _Pending:
    """Samples with an alignment under ``min_align`` (None: all of them).

    The alignment is computed and compared exactly as growth does it. Seeds are never filtered, so
    they need none; nor do samples whose features are unusable.
    """
    tables = []
    for batch in features.batches(_ROWS):
        image, text, wanted = unit_pairs(batch.image, batch.text)
        alignment = row_products(image, text)
        if min_align is not None:
            wanted &= is_below(alignment, min_align)
        wanted &= [name not in seeds for name in batch.ids]
        table = pa.table([batch.ids, batch.captions, alignment], schema=_SAMPLES)
        tables.append(table.filter(pa.array(wanted)))
    return _Pending(pa.concat_tables(tables), min_align, features.rows)


class _Seeds(NamedTuple):
    """Seeds with usable features, (N, D) float32 unit rows, and where their images are, if that is
    recorded."""

    ids: list[str]
    image: np.ndarray
    text: np.ndarray
    images: str | None


def _seeds(config: Config) -> _Seeds | None:
    """The seeds that the run knows of, as growth would find them; None if it knows of none."""
    if config.growth is not None:
        growth = read_growth(config.growth)
        table = growth.decisions(("id", "reason"))
        names = table.filter(pc.equal(table["reason"], Reason.SEED))["id"].to_pylist()
        if not names or growth.spaces != SPACES:
            return None
        image, text = (growth.kept_features(space, len(names)) for space in SPACES)
        return _Seeds(names, image, text, growth.settings.get("images"))
    folder = config.seed_features or config.features
    if folder is None or (config.seed_ids is None and config.seed_features is None):
        return None
    from infogrowth.commands.grow_session import found_seeds

    stream = open_features(folder)
    chosen = found_seeds(stream, read_ids(config.seed_ids)) if config.seed_ids else None
    seeds = FeatureBatch.join(list(stream.batches(_ROWS, chosen=chosen)))
    image, text, usable = unit_pairs(seeds.image, seeds.text)
    names = [seeds.ids[row] for row in np.flatnonzero(usable).tolist()]
    return _Seeds(names, image[usable], text[usable], stream.description.get("images"))


def _seed_check(
    config: Config, about: dict[str, Any], captioner: "Captioner", encoder: "DualEncoder"
) -> dict[str, int] | None:
    """How often the captioner's caption aligns better than the true one, on evenly spaced seeds;
    None without seeds.

    A captioner that often beats the truth picks what the encoder likes: alignment says little
    about its captions.
    """
    from infogrowth.encoders.dataset import decoded_batches, pairs_by_id

    seeds = _seeds(config) if config.seed_check > 0 else None
    images = config.lmdb or (seeds and seeds.images) or about.get("images")
    if seeds is None or images is None:
        return None
    count = min(config.seed_check, len(seeds.ids))
    rows = np.unique(np.linspace(0, len(seeds.ids) - 1, count).astype(int))
    pairs = pairs_by_id(images, [seeds.ids[row] for row in rows.tolist()], [""] * len(rows))
    whole = [(0, range(len(rows)))]
    check = {"seeds": 0, "captioned": 0, "better_than_true": 0}
    for batch in decoded_batches(pairs, captioner.preprocess, None, whole, _CHECKED_AT_ONCE, 0):
        captions = captioner.caption(batch.images)
        check["seeds"] += len(captions)
        written = [number for number, caption in enumerate(captions) if caption]
        if written:
            own = rows[np.array(batch.rows)[written]]
            text = encoder.encode_texts([captions[number] for number in written]).numpy()
            true = row_products(seeds.image[own], seeds.text[own])
            better = row_products(seeds.image[own], text) > true
            check["captioned"] += len(written)
            check["better_than_true"] += int(better.sum())
    return check


def _print_seed_check(check: dict[str, int]) -> None:
    share = check["better_than_true"] / max(check["captioned"], 1)
    warning = (
        ": alignment cannot separate its captions from true ones; ask more of them "
        "(grow --min-recaption-align auto)"
    )
    print(
        f"on {check['seeds']} seeds the captioner wrote {check['captioned']} captions; "
        f"{check['better_than_true']} of them ({share:.0%}) align better than the true one"
        f"{warning if share > 0.5 else ''}"
    )


def _refuse_nonsense(config: Config) -> None:
    """What can be seen before anything is loaded."""
    if config.features is None and config.growth is None and config.captions is None:
        raise UserError("give --features DIR, --growth DIR, or --captions FILE.json")
    is_auto = not Thresholds.requested(config.min_align).resolved and not config.all
    if config.features is not None and is_auto and not (config.seed_ids or config.seed_features):
        raise UserError("--min-align auto needs seeds: give --seed-ids or --seed-features")
    if config.captions is not None:
        read_json(config.captions, "the file of captions")  # a slip costs no minutes of work
