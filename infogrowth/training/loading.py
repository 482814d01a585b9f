"""From a sampler to batches: the order is the sampler's alone, however many workers decode.

Each item is asked for as (row, epoch, place), so augmentation is a function of the place in the
epoch and neither of the worker nor of what was decoded before.
"""

import math
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from infogrowth.errors import UserError
from infogrowth.growth.sampling import GainSampler

Place = tuple[int, int, int]
Batch = dict[str, Any]


class EpochBatches:
    """The batches of one rank, epoch after epoch.

    Each rank takes ``batch_size`` rows at a time; an incomplete last batch is left out as BLIP
    does, except where it would be the only one.

    Args:
        dataset: items by ``(row, epoch, place)``.
        sampler: says which rows.
        batch_size: rows per rank and forward pass.
        workers: decoding processes; 0 decodes in this one.
        device: batches for CUDA are pinned.
    """

    def __init__(
        self,
        dataset: Dataset,
        sampler: GainSampler,
        batch_size: int,
        workers: int = 0,
        device: torch.device | None = None,
    ) -> None:
        self.sampler, self.batch_size = sampler, batch_size
        self._order = _BatchOrder(self)
        self._loader = DataLoader(
            _Guarded(dataset),
            batch_sampler=self._order,  # type: ignore[arg-type]  # any sized iterable will do
            num_workers=workers,
            collate_fn=collate,
            pin_memory=device is not None and device.type == "cuda",
            persistent_workers=workers > 0,
            prefetch_factor=4 if workers > 0 else None,
            # The loader draws a seed for its workers: from here, not from the global state.
            generator=torch.Generator().manual_seed(0),
        )

    def count(self, epoch: int) -> int:
        """How many batches ``epoch`` has on each rank."""
        return _batches(self.sampler.epoch_length(epoch), self.batch_size)

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """The batches of ``epoch`` from number ``start`` on.

        Raises:
            UserError: a sample that cannot be read, by its id.
        """
        self.sampler.set_epoch(epoch)
        state = self.sampler.state_dict(consumed=start * self.batch_size)
        self.sampler.load_state_dict(state)
        self._order.remaining = self.count(epoch) - start
        for batch in self._loader:
            if isinstance(batch, UserError):
                raise batch
            yield batch

    def state_dict(self, batch: int) -> dict[str, Any]:
        """The sampler's state after ``batch`` batches of the epoch were trained on."""
        return self.sampler.state_dict(consumed=batch * self.batch_size)

    def load_state_dict(self, state: dict[str, Any]) -> int:
        """Go back to ``state``; returns how many batches of its epoch are done.

        With another number of ranks or another batch size the last of them may be partly new.
        """
        self.sampler.load_state_dict(state)
        done = state["consumed"] // self.sampler.world_size
        return min(done // self.batch_size, self.count(state["epoch"]))


def collate(items: Sequence[Batch | UserError]) -> Batch | UserError:
    """Stack tensors and numbers, keep text as lists; an error in place of an item wins."""
    for item in items:
        if isinstance(item, UserError):
            return item
    columns: dict[str, list[Any]] = {
        key: [item[key] for item in items]  # type: ignore[index]
        for key in items[0]  # type: ignore[union-attr]
    }
    return {key: _column(values) for key, values in columns.items()}


def _column(values: list[Any]) -> Any:
    if isinstance(values[0], torch.Tensor):
        return torch.stack(values)
    if isinstance(values[0], int):
        return torch.tensor(values, dtype=torch.int64)
    return values


def _batches(rows: int, batch_size: int) -> int:
    return rows // batch_size or math.ceil(rows / batch_size)


class _BatchOrder:
    """A torch batch sampler: lists of places, as many as are left in the epoch."""

    def __init__(self, batches: EpochBatches) -> None:
        self._batches = batches
        self.remaining = 0

    def __len__(self) -> int:
        return self.remaining

    def __iter__(self) -> Iterator[list[Place]]:
        places = self._batches.sampler.positions()
        for _ in range(self.remaining):
            size = self._batches.batch_size
            yield list(islice(places, size))


class _Guarded(Dataset):
    """Hands a UserError through as an item: raised in a worker it would come as a traceback."""

    def __init__(self, dataset: Dataset) -> None:
        self._dataset = dataset

    def __getitem__(self, place: Place) -> Any:
        try:
            return self._dataset[place]
        except UserError as error:
            return error
