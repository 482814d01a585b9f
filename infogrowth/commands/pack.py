"""`infogrowth pack`: pack downloaded image-caption pairs into an LMDB and an annotation JSON.

scripts/cc3m_lmdb_writer.py is the same. Verified, resumable, every loss recorded. No log is kept:
the samples are gone through in the same order every time, and one whose very bytes are in the LMDB
has been verified by an earlier run. So a killed run that is started again ends with the same files
as one that was never killed.
"""

import json
import logging
import os
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

from infogrowth.threads import run_ahead

from tqdm import tqdm

from infogrowth.annotations import Annotation, save_annotations
from infogrowth.config import option
from infogrowth.data.image_stores import LmdbWriter, lmdb_key
from infogrowth.data.images import MAX_PIXELS, decode_image
from infogrowth.data.sources import Sample, Source, open_splits
from infogrowth.data.text import image_key
from infogrowth.errors import BadSample, UserError
from infogrowth.files import atomic_write, remove_leftovers
from infogrowth.remote import is_remote

logger = logging.getLogger(__name__)

_AHEAD = 16  # samples per thread that are read and decoded before their turn


@dataclass(frozen=True)
class Config:
    """Options of the writer."""

    image_root: str = option(
        help="folder with cc3m_train/ and cc3m_val/, or with one set of pairs; or its address: s3://…"
    )
    output_root: str | None = option(
        None, "where the results go [--image_root, or packed/ in a downloader's own folder]"
    )
    workers: int | None = option(None, "threads that decode; auto: one per processor", min=1)
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
    if is_remote(root) and config.output_root is None:
        raise UserError(f"give --output_root: results cannot be written to {root}")
    sources = open_splits(root)
    output = output_folder(Path(root), config.output_root, sources)
    workers = config.workers or len(os.sched_getaffinity(0))
    for split, source in sources.items():
        print(pack(source, output, split, workers, config.max_pixels), flush=True)
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
        raise UserError(f"--output_root {given} is the downloader's own folder: give another one")
    return Path(given)


@dataclass
class _Packed:
    """What became of a source's samples; ``skipped`` are (id, reason), the source's notes first."""

    annotations: list[Annotation]
    skipped: list[tuple[str, str]]
    repairs: Counter[str]
    resumed: int = 0  # stored by an earlier run
    replaced: int = 0  # stored by an earlier run as other bytes


def pack(source: Source, output: Path, split: str, workers: int, max_pixels: int) -> str:
    """Store every good image of ``source``, and write its annotation JSON and skipped.jsonl.

    An image is decoded in full before it is stored, and stored as it came. Of several samples with
    one id the first good one is kept. The JSON is sorted by id. Raises UserError: the LMDB holds
    images of another source, the disk is full, or no sample is good. Returns what was found,
    packed, skipped, repaired and ignored, in a few lines.

    Args:
        output: gets ``lmdb_{split}``, ``cc3m_{split}.json`` and ``lmdb_{split}_skipped.jsonl``.
        workers: threads that read and decode (decoders let other threads run).
        max_pixels: larger images are skipped.
    """
    lmdb, captions = output / f"lmdb_{split}", output / f"cc3m_{split}.json"
    losses = output / f"lmdb_{split}_skipped.jsonl"
    output.mkdir(parents=True, exist_ok=True)
    remove_leftovers(output)
    packed = _store(source, lmdb, workers, max_pixels)
    with atomic_write(losses, "w") as file:
        for name, reason in packed.skipped:
            file.write(json.dumps({"id": name, "reason": reason}) + "\n")
    save_annotations(captions, sorted(packed.annotations, key=lambda entry: entry["image"]))
    if not packed.annotations:
        raise UserError(f"no sample of {source.path} could be packed; see {losses}")
    earlier = f" ({packed.resumed} of them by an earlier run)" if packed.resumed else ""
    earlier += f" ({packed.replaced} anew: their images changed)" if packed.replaced else ""
    ignored = ", ".join(f"{count} {kind}" for kind, count in source.ignored.most_common())
    reasons = Counter(reason.split(":")[0] for _, reason in packed.skipped)
    lines = [
        f"{source.path} ({split}, {source.layout}): {len(source)} samples, "
        f"{len(packed.annotations)} packed{earlier}, {len(packed.skipped)} skipped",
        *(f"  {count:>8}  {reason}" for reason, count in reasons.most_common()),
        *([f"  ignored: {ignored}"] if ignored else []),
        *(f"  repaired {count} times: {repair}" for repair, count in packed.repairs.most_common()),
        f"  images       {lmdb}",
        f"  annotations  {captions}",
        *([f"  skipped      {losses}"] if packed.skipped else []),
    ]
    return "\n".join(lines)


def _store(source: Source, lmdb: Path, workers: int, max_pixels: int) -> _Packed:
    """Put the images into the LMDB, those that are not there yet."""
    packed = _Packed([], list(source.notes), Counter(source.repairs))
    times = Counter(map(image_key, source.ids))
    taken: set[str] = set()
    with LmdbWriter(lmdb) as writer:
        if unexpected := next((key for key in writer.keys() if key not in times), None):  # noqa: SIM118
            raise UserError(
                f"the LMDB {lmdb} holds {unexpected!r}, which is not in {source.path}: it "
                "was packed from other images; remove it or give another --output_root"
            )
        for sample in _checked_samples(source, writer, workers, max_pixels):
            name, problem = image_key(sample.id), sample.problem
            if problem is None and name in taken:
                problem = "the id occurred before: the first one is kept"
            if problem is not None:
                packed.skipped.append((sample.id, problem))
                continue
            assert sample.data is not None
            if not writer.put(sample.id, sample.data):
                if writer.get(sample.id) == sample.data:
                    packed.resumed += 1
                else:  # the image was encoded anew since an earlier run
                    writer.put(sample.id, sample.data, replace=True)
                    packed.replaced += 1
            packed.repairs.update(sample.repairs)
            packed.annotations.append({"image": name, "caption": sample.caption})
            if times[name] > 1:
                taken.add(name)
    return packed


def _checked_samples(
    source: Source, writer: LmdbWriter, workers: int, max_pixels: int
) -> Iterator[Sample]:
    """All samples in order, read and decoded ahead by threads; with a problem if they must be
    skipped."""

    def checked(wanted: tuple[int, bytes | None]) -> Sample:
        number, known = wanted
        sample = source.read(number)
        problem = sample.problem
        if problem is None:
            try:
                lmdb_key(image_key(sample.id))
                if sample.data != known:
                    decode_image(sample.data or b"", max_pixels)
            except BadSample as error:
                problem = str(error)
        return replace(sample, data=None if problem else sample.data, problem=problem)

    resuming = len(writer) > 0
    stored = (writer.get(name) if resuming else None for name in source.ids)
    progress = tqdm(
        run_ahead(ThreadPoolExecutor(workers), checked, enumerate(stored), _AHEAD * workers),
        desc=writer.path.name,
        total=len(source),
        unit=" samples",
        disable=not logger.isEnabledFor(logging.INFO),
    )
    return (future.result() for _, future in progress)
