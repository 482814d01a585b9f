"""`infogrowth recaption`: new captions, and their features, for samples whose own do not fit."""

import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from infogrowth.annotations import read_ids
from infogrowth.commands.embed import (
    COMPARED,
    encoder_identity,
    print_summary,
    refuse_bad_numbers,
)
from infogrowth.config import option
from infogrowth.errors import UserError
from infogrowth.files import read_json
from infogrowth.growth.thresholds import Thresholds

if TYPE_CHECKING:
    import torch

    from infogrowth.encoders.dataset import CaptionTable, PairTable
    from infogrowth.encoders.embedding import Summary
    from infogrowth.encoders.pending import PendingRecaptions
    from infogrowth.encoders.protocols import Captioner, DualEncoder

HELP = "write new captions and their features for badly aligned samples"

logger = logging.getLogger(__name__)


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
    beams: int = option(3, help="hypotheses of the beam search")
    max_tokens: int = option(30, help="longest caption, in tokens")
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
        "auto", help="images per batch; auto: 16 on a CPU, 128 on a GPU"
    )
    workers: int | Literal["auto"] = option("auto", help="processes that decode images")
    shard_size: int | Literal["auto"] = option("auto", help="samples per shard")
    part: str | None = option(
        None, help="3/16: only the third of 16 parts, so that independent jobs share the folder"
    )
    device: str = option("auto", help="auto, cpu, cuda or cuda:N")


def run(config: Config) -> int:
    """Recaption; under the launcher each rank takes the next shard when it is free."""
    _refuse_nonsense(config)
    from infogrowth import distributed
    from infogrowth.encoders.loading import load_captioner, load_encoder

    with distributed.process_group(config.device, collectives_on="cpu") as device:
        told = _description(config)
        pending = _pending(config)
        samples, origin = (
            _imported(config, pending) if config.captions else _images(config, pending, told)
        )
        with distributed.main_first():  # rank 0 downloads, the others find the files
            encoder = load_encoder(_encoder_name(config, told), device, config.vocabulary)
            captioner = None
            if config.captions is None:
                captioner = load_captioner(
                    config.captioner, device, config.vocabulary,
                    config.prompt, config.beams, config.max_tokens, encoder, config.min_margin,
                )  # fmt: skip
        _refuse_other_encoder(config, encoder, told)
        if captioner is not None:
            origin["seed_check"] = distributed.on_main(
                lambda: _checked_on_seeds(config, told, captioner, encoder)
            )
        result = _write(config, samples, origin, pending, captioner, encoder, device)
        if distributed.is_main():
            if pending is not None:
                under = "" if pending.min_align is None else f" under {pending.min_align:.4f}"
                print(f"{len(pending.ids):,} of {pending.examined:,} samples{under}")
            if check := origin.get("seed_check"):
                print(_check_line(check))
            print_summary(config.output, result)
    return 0


def _checked_on_seeds(
    config: Config, told: dict[str, Any], captioner: "Captioner", encoder: "DualEncoder"
) -> "dict[str, Any] | None":
    """How the captioner's captions align where the true caption is known; None without seeds."""
    from infogrowth.encoders.pending import check_captioner, seeds_of

    seeds = seeds_of(config.features, config.growth, config.seed_ids, config.seed_features)
    where = config.lmdb or (seeds and seeds.images) or told.get("images")
    if seeds is None or config.seed_check < 1 or where is None:
        return None
    return check_captioner(seeds, where, captioner, encoder, config.seed_check)


def _check_line(check: dict[str, Any]) -> str:
    share = check["better_than_true"] / max(check["captioned"], 1)
    line = (
        f"on {check['seeds']} seeds the captioner wrote {check['captioned']} captions; "
        f"{check['better_than_true']} of them ({share:.0%}) align better than the true one"
    )
    if share > 0.5:
        line += (
            ": alignment cannot tell its captions from true ones; ask more of them "
            "(grow --min-recaption-align auto)"
        )
    return line


def _write(
    config: Config,
    samples: "PairTable | CaptionTable",
    origin: dict[str, Any],
    pending: "PendingRecaptions | None",
    captioner: "Captioner | None",
    encoder: "DualEncoder",
    device: "torch.device",
) -> "Summary":
    from infogrowth.commands.embed import automatic
    from infogrowth.encoders.dataset import CaptionTable
    from infogrowth.encoders.embedding import embed_texts, recaption_images
    from infogrowth.encoders.shards import ShardedOutput, automatic_shard_size

    size = config.shard_size
    size = automatic_shard_size(len(samples)) if size == "auto" else size
    identity = {
        "kind": "recaptions",
        "encoder": encoder_identity(encoder),
        "captioner": captioner and {"name": captioner.name, "fingerprint": captioner.fingerprint},
        **origin,
        "min_align": pending and pending.min_align,
    }
    compared = {**COMPARED, "captioner": "captioner", "samples": "choice of samples"}
    output = ShardedOutput(config.output, identity, compared, len(samples), size, config.part)
    if output.finished:
        logger.info("%s is finished already: nothing to do", config.output)
    batch_size = automatic(config.batch_size, {"cpu": 16, "cuda": 128}[device.type])
    if isinstance(samples, CaptionTable):
        return embed_texts(samples, encoder, output, device, batch_size)
    assert pending is not None and captioner is not None
    extra: dict[str, list[Any]] = {
        "original_caption": pending.captions,
        "original_alignment": pending.alignments,
    }
    workers = automatic(config.workers, None)
    return recaption_images(samples, captioner, encoder, output, device, batch_size, workers, extra)


def _pending(config: Config) -> "PendingRecaptions | None":
    """The samples that want a caption; None when only a file of captions was given."""
    from infogrowth.encoders.pending import (
        open_pairs,
        pending_in_features,
        pending_in_growth,
        seeds_in_features,
        thresholds_of_seeds,
    )

    if config.growth is not None:
        return pending_in_growth(config.growth)
    if config.features is None:
        return None
    features = open_pairs(config.features)
    seeds = read_ids(config.seed_ids) if config.seed_ids else frozenset()
    if config.all:
        return pending_in_features(features, None)
    thresholds = Thresholds.requested(config.min_align)
    if not thresholds.resolved:
        if config.seed_ids:
            batches, what = seeds_in_features(features, seeds), config.seed_ids
        else:
            assert config.seed_features is not None
            batches, what = open_pairs(config.seed_features).batches(16_384), config.seed_features
        thresholds = thresholds_of_seeds(thresholds, batches, what, features, seeds)
    return pending_in_features(features, thresholds.min_align, seeds)


def _images(
    config: Config, pending: "PendingRecaptions | None", told: dict[str, Any]
) -> "tuple[PairTable | CaptionTable, dict[str, Any]]":
    """The images of the samples that need a caption, and how features.json records them."""
    from infogrowth.encoders.dataset import PairTable, pairs_by_id
    from infogrowth.encoders.shards import list_digest

    assert pending is not None
    where = config.lmdb or told.get("images")
    if where is None:
        raise UserError(
            f"{config.features or config.growth} does not record where its images are: give --lmdb"
        )
    pairs = pairs_by_id(where, pending.ids, pending.captions)
    digest = list_digest(pending.ids)
    return PairTable(pending.ids, {}, pairs), {"images": where, "samples": digest}


def _imported(
    config: Config, pending: "PendingRecaptions | None"
) -> "tuple[PairTable | CaptionTable, dict[str, Any]]":
    """Captions from a file, for the samples that want one or, if none are known, for all in it."""
    from infogrowth.encoders.dataset import table_of_captions
    from infogrowth.encoders.shards import list_digest

    assert config.captions is not None
    table = table_of_captions(config.captions, None if pending is None else pending.ids)
    lines = [f"{name}\t{text}" for name, text in zip(table.ids, table.captions, strict=True)]
    return table, {"captions": config.captions, "samples": list_digest(lines)}


def _description(config: Config) -> dict[str, Any]:
    """What the features or growth folder tells of its encoder and pictures."""
    if config.growth is not None:
        from infogrowth.growth.ledger import read_growth

        return read_growth(config.growth).settings
    if config.features is not None:
        from infogrowth.data.features import open_features

        return open_features(config.features).description
    return {}


def _encoder_name(config: Config, told: dict[str, Any]) -> str:
    name = config.encoder or (told.get("encoder") or {}).get("name")
    if name is None:
        raise UserError(
            "give --encoder: a caption's feature must come from the encoder of the images"
        )
    return name


def _refuse_other_encoder(config: Config, encoder: "DualEncoder", told: dict[str, Any]) -> None:
    known = (told.get("encoder") or {}).get("fingerprint")
    if known is not None and known != encoder.fingerprint:
        raise UserError(
            f"{config.features or config.growth} was made with the encoder "
            f"{told['encoder']['name']} ({known[:8]}), not {encoder.name} "
            f"({encoder.fingerprint[:8]}): captions and images must share one feature space"
        )


def _refuse_nonsense(config: Config) -> None:
    """What can be told before anything is loaded."""
    if config.features is not None and config.growth is not None:
        raise UserError("give --features (before growing) or --growth (after), not both")
    if config.features is None and config.growth is None and config.captions is None:
        raise UserError("give --features DIR, --growth DIR, or --captions FILE.json")
    if config.all and config.features is None:
        raise UserError("--all goes with --features DIR")
    automatic = not Thresholds.requested(config.min_align).resolved and not config.all
    without_seeds = config.seed_ids is None and config.seed_features is None
    if config.features is not None and automatic and without_seeds:
        raise UserError("--min-align auto needs seeds: give --seed-ids or --seed-features")
    if config.beams < 1 or config.max_tokens < 1:
        raise UserError("--beams and --max-tokens must be at least 1")
    if config.captions is not None:
        read_json(config.captions, "the file of captions")  # a slip is told before minutes of work
    refuse_bad_numbers(config)
