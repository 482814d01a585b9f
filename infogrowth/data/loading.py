"""torch's DataLoader as training and evaluation use it: how workers start, how batches are made."""

import multiprocessing
import shutil
import sys
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, default_collate, get_worker_info

from infogrowth import distributed
from infogrowth.errors import UserError

SHARED_MEMORY = "/dev/shm"  # through which workers hand over what they decoded

Batch = dict[str, Any]
# captions -> token ids and mask, both (B, T)
Tokenize = Callable[[list[str]], tuple[torch.Tensor, torch.Tensor]]


def open_loader(
    dataset: Dataset,
    batches: Iterable[list[Any]],
    workers: int,
    device: torch.device,
    tokenize: Tokenize | None = None,
    persistent: bool = False,
) -> DataLoader:
    """A loader of the batches that ``batches`` names.

    Args:
        dataset: items are dicts of tensors, numbers and text.
        batches: a sized iterable of lists of what the dataset is asked for.
        workers: decoding processes; 0 decodes in this one.
        device: batches for CUDA are pinned.
        tokenize: adds ``ids`` and ``mask`` of the items' ``caption``, in the workers; where items
            have several, all first captions come before all second ones.
        persistent: the workers outlive an iteration.
    """
    return DataLoader(
        dataset,
        batch_sampler=batches,  # type: ignore[arg-type]  # any sized iterable will do
        num_workers=workers,
        collate_fn=partial(collate, tokenize=tokenize),
        pin_memory=device.type == "cuda",
        multiprocessing_context=_clean_start() if workers > 0 else None,
        persistent_workers=persistent and workers > 0,
        prefetch_factor=4 if workers > 0 else None,
        # The loader draws a seed for its workers: from here, not from the global state.
        generator=torch.Generator().manual_seed(0),
    )


def _clean_start() -> Any:
    """How workers start among several ranks: from a process that never joined their group.

    A fork of a rank would copy the state of its network driver and of NCCL's threads, and may
    deadlock. One process alone forks, which starts at once and shares its memory.
    """
    if distributed.world_size() == 1:
        return None
    context = multiprocessing.get_context("forkserver")
    # Imported once, there, instead of by every worker.
    context.set_forkserver_preload([name for name in sys.modules if name.startswith("infogrowth")])
    return context


def collate(items: Sequence[Batch], tokenize: Tokenize | None = None) -> Batch:
    """Items as a batch: tensors and numbers are stacked, captions tokenized.

    Of items with several captions all first ones come before all second ones.
    """
    check_shared_memory(value for item in items for value in item.values())
    batch = default_collate(list(items))
    if tokenize is not None:
        captions = batch["caption"]
        if not isinstance(captions[0], str):  # a tuple of all first ones, …
            captions = [text for same in captions for text in same]
        batch["ids"], batch["mask"] = tokenize(captions)
    return batch


def check_shared_memory(values: Iterable[Any]) -> None:
    """A worker without room for its batch would die without a word, and the run would wait.

    Raises:
        UserError: in a worker, when there is no room for these values' tensors.
    """
    if get_worker_info() is None:
        return
    needed = sum(value.nbytes for value in values if isinstance(value, torch.Tensor))
    try:
        total, _, free = shutil.disk_usage(SHARED_MEMORY)
    except OSError:  # no such folder: another way of sharing, which needs no check
        return
    if free < needed:
        raise UserError(
            f"{SHARED_MEMORY} has {free >> 20} of {total >> 20} MB free, and a batch from a loader "
            f"worker takes {max(needed >> 20, 1)}: give the container more (docker run "
            "--shm-size=8g), or set num_workers to 0"
        )
