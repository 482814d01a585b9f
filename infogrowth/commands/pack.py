"""`infogrowth pack`, and scripts/cc3m_lmdb_writer.py: downloaded pairs into LMDBs and annotations.

See `run` for what it reads and writes.
"""

import os
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from infogrowth.config import option
from infogrowth.data.images import MAX_PIXELS
from infogrowth.data.packing import Packed, pack
from infogrowth.data.sources import Source, open_splits
from infogrowth.errors import UserError
from infogrowth.remote import is_remote, retry_summary

HELP = "pack downloaded image-caption pairs into an LMDB and an annotation JSON"


@dataclass(frozen=True)
class Config:
    """Options of the writer."""

    image_root: str = option(
        help="folder with cc3m_train/ and cc3m_val/, or with one set of pairs; or its address: s3://…"
    )
    output_root: str | None = option(
        None,
        "where the results go; none: into --image_root, or into its folder packed/ if it is a "
        "downloader's own folder",
    )
    workers: int | Literal["auto"] = option(
        "auto", "threads that decode; auto: one per processor", min=1
    )
    max_pixels: int = option(MAX_PIXELS, "larger images are skipped", min=1)


def run(config: Config) -> int:
    """Pack image–caption pairs into LMDBs and annotation JSON files.

    Reads all that lies below --image_root: images with .txt or .json beside them or in a metadata
    file, in folders of any depth, and shards (.tar, .parquet) as img2dataset, webdataset and
    Hugging Face write them. What folders and files name val or test is a set of its own. Writes
    lmdb_train, cc3m_train.json and lmdb_train_skipped.jsonl, and the same for val and test. Bad
    samples are skipped and recorded; a killed run continues when it is started again.
    """
    root = config.image_root
    if not is_remote(root) and not os.path.isdir(root):
        raise UserError(f"--image_root {root} does not exist or is not a folder")
    if is_remote(root) and config.output_root is None:
        raise UserError(f"give --output_root: results cannot be written to {root}")
    sources = open_splits(root)
    output = output_folder(Path(root), config.output_root, sources)
    workers = len(os.sched_getaffinity(0)) if config.workers == "auto" else config.workers
    for split, source in sources.items():
        packed = pack(source, output, split, workers, config.max_pixels)
        print(summary(split, source, packed), flush=True)
    if (retried := retry_summary()) is not None:
        print(retried)
    return 0


def output_folder(root: Path, given: str | None, sources: dict[str, Source]) -> Path:
    """Where the results go.

    img2dataset reads every JSON file in its own folder as a shard's statistics, so no result may
    lie there.
    """
    containers = [container for source in sources.values() for container in source.containers]
    shards = [c.name for c in containers if c.kind != "folder"]
    downloads = {(root / name).parent.resolve() for name in shards}
    if given is None:
        return root / "packed" if root.resolve() in downloads else root
    if Path(given).resolve() in downloads:
        raise UserError(
            f"--output_root {given} is the downloader's own folder, whose resume would stumble "
            "over the JSON files; give another one"
        )
    return Path(given)


def summary(split: str, source: Source, packed: Packed) -> str:
    """What was found, packed, skipped and ignored, in a few lines."""
    earlier = f" ({packed.resumed} of them by an earlier run)" if packed.resumed else ""
    earlier += f" ({packed.replaced} anew: their images changed)" if packed.replaced else ""
    ignored = ", ".join(f"{count} {kind}" for kind, count in source.ignored.most_common())
    reasons = Counter(reason.split(":")[0] for _, reason in packed.skipped)
    lines = [
        f"{source.path} ({split}, {source.layout}): {packed.samples} samples, "
        f"{packed.stored} packed{earlier}, {len(packed.skipped)} skipped",
        *(f"  {count:>8}  {reason}" for reason, count in reasons.most_common()),
        *([f"  ignored: {ignored}"] if ignored else []),
        *(f"  repaired {count} times: {repair}" for repair, count in packed.repairs.most_common()),
        f"  images       {packed.lmdb}",
        f"  annotations  {packed.annotations}",
    ]
    if packed.skipped:
        lines.append(f"  skipped      {packed.skipped_list}")
    return "\n".join(lines)
