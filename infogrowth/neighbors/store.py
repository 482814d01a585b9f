"""Rows in order of insertion, in memory that grows without ever being copied to twice its size."""

from __future__ import annotations

from collections.abc import Iterator

import torch

MIN_ROWS = 1024


class RowStore:
    """Rows (count, width) of one type on one device.

    On a CPU they lie in one buffer that doubles, for memory that was never written takes no room.
    A GPU gets a further chunk instead, half of what is there, or just what is needed where that
    does not fit: a card that is half full could not hold a copy of twice the size.
    """

    def __init__(self, width: int, dtype: torch.dtype, device: torch.device) -> None:
        self.width, self.dtype, self.device = width, dtype, device
        self.count = 0
        self._chunks: list[torch.Tensor] = []

    def extend(self, rows_MD: torch.Tensor) -> None:
        """Add rows of any device and precision."""
        needed = self.count + len(rows_MD)
        capacity = sum(map(len, self._chunks))
        if needed > capacity:
            self._grow(needed, capacity)
        at = 0
        for start, part in self._pieces(self.count, needed):
            part.copy_(rows_MD[at : at + len(part)])
            at = start + len(part) - self.count
        self.count = needed

    def truncate(self, count: int) -> None:
        """Forget all rows from `count` on; the memory stays."""
        self.count = min(self.count, count)

    def pieces(self, start: int, stop: int) -> Iterator[tuple[int, torch.Tensor]]:
        """Views that together are the rows from `start` up to `stop`, each with its first row."""
        return self._pieces(start, min(stop, self.count))

    def take(self, positions: torch.Tensor) -> torch.Tensor:
        """The rows at `positions` (of any shape), as (…, width)."""
        flat = positions.flatten()
        if len(self._chunks) == 1:
            rows = self._chunks[0].index_select(0, flat)
        else:
            rows = torch.empty((len(flat), self.width), dtype=self.dtype, device=self.device)
            first = 0
            for chunk in self._chunks:
                at = ((flat >= first) & (flat < first + len(chunk))).nonzero()[:, 0]
                rows[at] = chunk.index_select(0, flat[at] - first)
                first += len(chunk)
        return rows.view(*positions.shape, self.width)

    def _pieces(self, start: int, stop: int) -> Iterator[tuple[int, torch.Tensor]]:
        first = 0
        for chunk in self._chunks:
            begin, end = max(start, first), min(stop, first + len(chunk))
            if begin < end:
                yield begin, chunk[begin - first : end - first]
            first += len(chunk)

    def _grow(self, needed: int, capacity: int) -> None:
        if self.device.type == "cpu":
            larger = self._empty(max(needed, 2 * capacity, MIN_ROWS))
            for start, part in self._pieces(0, self.count):
                larger[start : start + len(part)] = part
            self._chunks = [larger]
            return
        wanted = max(needed - capacity, capacity // 2, MIN_ROWS)
        try:
            self._chunks.append(self._empty(wanted))
        except torch.OutOfMemoryError:
            self._chunks.append(self._empty(needed - capacity))

    def _empty(self, rows: int) -> torch.Tensor:
        return torch.empty((rows, self.width), dtype=self.dtype, device=self.device)
