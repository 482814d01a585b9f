"""From a sampler to batches: the order is the sampler's alone, however many workers decode."""

import math
from collections.abc import Iterator
from itertools import islice
from typing import Any

import torch
from torch.utils.data import Dataset

from infogrowth.data.loading import Batch, Tokenize, open_loader
from infogrowth.growth.sampling import GainSampler


class EpochLoader:
    """The batches of one rank, epoch after epoch.

    Each rank takes ``batch_size`` rows at a time; an incomplete last batch is left out as BLIP
    does, except where it would be the only one.

    Args:
        dataset: items by (row, epoch, position), so that augmentation is a function of the position
            in the epoch, and neither of the worker nor of what was decoded before.
        sampler: which rows.
        tokenize: captions to ids and mask, called in the workers.
        batch_size: rows per rank and forward pass.
        workers: decoding processes; 0 decodes in this one.
        device: batches for CUDA are pinned.
    """

    def __init__(
        self,
        dataset: Dataset,
        sampler: GainSampler,
        tokenize: Tokenize,
        batch_size: int,
        workers: int = 0,
        device: torch.device | str = "cpu",
    ) -> None:
        self.sampler, self.batch_size = sampler, batch_size
        self._rows = _RowBatches(sampler, batch_size)
        self._loader = open_loader(
            dataset, self._rows, workers, torch.device(device), tokenize, persistent=True
        )

    def count(self, epoch: int) -> int:
        """How many batches ``epoch`` has on each rank."""
        rows = self.sampler.epoch_length(epoch)
        return rows // self.batch_size or math.ceil(rows / self.batch_size)

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """The batches of ``epoch`` from number ``start`` on; a UserError names a sample that cannot
        be read."""
        self.sampler.set_epoch(epoch)
        self.sampler.load_state_dict(self.state_dict(start))
        self._rows.remaining = self.count(epoch) - start
        return iter(self._loader)

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


class _RowBatches:
    """A torch batch sampler: lists of (row, epoch, position), as many as are left in the epoch.

    Apart from the loader, whose worker processes then end with it."""

    remaining = 0

    def __init__(self, sampler: GainSampler, batch_size: int) -> None:
        self._sampler, self._batch_size = sampler, batch_size

    def __iter__(self) -> Iterator[list[tuple[int, int, int]]]:
        positions = self._sampler.positions()
        for _ in range(self.remaining):
            yield list(islice(positions, self._batch_size))
