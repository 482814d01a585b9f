"""Decoding, computing and writing at the same time, in an order that never changes.

Batches are decoded by one thread (or by worker processes) while others run the model. On a CPU
every batch is computed by a single thread, several batches side by side: a matrix product split
among threads rounds differently for another number of threads, and the features must not depend
on how many processors a run had. On a GPU one thread feeds the device.
"""

import os
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

import torch

Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass
class Timing:
    """Where the time went, in seconds of this rank.

    Attributes:
        decoding: waiting for the next decoded batch.
        computing: waiting for the model, with all lanes busy.
        writing: writing finished shards.
    """

    decoding: float = 0.0
    computing: float = 0.0
    writing: float = 0.0

    @contextmanager
    def of(self, part: str) -> Iterator[None]:
        """Count the block's time under ``part``."""
        start = time.perf_counter()
        try:
            yield
        finally:
            setattr(self, part, getattr(self, part) + time.perf_counter() - start)

    def bound(self) -> str:
        """Which part a run would gain most from making faster."""
        parts = {"decoding": self.decoding, "the model": self.computing, "writing": self.writing}
        return max(parts, key=lambda part: parts[part])


def computed(
    items: Iterable[Item],
    compute: Callable[[Item], Result],
    lanes: int,
    timing: Timing,
) -> Iterator[tuple[Item, Result]]:
    """``compute`` of every item, in order, on ``lanes`` threads that run ahead of the consumer."""
    source = iter(items)
    running: deque[tuple[Item, Future[Result]]] = deque()
    threads = torch.get_num_threads()
    pool = ThreadPoolExecutor(lanes, initializer=torch.set_num_threads, initargs=(1,))
    try:
        while True:
            # One more than there are lanes waits ready, so that no lane idles during decoding.
            while len(running) <= lanes:
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
        torch.set_num_threads(threads)  # what new threads begin with, for whatever comes next


def lanes_for(device: torch.device) -> int:
    """Batches computed side by side: one on a GPU, as many as torch has threads on a CPU."""
    return 1 if device.type == "cuda" else max(torch.get_num_threads(), 1)


def workers_for(device: torch.device, processes_here: int) -> int:
    """Decoding processes: on a CPU none (the lanes use it up), else this rank's share of cores."""
    if device.type != "cuda":
        return 0
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return max(1, min(16, (cores or 1) // max(processes_here, 1) - 1))
