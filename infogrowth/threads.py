"""How the threads of torch wait for each other, and how many there are: set before torch loads.
And work that threads do before its turn.

OpenMP's threads spin while they wait. With a core to each that saves microseconds; where a core is
shared with anything else, they burn what the others need: a training step beside one busy process
takes 2.6 times as long (benchmarks/README.md; 14 times was seen too). So they spin only briefly.
And a container that may use 2 of a machine's 64 cores gets 2 threads, not 64: the limit (cgroup) is
not seen by OpenMP.

The variables are read once, when torch is loaded. `import infogrowth` sets them, so programs import
it before torch; what the user set in the environment stays.
"""

import os
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Executor, Future
from pathlib import Path
from typing import TypeVar

WAITING = {"GOMP_SPINCOUNT": "1000", "KMP_BLOCKTIME": "1"}  # turns (GNU), milliseconds (LLVM)
WAITING_CHOSEN = ("OMP_WAIT_POLICY", *WAITING)
COUNT_CHOSEN = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")
CGROUPS = Path("/sys/fs/cgroup")

Item = TypeVar("Item")
Result = TypeVar("Result")


def set_defaults() -> None:
    """Put short waiting and the allowed number of threads into the environment, unless given."""
    if not any(name in os.environ for name in WAITING_CHOSEN):
        os.environ.update(WAITING)
    allowed = cpu_limit()
    if allowed is not None and not any(name in os.environ for name in COUNT_CHOSEN):
        os.environ["OMP_NUM_THREADS"] = str(allowed)


def cpu_limit(cgroups: Path = CGROUPS, own: Path = Path("/proc/self/cgroup")) -> int | None:
    """How many cores' time this process may use, if a cgroup (v2 or v1) limits it to fewer than
    there are; at least 1."""
    quotas = []
    for group in _groups(cgroups, own):
        try:
            if (group / "cpu.max").exists():
                quota, period = (group / "cpu.max").read_text().split()
            else:
                quota = (group / "cpu.cfs_quota_us").read_text()
                period = (group / "cpu.cfs_period_us").read_text()
            quotas.append(int(quota) / int(period))
        except (OSError, ValueError, ZeroDivisionError):  # no such file, "max": no limit here
            continue
    cores = os.cpu_count() or 1
    limits = [quota for quota in quotas if 0 < quota < cores]
    return max(1, int(min(limits))) if limits else None


def _groups(cgroups: Path, own: Path) -> list[Path]:
    """The folders of this process's cgroup and of those around it."""
    try:
        entries = [line.split(":", 2) for line in own.read_text().splitlines()]
    except OSError:
        return []
    groups = []
    for _, controllers, path in entries:
        root = cgroups / "cpu" if "cpu" in controllers.split(",") else cgroups
        if controllers and root == cgroups:
            continue
        group = root / path.lstrip("/")
        groups += [group, *(p for p in group.parents if p.is_relative_to(root))]
    return groups


def run_ahead(
    pool: Executor, function: Callable[[Item], Result], items: Iterable[Item], count: int
) -> Generator[tuple[Item, Future[Result]]]:
    """Every item in order, with what ``function`` will have made of it; the next ``count`` items
    are begun by then. The pool is shut down at the end."""
    begun: deque[tuple[Item, Future[Result]]] = deque()
    try:
        for item in items:
            begun.append((item, pool.submit(function, item)))
            if len(begun) > count:
                yield begun.popleft()
        yield from begun
    finally:
        pool.shutdown(cancel_futures=True)
