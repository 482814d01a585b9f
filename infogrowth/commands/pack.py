"""`infogrowth pack`, and scripts/cc3m_lmdb_writer.py: downloaded pairs into LMDBs and annotations.

See `run` for what it reads and writes.
"""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from infogrowth.config import option
from infogrowth.data.images import MAX_PIXELS
from infogrowth.data.packing import Packed, Target, pack
from infogrowth.data.sources import Source, open_source
from infogrowth.errors import UserError

HELP = "pack downloaded image-caption pairs into an LMDB and an annotation JSON"
DOWNLOADED = ("files", "webdataset", "parquet")  # img2dataset's layouts
RESULTS = ("cc3m_train.json", "cc3m_val.json")
SPLITS = {"train": ("cc3m_train", "train"), "val": ("cc3m_val", "val", "validation")}


@dataclass(frozen=True)
class Config:
    """Options of the writer."""

    image_root: str = option(help="folder with cc3m_train/ and cc3m_val/, or with one set of pairs")
    output_root: str | None = option(
        None,
        "where the results go; none: into --image_root, or into its folder packed/ if it is a "
        "downloader's own folder",
    )
    workers: int | Literal["auto"] = option("auto", "threads that decode; auto: one per processor")
    max_pixels: int = option(MAX_PIXELS, "larger images are skipped")

    def __post_init__(self) -> None:
        if self.workers != "auto" and self.workers < 1:
            raise UserError(f"--workers must be at least 1 or auto, not {self.workers}")
        if self.max_pixels < 1:
            raise UserError(f"--max_pixels must be at least 1, not {self.max_pixels}")


def run(config: Config) -> int:
    """Pack image–caption pairs into LMDBs and annotation JSON files.

    Reads --image_root/cc3m_train and cc3m_val (or train and validation), or --image_root itself as
    the training set: img2dataset's files, webdataset and parquet layouts, pictures with .json or
    .txt beside them, or a Hugging Face imagefolder. Writes lmdb_train, cc3m_train.json and
    lmdb_train_skipped.jsonl, and the same for val. Bad samples are skipped and recorded; a killed
    run continues when it is started again.
    """
    root = Path(config.image_root)
    sources = find_splits(root)
    output = output_folder(root, config.output_root, sources)
    workers = len(os.sched_getaffinity(0)) if config.workers == "auto" else config.workers
    for split, source in sources.items():
        target = Target(
            output / f"lmdb_{split}",
            output / f"cc3m_{split}.json",
            output / f"lmdb_{split}_skipped.jsonl",
        )
        packed = pack(source, target, workers, config.max_pixels)
        print(summary(source, target, packed), flush=True)
    return 0


def find_splits(root: Path) -> dict[str, Source]:
    """The sets of pairs below ``root``, all opened before any is packed."""
    if not root.is_dir():
        raise UserError(f"--image_root {root} does not exist or is not a folder")
    found = {
        split: next((root / name for name in names if (root / name).is_dir()), None)
        for split, names in SPLITS.items()
    }
    folders = {split: folder for split, folder in found.items() if folder is not None}
    if not folders:
        folders = {"train": root}
    return {split: open_source(folder, ignore=RESULTS) for split, folder in folders.items()}


def output_folder(root: Path, given: str | None, sources: dict[str, Source]) -> Path:
    """Where the results go.

    img2dataset reads every JSON file in its own folder as a shard's statistics, so no result may
    lie there.
    """
    downloads = {s.path.resolve() for s in sources.values() if s.layout in DOWNLOADED}
    if given is None:
        return root / "packed" if root.resolve() in downloads else root
    if Path(given).resolve() in downloads:
        raise UserError(
            f"--output_root {given} is the downloader's own folder, whose resume would stumble "
            "over the JSON files; give another one"
        )
    return Path(given)


def summary(source: Source, target: Target, packed: Packed) -> str:
    """What was packed, in a few lines."""
    earlier = f" ({packed.resumed} of them by an earlier run)" if packed.resumed else ""
    lines = [
        f"{source.path} ({source.layout}): {packed.samples} samples, "
        f"{packed.stored} packed{earlier}, {len(packed.skipped)} skipped",
        *(f"  {count:>8}  {reason}" for reason, count in packed.reasons().most_common()),
        f"  images       {target.lmdb}",
        f"  annotations  {target.annotations}",
    ]
    if packed.skipped:
        lines.append(f"  skipped      {target.skipped}")
    return "\n".join(lines)
