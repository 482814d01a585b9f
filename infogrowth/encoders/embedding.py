"""Running an encoder, or a captioner and an encoder, over a pile into a features folder."""

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from infogrowth import distributed
from infogrowth.encoders.pile import Batch, CaptionTable, Pile, decoded_batches
from infogrowth.encoders.pipeline import Timing, computed, lanes_for, workers_for
from infogrowth.encoders.protocols import Captioner, DualEncoder
from infogrowth.encoders.shards import ShardedOutput, cut
from infogrowth.errors import UserError

logger = logging.getLogger(__name__)

EMPTY_CAPTION = "the captioner gave no words"


@dataclass(frozen=True)
class Run:
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
class _Shard:
    """One shard while it fills up."""

    captions: dict[int, str] = field(default_factory=dict)
    image: list[torch.Tensor] = field(default_factory=list)
    text: list[torch.Tensor] = field(default_factory=list)
    skipped: dict[int, str] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.captions) + len(self.skipped)


@dataclass(frozen=True)
class _Result:
    captions: dict[int, str]
    image: torch.Tensor | None
    text: torch.Tensor | None
    skipped: dict[int, str]


def embed_pairs(
    pile: Pile,
    encoder: DualEncoder,
    output: ShardedOutput,
    shard_size: int,
    device: torch.device,
    batch_size: int,
    workers: int | None = None,
) -> Run:
    """Write image and text features of a pile; shards that are there already are left alone.

    Args:
        device: where ``encoder`` runs.
        batch_size: rows per batch; a folder's bytes may depend on it, on nothing else here.
        workers: decoding processes; None chooses by device.
    """

    def compute(batch: Batch) -> _Result:
        captions = dict(zip(batch.rows, batch.captions, strict=True))
        if not captions:
            return _Result(captions, None, None, batch.skipped)
        if not isinstance(batch.pictures, torch.Tensor):
            raise UserError(
                f"the preprocessing of {encoder.name} gives pictures of different sizes; "
                "its processor must crop or resize to one size"
            )
        image = encoder.encode_images(batch.pictures)
        text = encoder.encode_texts(batch.captions)
        return _Result(captions, image, text, batch.skipped)

    shards = cut(len(pile), shard_size)
    waiting = {number: shards[number] for number in output.waiting()}
    workers = workers_for(device, distributed.world_size()) if workers is None else workers
    batches = decoded_batches(
        pile, encoder.preprocess, waiting, batch_size, workers, pinned=device.type == "cuda"
    )
    return _run(pile.ids, output, waiting, batches, compute, encoder.dimension, device, images=True)


def recaption_pictures(
    pile: Pile,
    captioner: Captioner,
    encoder: DualEncoder,
    output: ShardedOutput,
    shard_size: int,
    device: torch.device,
    batch_size: int,
    workers: int | None = None,
    extra: dict[str, list[Any]] | None = None,
) -> Run:
    """Describe the pictures of a pile anew and write the captions with their text features.

    Args:
        extra: more metadata columns, one value per row of the pile.
    """

    def compute(batch: Batch) -> _Result:
        pictures = [torch.as_tensor(picture) for picture in batch.pictures]
        texts = captioner.caption(pictures) if pictures else []
        said = dict(zip(batch.rows, texts, strict=True))
        captions = {row: text for row, text in said.items() if text}
        silent = {row: EMPTY_CAPTION for row, text in said.items() if not text}
        text = encoder.encode_texts(list(captions.values())) if captions else None
        return _Result(captions, None, text, {**batch.skipped, **silent})

    shards = cut(len(pile), shard_size)
    waiting = {number: shards[number] for number in output.waiting()}
    workers = workers_for(device, distributed.world_size()) if workers is None else workers
    batches = decoded_batches(pile, captioner.preprocess, waiting, batch_size, workers)
    return _run(
        pile.ids, output, waiting, batches, compute, encoder.dimension, device, images=False,
        extra=extra,
    )  # fmt: skip


def embed_texts(
    table: CaptionTable,
    encoder: DualEncoder,
    output: ShardedOutput,
    shard_size: int,
    device: torch.device,
    batch_size: int,
) -> Run:
    """Write the text features of captions that came without pictures."""
    shards = cut(len(table), shard_size)
    waiting = {number: shards[number] for number in output.waiting()}

    def batches() -> Iterator[Batch]:
        for number, rows in waiting.items():
            for start in range(0, len(rows), batch_size):
                part = rows[start : start + batch_size]
                skipped = {row: table.problems[row] for row in part if row in table.problems}
                good = [row for row in part if row not in skipped]
                yield Batch(number, good, [table.captions[row] for row in good], [], skipped)

    def compute(batch: Batch) -> _Result:
        captions = dict(zip(batch.rows, batch.captions, strict=True))
        text = encoder.encode_texts(batch.captions) if captions else None
        return _Result(captions, None, text, batch.skipped)

    return _run(
        table.ids, output, waiting, batches(), compute, encoder.dimension, device, images=False
    )


def _run(
    ids: Sequence[str],
    output: ShardedOutput,
    waiting: dict[int, range],
    batches: Iterator[Batch],
    compute: Callable[[Batch], _Result],
    dimension: int,
    device: torch.device,
    images: bool,
    extra: dict[str, list[Any]] | None = None,
) -> Run:
    """The one loop: decode, compute, gather into shards, write each shard when it is full."""
    timing, started, pairs = Timing(), time.perf_counter(), 0
    shard = _Shard()
    for number in [number for number, rows in waiting.items() if not rows]:
        _write(output, number, ids, shard, dimension, images, extra)
    with _progress(sum(map(len, waiting.values()))) as bar:
        for batch, result in computed(batches, compute, lanes_for(device), timing):
            _add(shard, result)
            bar.update(len(result.captions) + len(result.skipped))
            rows = waiting[batch.shard]
            if len(shard) < len(rows):
                continue
            pairs += len(shard.captions)
            with timing.of("writing"):
                _write(output, batch.shard, ids, shard, dimension, images, extra)
            shard = _Shard()
    seconds = time.perf_counter() - started
    description = output.finish()
    totals = distributed.all_gather_objects((pairs, seconds))
    return Run(sum(p for p, _ in totals), max(s for _, s in totals), timing, description)


def _add(shard: _Shard, result: _Result) -> None:
    shard.captions.update(result.captions)
    shard.skipped.update(result.skipped)
    if result.image is not None:
        shard.image.append(result.image)
    if result.text is not None:
        shard.text.append(result.text)


def _write(
    output: ShardedOutput,
    number: int,
    ids: Sequence[str],
    shard: _Shard,
    dimension: int,
    images: bool,
    extra: dict[str, list[Any]] | None,
) -> None:
    output.writer.write_shard(
        number,
        [ids[row] for row in shard.captions],
        list(shard.captions.values()),
        _joined(shard.image, dimension) if images else None,
        _joined(shard.text, dimension),
        {name: [values[row] for row in shard.captions] for name, values in (extra or {}).items()},
        [_skipped(ids[row], shard.skipped[row]) for row in sorted(shard.skipped)],
    )


def _skipped(sample: str, told: str) -> dict[str, str]:
    """A record of a bad sample: reasons are few and can be counted, details are all different."""
    reason, _, detail = told.partition(": ")
    return {"id": sample, "reason": reason} | ({"detail": detail} if detail else {})


def _joined(parts: list[torch.Tensor], dimension: int) -> np.ndarray:
    """``(n, D) float32``, also for a shard in which every sample was bad."""
    return torch.cat(parts).numpy() if parts else np.zeros((0, dimension), np.float32)


@contextmanager
def _progress(total: int) -> Iterator[tqdm]:
    quiet = not (distributed.is_main() and logger.isEnabledFor(logging.INFO))
    with tqdm(total=total, unit=" pairs", unit_scale=True, disable=quiet or None) as bar:
        yield bar
