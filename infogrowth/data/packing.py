"""Packing a source into an LMDB and an annotation JSON: verified, resumable, every loss recorded.

No log is kept: the samples are gone through in the same order every time, and one whose very
bytes are in the LMDB has been verified by an earlier run. So a killed run that is started again
ends with the same files as one that was never killed.
"""

import json
import logging
from collections import Counter, deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path

from tqdm import tqdm

from infogrowth.annotations import Annotation, save_annotations
from infogrowth.data.image_stores import LmdbWriter, lmdb_key
from infogrowth.data.images import decode_image
from infogrowth.data.sources import Sample, Source
from infogrowth.data.text import image_key
from infogrowth.errors import BadSample, UserError
from infogrowth.files import atomic_write, remove_leftovers

logger = logging.getLogger(__name__)

_AHEAD = 16  # samples per thread that are read and decoded before their turn


@dataclass
class Packed:
    """What became of a source's samples.

    Attributes:
        samples: how many the source lists.
        lmdb, annotations, skipped_list: where the results are.
        stored: how many are in the LMDB now.
        resumed: how many of those an earlier run had stored.
        replaced: how many of those an earlier run had stored as other bytes.
        skipped: (id, reason) of the others, in the source's order, after the source's own notes.
        repairs: how many texts were read after what repair.
    """

    samples: int
    lmdb: Path
    annotations: Path
    skipped_list: Path
    stored: int = 0
    resumed: int = 0
    replaced: int = 0
    skipped: list[tuple[str, str]] = field(default_factory=list)
    repairs: Counter[str] = field(default_factory=Counter)


def pack(source: Source, output: Path, split: str, workers: int, max_pixels: int) -> Packed:
    """Store every good image of ``source``, and write its annotation JSON and skipped.jsonl.

    An image is decoded in full before it is stored, and stored as it came. Of several samples
    with one id the first good one is kept. The JSON is sorted by id.

    Args:
        output: gets ``lmdb_{split}``, ``cc3m_{split}.json`` and ``lmdb_{split}_skipped.jsonl``.
        workers: threads that read and decode (decoders let other threads run).
        max_pixels: larger images are skipped.

    Raises:
        UserError: the LMDB holds images of another source, the disk is full, or no sample is
            good.
    """
    lmdb = output / f"lmdb_{split}"
    files = output / f"cc3m_{split}.json", output / f"lmdb_{split}_skipped.jsonl"
    packed = Packed(len(source), lmdb, *files, skipped=list(source.notes))
    packed.repairs.update(source.repairs)
    output.mkdir(parents=True, exist_ok=True)
    remove_leftovers(output)
    annotations: list[Annotation] = []
    with LmdbWriter(lmdb) as writer:
        names = [image_key(name) for name in source.ids]
        known = set(names)
        if unexpected := next((key for key in writer.keys() if key not in known), None):  # noqa: SIM118
            raise UserError(
                f"the LMDB {lmdb} holds {unexpected!r}, which is not in {source.path}: it "
                "was packed from other images; remove it or give another --output_root"
            )
        repeated = {name for name, count in Counter(names).items() if count > 1}
        taken: set[str] = set()
        progress = tqdm(
            _checked_samples(source, writer, workers, max_pixels),
            desc=lmdb.name,
            total=len(source),
            unit=" samples",
            disable=not logger.isEnabledFor(logging.INFO),
        )
        for sample in progress:
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
            packed.stored += 1
            packed.repairs.update(sample.repairs)
            annotations.append({"image": name, "caption": sample.caption})
            if name in repeated:
                taken.add(name)
    annotations.sort(key=lambda annotation: annotation["image"])
    with atomic_write(packed.skipped_list, "w") as file:
        for name, reason in packed.skipped:
            file.write(json.dumps({"id": name, "reason": reason}) + "\n")
    save_annotations(packed.annotations, annotations)
    if not annotations:
        raise UserError(f"no sample of {source.path} could be packed; see {packed.skipped_list}")
    return packed


def _checked_samples(
    source: Source, writer: LmdbWriter, workers: int, max_pixels: int
) -> Iterator[Sample]:
    """All samples in order, read and decoded ahead by threads."""
    resuming = len(writer) > 0
    pending: deque[Future[Sample]] = deque()
    executor = ThreadPoolExecutor(workers, thread_name_prefix="decode")
    try:
        for number, name in enumerate(source.ids):
            known = writer.get(name) if resuming else None
            pending.append(executor.submit(_checked, source, number, known, max_pixels))
            if len(pending) >= _AHEAD * workers:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        executor.shutdown(cancel_futures=True)


def _checked(source: Source, number: int, known: bytes | None, max_pixels: int) -> Sample:
    """The sample, with a problem if it must be skipped."""
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
