"""Rows in order of insertion, in one buffer that grows."""

from __future__ import annotations

import torch

MIN_ROWS = 1024


class RowStore:
    """Rows (count, width) of one type on one device.

    The buffer doubles on a CPU, where memory that was never written takes no room, and grows by
    half on a GPU. Where a card cannot hold the old and the new one, rows move by way of the host.
    """

    def __init__(self, width: int, dtype: torch.dtype, device: torch.device) -> None:
        self.width, self.dtype, self.device = width, dtype, device
        self.count = 0
        self._buffer = self._empty(0)

    @property
    def rows(self) -> torch.Tensor:
        """A view of all rows."""
        return self._buffer[: self.count]

    def extend(self, rows_MD: torch.Tensor) -> None:
        """Add rows of any device and precision."""
        needed = self.count + len(rows_MD)
        if needed > len(self._buffer):
            self._grow(needed)
        self._buffer[self.count : needed].copy_(rows_MD)
        self.count = needed

    def truncate(self, count: int) -> None:
        """Forget all rows from `count` on; the memory stays."""
        self.count = min(self.count, count)

    def take(self, positions: torch.Tensor) -> torch.Tensor:
        """The rows at `positions` (of any shape), as (…, width)."""
        rows = self._buffer.index_select(0, positions.flatten())
        return rows.view(*positions.shape, self.width)

    def _grow(self, needed: int) -> None:
        held, more = self.rows, len(self._buffer) // (1 if self.device.type == "cpu" else 2)
        try:
            larger = self._empty(max(needed, len(self._buffer) + more, MIN_ROWS))
        except torch.OutOfMemoryError:
            held = held.cpu()
            self._buffer = self._empty(0)
            torch.cuda.empty_cache()
            try:
                larger = self._empty(needed)
            except torch.OutOfMemoryError:
                self._buffer = held.to(self.device)
                raise
        larger[: self.count] = held
        self._buffer = larger

    def _empty(self, rows: int) -> torch.Tensor:
        return torch.empty((rows, self.width), dtype=self.dtype, device=self.device)
