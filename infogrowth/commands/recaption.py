"""`infogrowth recaption`: new captions, and their features, for samples whose own do not fit."""

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

from infogrowth.annotations import read_ids
from infogrowth.commands.embed import (
    COMPARED,
    automatic,
    encoder_identity,
    parse_part,
    print_summary,
)
from infogrowth.config import option
from infogrowth.errors import UserError
from infogrowth.files import read_json
from infogrowth.growth.thresholds import Thresholds

if TYPE_CHECKING:
    import torch

    from infogrowth.encoders.dataset import Pairs
    from infogrowth.encoders.models import Captioner, DualEncoder
    from infogrowth.encoders.pending import PendingRecaptions, Seeds

HELP = "write new captions and their features for badly aligned samples"


@dataclass(frozen=True)
class Config:
    """Options of `recaption`."""

    output: str = option(help="the recaptions folder to write; an interrupted one is continued")
    features: str | None = option(
        None, help="before growing: recaption what lies under --min-align in this features folder"
    )
    growth: str | None = option(
        None, help="after growing: recaption what this growth folder dropped for its alignment"
    )
    min_align: float | str = option(
        0.4, help="with --features: a number, auto or auto:0.98 (from the seeds, as `grow` does)"
    )
    seed_ids: str | None = option(None, help="JSON list of seed ids; seeds are left as they are")
    seed_features: str | None = option(None, help="features folder of the seeds")
    all: bool = option(False, help="with --features: recaption every sample")
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
    min_margin: float = option(
        0.0, help="with nearest:FILE: how much nearer the best caption must be than the next"
    )
    seed_check: int = option(
        100, help="seeds on which the captioner's captions are compared with the true ones"
    )
    lmdb: str | None = option(None, help="LMDB or source of the images [that of the features]")
    encoder: str | None = option(None, help="encoder of the text [that of the features]")
    vocabulary: str | None = option(
        None, help="vocab.txt for BLIP checkpoints that have none beside them"
    )
    batch_size: int | Literal["auto"] = option(
        "auto", help="images per batch; auto: 16 on a CPU, 128 on a GPU", min=1
    )
    workers: int | Literal["auto"] = option("auto", help="processes that decode images", min=0)
    shard_size: int | Literal["auto"] = option("auto", help="samples per shard", min=1)
    part: str | None = option(
        None, help="3/16: only the third of 16 parts, so that independent jobs share the folder"
    )
    device: str = option("auto", help="auto, cpu, cuda or cuda:N")


def run(config: Config) -> int:
    """Recaption; under the launcher each rank takes the next shard when it is free."""
    part = parse_part(config.part)
    _refuse_nonsense(config)
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
        compared = {**COMPARED, "captioner": "captioner", "samples": "choice of samples"}
        size = automatic(config.shard_size, None)
        output = FeatureWriter(config.output, identity, compared, len(pairs.ids), size, part)
        batch_size = automatic(config.batch_size, {"cpu": 16, "cuda": 128}[device.type])
        extra: dict[str, list[Any]] = {}
        if captioner is not None and pending is not None:
            extra = {"original_caption": pending.captions, "original_alignment": pending.alignments}
        workers = automatic(config.workers, None) if captioner is not None else 0
        result = embed_pairs(pairs, encoder, output, device, batch_size, workers, captioner, extra)
        if distributed.is_main():
            if pending is not None:
                under = "" if pending.min_align is None else f" under {pending.min_align:.4f}"
                print(f"{len(pending.ids):,} of {pending.examined:,} samples{under}")
            if found := checked.get("seed_check"):
                _print_seed_check(found)
            print_summary(config.output, result)
    return 0


def _pairs(config: Config, about: dict[str, Any], pending: "PendingRecaptions | None") -> "Pairs":
    """Captions from a file (of all in it, if no samples are known), or the pending images."""
    from infogrowth.encoders.dataset import captions_of_file, pairs_by_id

    if config.captions is not None:
        return captions_of_file(config.captions, None if pending is None else pending.ids)
    assert pending is not None
    images = config.lmdb or about.get("images")
    if images is None:
        raise UserError(
            f"{config.features or config.growth} does not record where its images are: give --lmdb"
        )
    return pairs_by_id(images, pending.ids, pending.captions)


def _encoder(config: Config, about: dict[str, Any], device: "torch.device") -> "DualEncoder":
    """The encoder of the images: a caption's feature must lie in their space."""
    from infogrowth.encoders.loading import load_encoder

    known = about.get("encoder") or {}
    name = config.encoder or known.get("name")
    if name is None:
        raise UserError(
            "give --encoder: a caption's feature must come from the encoder of the images"
        )
    encoder = load_encoder(name, device, config.vocabulary)
    if known.get("fingerprint") not in (None, encoder.fingerprint):
        raise UserError(
            f"{config.features or config.growth} was made with the encoder {known['name']} "
            f"({known['fingerprint'][:8]}), not {encoder.name} ({encoder.fingerprint[:8]}): "
            "captions and images must share one feature space"
        )
    return encoder


def _pending(config: Config) -> "tuple[dict[str, Any], PendingRecaptions | None]":
    """What the features or growth folder records of its encoder and images, and the samples that
    want a caption: none where only a file of captions was given."""
    from infogrowth.encoders import pending
    from infogrowth.growth.ledger import read_growth

    if config.growth is not None:
        return read_growth(config.growth).settings, pending.pending_in_growth(config.growth)
    if config.features is None:
        return {}, None
    features = pending.open_pairs(config.features)
    if config.all:
        return features.description, pending.pending_in_features(features, None)
    thresholds = Thresholds.requested(config.min_align)
    ids = read_ids(config.seed_ids) if config.seed_ids else frozenset()
    if not thresholds.resolved:
        seeds = _seeds(config)
        assert seeds is not None and seeds.text is not None
        stream = pending.stream_alignments(features, ids) if thresholds.purity else None
        thresholds = thresholds.resolve(seeds.image, seeds.text, stream)  # the rules of growth
    found = pending.pending_in_features(features, thresholds.min_align, ids)
    return features.description, found


def _seeds(config: Config) -> "Seeds | None":
    """The seeds that the run knows of, as growth would find them; None if it knows of none."""
    from infogrowth.encoders.pending import seeds_of_features, seeds_of_growth

    if config.growth is not None:
        return seeds_of_growth(config.growth)
    folder = config.seed_features or config.features
    if folder is None or (config.seed_ids is None and config.seed_features is None):
        return None
    ids = read_ids(config.seed_ids) if config.seed_ids else None
    return seeds_of_features(folder, ids, config.seed_ids or folder)


def _seed_check(
    config: Config, about: dict[str, Any], captioner: "Captioner", encoder: "DualEncoder"
) -> dict[str, int] | None:
    """How the captioner's captions align where the true caption is known; None without seeds."""
    from infogrowth.encoders.pending import check_captioner

    seeds = _seeds(config) if config.seed_check > 0 else None
    images = config.lmdb or (seeds and seeds.images) or about.get("images")
    if seeds is None or images is None:
        return None
    return check_captioner(seeds, images, captioner, encoder, config.seed_check)


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
    if config.features is not None and config.growth is not None:
        raise UserError("give --features (before growing) or --growth (after), not both")
    if config.features is None and config.growth is None and config.captions is None:
        raise UserError("give --features DIR, --growth DIR, or --captions FILE.json")
    if config.all and config.features is None:
        raise UserError("--all goes with --features DIR")
    is_auto = not Thresholds.requested(config.min_align).resolved and not config.all
    if config.features is not None and is_auto and not (config.seed_ids or config.seed_features):
        raise UserError("--min-align auto needs seeds: give --seed-ids or --seed-features")
    if config.captions is not None:
        read_json(config.captions, "the file of captions")  # a slip costs no minutes of work
