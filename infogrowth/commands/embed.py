"""`infogrowth embed`: compute image and text features of all pairs."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from infogrowth.config import option
from infogrowth.errors import UserError

if TYPE_CHECKING:
    from infogrowth.encoders.embedding import Summary
    from infogrowth.encoders.models import DualEncoder


@dataclass(frozen=True, kw_only=True)
class EncodingConfig:
    """Options of the commands that run a model over a dataset, shard by shard."""

    output: str = option(help="the folder to write; an interrupted one is continued")
    vocabulary: str | None = option(None, "vocab.txt for BLIP checkpoints that have none")
    batch_size: int | None = option(None, "samples per batch; auto: what suits the device", min=1)
    workers: int | None = option(None, help="processes that decode images, or auto", min=0)
    shard_size: int | None = option(None, help="samples per shard, or auto", min=1)
    part: str | None = option(None, "3/16: the third of 16 parts, for jobs that share the folder")
    device: str = option("auto", help="auto, cpu, cuda or cuda:N")


@dataclass(frozen=True, kw_only=True)
class Config(EncodingConfig):
    """Options of `embed`."""

    lmdb: str | None = option(None, help="LMDB with the images, from cc3m_lmdb_writer.py")
    annotations: str | None = option(None, help="annotation JSON of the LMDB: image and caption")
    source: str | None = option(
        None,
        help="instead of an LMDB: a folder of images with captions, or of shards (.tar, .parquet), "
        "as img2dataset, webdataset and Hugging Face write them",
        excludes="lmdb annotations",
    )
    encoder: str = option(
        "tiny",
        help="tiny (bundled), a BLIP folder or checkpoint, an official .pth, a Hugging Face "
        "folder or name such as Salesforce/blip-itm-base-coco",
    )


def run(config: Config) -> int:
    """Embed the dataset; under the launcher each rank takes the next shard when it is free."""
    part = parse_part(config.part)
    if config.source is None and None in (config.lmdb, config.annotations):
        raise UserError("give --lmdb DIR with --annotations FILE.json, or --source PATH")
    from infogrowth import distributed
    from infogrowth.data.feature_writer import FeatureWriter
    from infogrowth.encoders.dataset import Pairs, SourcePairs, pairs_of_lmdb
    from infogrowth.encoders.embedding import embed_pairs
    from infogrowth.encoders.loading import load_encoder

    with distributed.process_group(config.device, collectives_on="cpu") as device:
        pairs: Pairs
        if config.source is not None:
            pairs = SourcePairs(config.source)
        else:
            pairs = pairs_of_lmdb(str(config.lmdb), str(config.annotations))
        if not pairs.ids:
            raise UserError(f"{config.annotations or config.source} holds no samples to embed")
        with distributed.main_first():  # rank 0 downloads, the others find the files
            encoder = load_encoder(config.encoder, device, config.vocabulary)
        identity = {"kind": "features", "encoder": encoder_identity(encoder), **pairs.origin}
        rows = len(pairs.ids)
        captions: Sequence[str | None] = pairs.captions or [None] * rows
        output = FeatureWriter(
            config.output, identity, rows, config.shard_size, part,
            samples=list(zip(pairs.ids, captions, strict=True)),
        )  # fmt: skip
        batch_size = config.batch_size or {"cpu": 64, "cuda": 256}[device.type]
        result = embed_pairs(pairs, encoder, output, device, batch_size, config.workers)
        if distributed.is_main():
            print_summary(config.output, result)
    return 0


def parse_part(part: str | None) -> tuple[int, int]:
    """``"3/16"`` as (2, 16): the third of 16 jobs takes shards 2, 18, 34, …; None is all of them.
    Raises UserError: no such part."""
    match = re.fullmatch(r"(\d+)/(\d+)", "1/1" if part is None else part)
    number, count = (int(match[1]), int(match[2])) if match else (0, 0)
    if not 1 <= number <= count:
        raise UserError(f"--part must be one of 1/N … N/N, for example 3/16, not {part!r}")
    return number - 1, count


def images_of(path: object, about: Mapping[str, Any], given: str | None, flag: str) -> str:
    """Where the images are: what was given with ``flag``, else what a folder records ``about``
    itself; UserError where neither says."""
    if images := given or about.get("images"):
        return str(images)
    raise UserError(f"{path} does not record where its images are: give {flag}")


def encoder_identity(encoder: "DualEncoder") -> dict[str, Any]:
    """How features.json names the encoder, and `grow` knows whether two folders go together."""
    return {name: getattr(encoder, name) for name in ("name", "fingerprint", "dimension")}


def print_summary(output: str, result: "Summary") -> None:
    """The table at the end: what is in the folder, and how this run went."""
    about = result.description
    rows = {"samples": about["rows"]}
    if about["finished"]:
        skipped: dict[str, int] = about.get("skipped", {})
        rows |= {"embedded": about["pairs"], "skipped": sum(skipped.values())}
        rows |= {f"  {reason}": count for reason, count in sorted(skipped.items())}
    rows |= {"dimension": about["encoder"]["dimension"], "shards": about["shards"]}
    width = max(map(len, rows))
    for name, count in rows.items():
        print(f"{name:<{width}}  {count:>12,}")
    if result.pairs:
        waited = ", ".join(f"{time:.1f} s for {what}" for what, time in result.timing.items())
        print(
            f"{result.pairs:,} pairs in {result.seconds:.1f} s: "
            f"{result.pairs / result.seconds:,.0f} pairs/s, bound by "
            f"{max(result.timing, key=result.timing.__getitem__)} (waited {waited})"
        )
    if about["finished"]:
        print(f"written: {output}")
    else:
        print(f"this part is written; {output} is finished once all parts are")
