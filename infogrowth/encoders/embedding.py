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
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np
import torch
from tqdm import tqdm

from infogrowth import distributed
from infogrowth.encoders.dataset import (
    CaptionTable,
    DecodedBatch,
    PairTable,
    decoded_batches,
    rows_of_batches,
)
from infogrowth.encoders.protocols import Captioner, DualEncoder
from infogrowth.encoders.shards import ShardedOutput
from infogrowth.errors import UserError

logger = logging.getLogger(__name__)

EMPTY_CAPTION = "the captioner gave no words"
_MAX_WORKERS = 16

Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass
class Timing:
    """Where the time went, in seconds of this rank.

    Attributes:
        decoding: waiting for the next decoded batch.
        computing: waiting for the model, with all threads busy.
        writing: writing finished shards.
    """

    decoding: float = 0.0
    computing: float = 0.0
    writing: float = 0.0

    @contextmanager
    def of(self, activity: str) -> Iterator[None]:
        """Count the block's time under ``activity``."""
        start = time.perf_counter()
        try:
            yield
        finally:
            setattr(self, activity, getattr(self, activity) + time.perf_counter() - start)

    def bound(self) -> str:
        """Which activity a run would gain most from making faster."""
        times = {"decoding": self.decoding, "the model": self.computing, "writing": self.writing}
        return max(times, key=lambda name: times[name])


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


@dataclass
class _Computed:
    """Features of some rows of a shard: one batch's, or those of the shard so far."""

    captions: dict[int, str] = field(default_factory=dict)
    image: list[torch.Tensor] = field(default_factory=list)
    text: list[torch.Tensor] = field(default_factory=list)
    skipped: dict[int, str] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.captions) + len(self.skipped)

    def add(self, more: "_Computed") -> None:
        self.captions.update(more.captions)
        self.skipped.update(more.skipped)
        self.image += more.image
        self.text += more.text


def embed_pairs(
    pairs: PairTable,
    encoder: DualEncoder,
    output: ShardedOutput,
    device: torch.device,
    batch_size: int,
    workers: int | None = None,
) -> Summary:
    """Write image and text features of a dataset; shards that are there already are left alone.

    Args:
        device: where ``encoder`` runs.
        batch_size: rows per batch; a folder's bytes may depend on it, on nothing else here.
        workers: decoding processes; None chooses by device.
    """

    def compute(batch: DecodedBatch) -> _Computed:
        captions = dict(zip(batch.rows, batch.captions, strict=True))
        if batch.tokens is None:
            return _Computed(captions, skipped=batch.skipped)
        if not isinstance(batch.images, torch.Tensor):
            raise UserError(
                f"the preprocessing of {encoder.name} gives images of different sizes; "
                "its processor must crop or resize to one size"
            )
        image, text = encoder.encode_images(batch.images), encoder.encode_tokens(batch.tokens)
        return _Computed(captions, [image], [text], batch.skipped)

    batches = decoded_batches(
        pairs, encoder.preprocess, encoder.tokenize, output.claim(), batch_size,
        workers_for(device) if workers is None else workers, pinned=device.type == "cuda",
    )  # fmt: skip
    return _run(pairs.ids, output, batches, compute, encoder.dimension, device, images=True)


def recaption_images(
    pairs: PairTable,
    captioner: Captioner,
    encoder: DualEncoder,
    output: ShardedOutput,
    device: torch.device,
    batch_size: int,
    workers: int | None = None,
    extra: dict[str, list[Any]] | None = None,
) -> Summary:
    """Describe the images of a dataset anew and write the captions with their text features.

    Args:
        extra: more metadata columns, one value per row.
    """

    def compute(batch: DecodedBatch) -> _Computed:
        images: Sequence[torch.Tensor] | torch.Tensor
        if isinstance(batch.images, torch.Tensor):
            images = batch.images
        else:
            images = [torch.as_tensor(image) for image in batch.images]
        texts = captioner.caption(images) if batch.rows else []
        answers = dict(zip(batch.rows, texts, strict=True))
        captions = {row: text for row, text in answers.items() if text}
        empty = {row: EMPTY_CAPTION for row, text in answers.items() if not text}
        text = [encoder.encode_texts(list(captions.values()))] if captions else []
        return _Computed(captions, [], text, {**batch.skipped, **empty})

    batches = decoded_batches(
        pairs, captioner.preprocess, None, output.claim(), batch_size,
        workers_for(device) if workers is None else workers, pinned=device.type == "cuda",
    )  # fmt: skip
    return _run(pairs.ids, output, batches, compute, encoder.dimension, device, False, extra)


def embed_texts(
    table: CaptionTable,
    encoder: DualEncoder,
    output: ShardedOutput,
    device: torch.device,
    batch_size: int,
) -> Summary:
    """Write the text features of captions that came without images."""

    def batches() -> Iterator[DecodedBatch]:
        for shard, rows in rows_of_batches(output.claim(), batch_size):
            skipped = {row: table.problems[row] for row in rows if row in table.problems}
            good = [row for row in rows if row not in skipped]
            captions = [table.captions[row] for row in good]
            yield DecodedBatch(shard, good, captions, [], None, skipped)

    def compute(batch: DecodedBatch) -> _Computed:
        captions = dict(zip(batch.rows, batch.captions, strict=True))
        text = [encoder.encode_texts(batch.captions)] if captions else []
        return _Computed(captions, [], text, batch.skipped)

    return _run(table.ids, output, batches(), compute, encoder.dimension, device, images=False)


def _run(
    ids: Sequence[str],
    output: ShardedOutput,
    batches: Iterator[DecodedBatch],
    compute: Callable[[DecodedBatch], _Computed],
    dimension: int,
    device: torch.device,
    images: bool,
    extra: dict[str, list[Any]] | None = None,
) -> Summary:
    """The one loop: decode, compute, gather into shards, write each shard when it is full."""
    timing, started, pairs = Timing(), time.perf_counter(), 0
    shard = _Computed()
    with _progress(output) as bar:
        for batch, result in computed(batches, compute, threads_for(device), timing):
            shard.add(result)
            bar.update(len(result))
            if len(shard) < len(output.shards[batch.shard]):
                continue
            pairs += len(shard.captions)
            with timing.of("writing"):
                output.writer.write_shard(
                    batch.shard,
                    [ids[row] for row in shard.captions],
                    list(shard.captions.values()),
                    _joined(shard.image, dimension) if images else None,
                    _joined(shard.text, dimension),
                    {k: [column[r] for r in shard.captions] for k, column in (extra or {}).items()},
                    [_skipped(ids[row], shard.skipped[row]) for row in sorted(shard.skipped)],
                )
            shard = _Computed()
    seconds = time.perf_counter() - started
    description = output.finish()
    totals = distributed.all_gather_objects((pairs, seconds))
    return Summary(sum(p for p, _ in totals), max(s for _, s in totals), timing, description)


def computed(
    items: Iterable[Item],
    compute: Callable[[Item], Result],
    threads: int,
    timing: Timing,
) -> Iterator[tuple[Item, Result]]:
    """``compute`` of every item, in order, on ``threads`` that run ahead of the consumer."""
    source = iter(items)
    running: deque[tuple[Item, Future[Result]]] = deque()
    before = torch.get_num_threads()
    pool = ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,))
    try:
        while True:
            # One more than there are threads waits ready, so that none idles during decoding.
            while len(running) <= threads:
                with timing.of("decoding"):
                    item = next(source, None)
                if item is None:
                    break
                running.append((item, pool.submit(compute, item)))
            if not running:
                return
            item, future = running.popleft()
            with timing.of("computing"):
                result = future.result()
            yield item, result
    finally:
        pool.shutdown(cancel_futures=True)
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


def _skipped(sample: str, problem: str) -> dict[str, str]:
    """A record of a bad sample: reasons are few and can be counted, details are all different."""
    reason, _, detail = problem.partition(": ")
    return {"id": sample, "reason": reason} | ({"detail": detail} if detail else {})


def _joined(parts: list[torch.Tensor], dimension: int) -> np.ndarray:
    """``(n, D) float32``, also for a shard in which every sample was bad."""
    return torch.cat(parts).numpy() if parts else np.zeros((0, dimension), np.float32)


@contextmanager
def _progress(output: ShardedOutput) -> Iterator[tqdm]:
    """A bar of rank 0's likely share, on rank 0."""
    rows = sum(len(output.shards[number]) for number in output.pending)
    quiet = not (distributed.is_main() and logger.isEnabledFor(logging.INFO))
    total = rows // distributed.world_size()
    with tqdm(total=total, unit=" pairs", unit_scale=True, disable=quiet or None) as bar:
        yield bar
