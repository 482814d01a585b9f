"""`infogrowth embed`: image and text features of a dataset, as clip-retrieval shards."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from infogrowth.config import option
from infogrowth.errors import UserError
from infogrowth.remote import retry_summary

if TYPE_CHECKING:
    from infogrowth.encoders.embedding import Summary
    from infogrowth.encoders.protocols import DualEncoder

HELP = "compute image and text features of all pairs"

logger = logging.getLogger(__name__)

COMPARED = {
    "kind": "command",
    "encoder": "encoder",
    "samples": "annotation file or source",
    "rows": "number of samples",
    "shard_size": "shard size",
}
"""What an interrupted run and its continuation must agree on, and how the error calls it."""


@dataclass(frozen=True)
class Config:
    """Options of `embed`."""

    output: str = option(help="the features folder to write; an interrupted one is continued")
    lmdb: str | None = option(None, help="LMDB with the images, from cc3m_lmdb_writer.py")
    annotations: str | None = option(None, help="annotation JSON of the LMDB: image and caption")
    source: str | None = option(
        None,
        help="instead of an LMDB: a folder of images with captions, or of shards (.tar, .parquet), "
        "as img2dataset, webdataset and Hugging Face write them",
    )
    encoder: str = option(
        "tiny",
        help="tiny (bundled), a BLIP folder or checkpoint, an official .pth, a Hugging Face "
        "folder or name such as Salesforce/blip-itm-base-coco",
    )
    vocabulary: str | None = option(
        None, help="vocab.txt for a BLIP checkpoint that has none beside it"
    )
    batch_size: int | Literal["auto"] = option(
        "auto", help="pairs per batch; auto: 64 on a CPU, 256 on a GPU"
    )
    workers: int | Literal["auto"] = option("auto", help="processes that decode images")
    shard_size: int | Literal["auto"] = option("auto", help="pairs per shard")
    part: str | None = option(
        None, help="3/16: only the third of 16 parts, so that independent jobs share the folder"
    )
    device: str = option("auto", help="auto, cpu, cuda or cuda:N")


def run(config: Config) -> int:
    """Embed the dataset; under the launcher each rank takes the next shard when it is free."""
    _refuse_nonsense(config)
    from infogrowth import distributed
    from infogrowth.encoders import dataset
    from infogrowth.encoders.embedding import embed_pairs
    from infogrowth.encoders.loading import load_encoder
    from infogrowth.encoders.shards import ShardedOutput, automatic_shard_size

    with distributed.process_group(config.device, collectives_on="cpu") as device:
        if config.source is not None:
            pairs = dataset.pairs_of_source(config.source)
        else:
            assert config.lmdb is not None and config.annotations is not None
            pairs = dataset.pairs_of_lmdb(config.lmdb, config.annotations)
        if not len(pairs):
            raise UserError(f"{config.annotations or config.source} holds no samples to embed")
        with distributed.main_first():  # rank 0 downloads, the others find the files
            encoder = load_encoder(config.encoder, device, config.vocabulary)
        size = config.shard_size
        size = automatic_shard_size(len(pairs)) if size == "auto" else size
        identity = {"kind": "features", "encoder": encoder_identity(encoder), **pairs.origin}
        captions: Sequence[str | None] = pairs.captions or [None] * len(pairs)
        samples = list(zip(pairs.ids, captions, strict=True))
        output = ShardedOutput(
            config.output, identity, COMPARED, len(pairs), size, config.part, samples
        )
        if output.finished:
            logger.info("%s is finished already: nothing to do", config.output)
        result = embed_pairs(
            pairs, encoder, output, device,
            automatic(config.batch_size, {"cpu": 64, "cuda": 256}[device.type]),
            automatic(config.workers, None),
        )  # fmt: skip
        if distributed.is_main():
            print_summary(config.output, result)
    return 0


def automatic(value: Any, default: Any) -> Any:
    """An option's value, or what stands for its "auto"."""
    return default if value == "auto" else value


def encoder_identity(encoder: "DualEncoder") -> dict[str, Any]:
    """How features.json names the encoder, and `grow` tells whether two folders go together."""
    return {
        "name": encoder.name,
        "fingerprint": encoder.fingerprint,
        "dimension": encoder.dimension,
    }


def print_summary(output: str, result: "Summary") -> None:
    """The table at the end: what is in the folder, and how this run went."""
    description = result.description
    skipped: dict[str, int] = description.get("skipped", {})
    rows = [("samples", description["rows"])]
    if description["finished"]:
        rows += [("embedded", description["pairs"]), ("skipped", sum(skipped.values()))]
        rows += [(f"  {reason}", count) for reason, count in sorted(skipped.items())]
    rows += [("dimension", description["encoder"]["dimension"]), ("shards", description["shards"])]
    width = max(len(name) for name, _ in rows)
    for name, count in rows:
        print(f"{name:<{width}}  {count:>12,}")
    if result.pairs:
        timing = result.timing
        print(
            f"{result.pairs:,} pairs in {result.seconds:.1f} s: "
            f"{result.pairs / result.seconds:,.0f} pairs/s, bound by {timing.bound()} "
            f"(waited {timing.decoding:.1f} s for decoding, {timing.computing:.1f} s for the "
            f"model, {timing.writing:.1f} s for writing)"
        )
    if description["finished"]:
        print(f"written: {output}")
    else:
        print(f"this part is written; {output} is finished once all parts are")
    if (retried := retry_summary()) is not None:
        print(retried)


def _refuse_nonsense(config: Config) -> None:
    """What can be said before anything is loaded."""
    if config.source is not None:
        if config.lmdb is not None or config.annotations is not None:
            raise UserError("--source brings its own captions: leave out --lmdb and --annotations")
    elif config.lmdb is None or config.annotations is None:
        raise UserError("give --lmdb DIR with --annotations FILE.json, or --source PATH")
    refuse_bad_numbers(config)


def refuse_bad_numbers(config: Any) -> None:
    """Batch size, shard size, workers and part that mean nothing."""
    for name, minimum in (("batch_size", 1), ("shard_size", 1), ("workers", 0)):
        value = getattr(config, name)
        if value != "auto" and value < minimum:
            raise UserError(f"--{name.replace('_', '-')} must be at least {minimum}, not {value}")
    if config.part is not None:
        from infogrowth.encoders.shards import parse_part

        parse_part(config.part)
