"""Running an encoder, or a captioner and an encoder, over a dataset into a features folder.

Batches are decoded by one thread (or by worker processes) while others run the model, and results
come in an order that never changes. On a CPU every batch is computed by a single thread, several
batches side by side: a matrix product split among threads rounds differently for another number of
threads, and the features must not depend on how many processors a run had. A GPU is fed by two
threads, so that the next batch is queued while the results of one are copied back.
"""

import logging
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import dataclass
from itertools import groupby
from types import MappingProxyType
from typing import Any

from infogrowth.threads import Item, Result, run_ahead

import torch
from tqdm import tqdm

from infogrowth import distributed
from infogrowth.data.feature_writer import FeatureWriter, write_shard
from infogrowth.encoders.dataset import DecodedBatch, Pairs, decoded_batches
from infogrowth.encoders.models import Captioner, DualEncoder
from infogrowth.errors import UserError

logger = logging.getLogger(__name__)

EMPTY_CAPTION = "the captioner gave no words"
_MAX_WORKERS = 16

# Captions of a batch ("" where there are no words), its image features (or None if none are
# wanted), the text features of the captions with words.
Features = tuple[list[str], torch.Tensor | None, torch.Tensor]


class Timing(dict[str, float]):
    """Seconds of this rank by what it waited for: "decoding", "the model", "writing"."""

    @contextmanager
    def of(self, activity: str) -> Iterator[None]:
        """Count the block's time under ``activity``."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self[activity] = self.get(activity, 0.0) + time.perf_counter() - start


@dataclass(frozen=True)
class Summary:
    """What a run did, over all ranks.

    Attributes:
        pairs: samples of this run that got features (earlier runs' not counted).
        seconds: wall time of the slowest rank.
        timing: where rank 0's time went.
        description: features.json as it is now.
    """

    pairs: int
    seconds: float
    timing: Timing
    description: dict[str, Any]


def embed_pairs(
    pairs: Pairs,
    encoder: DualEncoder,
    output: FeatureWriter,
    device: torch.device,
    batch_size: int,
    workers: int | None = None,
    captioner: Captioner | None = None,
    extra: Mapping[str, Sequence[Any]] = MappingProxyType({}),
) -> Summary:
    """Write image and text features of a dataset, or text features alone: where there are no
    images, and with a captioner, which describes them anew.

    Shards that are there already are left alone.

    Args:
        device: where ``encoder`` runs.
        batch_size: rows per batch; a folder's bytes may depend on it, on nothing else here.
        workers: decoding processes; None chooses by device.
        captioner: whose captions take the place of the dataset's.
        extra: more metadata columns, one value per row.
    """
    with_images = pairs.has_images and captioner is None
    nothing = torch.zeros(0, encoder.dimension)

    def compute(batch: DecodedBatch) -> Features:
        if captioner is not None:
            captions = captioner.caption(batch.images)
            with_words = [caption for caption in captions if caption]
            return captions, None, encoder.encode_texts(with_words) if with_words else nothing
        if batch.tokens is None:
            return [], nothing if with_images else None, nothing
        text = encoder.encode_tokens(batch.tokens)
        if not with_images:
            return batch.captions, None, text
        if not isinstance(batch.images, torch.Tensor):
            raise UserError(
                f"the preprocessing of {encoder.name} gives images of different sizes; "
                "its processor must crop or resize to one size"
            )
        return batch.captions, encoder.encode_images(batch.images), text

    batches = decoded_batches(
        pairs,
        (captioner or encoder).preprocess if pairs.has_images else None,
        encoder.tokenize if captioner is None else None,
        output.claim(),
        batch_size,
        workers_for(device) if workers is None else workers,
        pinned=device.type == "cuda",
    )

    timing, started, written = Timing(), time.perf_counter(), 0
    results = computed(batches, compute, threads_for(device), timing)
    rows = sum(len(output.shards[number]) for number in output.pending)
    quiet = not (distributed.is_main() and logger.isEnabledFor(logging.INFO))
    share = rows // distributed.world_size()  # rank 0's, likely
    with tqdm(total=share, unit=" pairs", unit_scale=True, disable=quiet or None) as bar:
        for _, parts in groupby(results, lambda result: result[0].shard):
            shard = []
            for batch, features in parts:
                shard.append((batch, features))
                bar.update(len(batch.rows) + len(batch.skipped))
            with timing.of("writing"):
                written += _write(shard, output, pairs.ids, extra)
    seconds = time.perf_counter() - started
    description = output.finish()
    totals = distributed.all_gather_objects((written, seconds))
    return Summary(sum(w for w, _ in totals), max(s for _, s in totals), timing, description)


def _write(
    shard: Sequence[tuple[DecodedBatch, Features]],
    output: FeatureWriter,
    ids: Sequence[str],
    extra: Mapping[str, Sequence[Any]],
) -> int:
    """Write the batches of one shard; returns how many samples."""
    captions: dict[int, str] = {}
    skipped: dict[int, str] = {}
    for batch, (texts, _, _) in shard:
        skipped |= batch.skipped
        captions |= zip(batch.rows, texts, strict=True)
    skipped |= {row: EMPTY_CAPTION for row, caption in captions.items() if not caption}
    captions = {row: caption for row, caption in captions.items() if caption}
    images = [image for _, (_, image, _) in shard if image is not None]
    records = []
    for row, problem in sorted(skipped.items()):
        reason, _, detail = problem.partition(": ")  # reasons can be counted, details all differ
        records.append({"id": ids[row], "reason": reason} | ({"detail": detail} if detail else {}))
    write_shard(
        output.directory,
        output.name(shard[0][0].shard),
        [ids[row] for row in captions],
        list(captions.values()),
        torch.cat(images).numpy() if images else None,
        torch.cat([text for _, (_, _, text) in shard]).numpy(),
        {name: [column[row] for row in captions] for name, column in extra.items()},
        records,
    )
    return len(captions)


def computed(
    items: Iterable[Item],
    compute: Callable[[Item], Result],
    threads: int,
    timing: Timing,
) -> Iterator[tuple[Item, Result]]:
    """``compute`` of every item, in order, on ``threads`` that run ahead of the consumer."""

    def decoded() -> Iterator[Item]:
        source = iter(items)
        while True:
            with timing.of("decoding"):
                item = next(source, None)
            if item is None:
                return
            yield item

    before = torch.get_num_threads()
    pool = ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,))
    try:
        # One more than there are threads is ready, so that none idles during decoding.
        with closing(run_ahead(pool, compute, decoded(), threads)) as begun:
            for item, future in begun:
                with timing.of("the model"):
                    result = future.result()
                yield item, result
    finally:
        torch.set_num_threads(before)  # what new threads begin with, for whatever comes next


def threads_for(device: torch.device) -> int:
    """Batches computed side by side: two on a GPU, as many as torch has threads on a CPU."""
    return 2 if device.type == "cuda" else max(torch.get_num_threads(), 1)


def workers_for(device: torch.device) -> int:
    """Decoding processes: on a CPU none (the threads use it up), else this rank's share of the
    cores of its node."""
    if device.type != "cuda":
        return 0
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return max(1, min(_MAX_WORKERS, (cores or 1) // distributed.local_world_size() - 1))
