"""Running the project's own programs: in this process, or several trainings at once."""

import logging
import multiprocessing
import os
import runpy
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path

import infogrowth.threads  # noqa: F401 - before torch

import torch

from infogrowth.cli import main, run_script
from infogrowth.errors import UserError

logger = logging.getLogger(__name__)
ROOT = Path(__file__).parents[2]
PROGRAMS = {
    "train/pretrain_gain.py": ("PretrainConfig", "pretrain"),
    "scripts/making/train_vocabulary.py": ("VocabularyConfig", "write_vocabulary"),
}


def run_program(program: str, *arguments: object) -> float:
    """Run a command of infogrowth, or one of the project's programs, in this process.

    Returns:
        The CPU seconds that it took, its worker processes included.

    Raises:
        UserError: it failed; what it said is on the screen.
    """
    words = [str(argument) for argument in arguments]
    logger.info("$ %s %s", program, " ".join(words))
    before = os.times()
    if program.endswith(".py"):
        names = runpy.run_path(str(ROOT / program))
        config, function = PROGRAMS[program]
        status = run_script(names[config], names[function], words)
    else:
        status = main([program, *words])
    if status:
        raise UserError(f"{program} failed: mend what it says and start again")
    return sum(os.times()[:4]) - sum(before[:4])


def run_programs(
    program: str, lines: Sequence[Sequence[object]], jobs: int, done: Callable[[int, float], None]
) -> None:
    """Run a program once with each line of arguments, `jobs` at a time, each in its own process.

    Args:
        done: called in this process with the number of a finished line and its CPU seconds.

    Raises:
        UserError: one of them failed; those that run are finished and reported first.
    """
    failed = None
    for line, spent in _finished(program, lines, jobs):
        if isinstance(spent, float):
            done(line, spent)
        else:
            failed = spent
    if failed is not None:
        raise failed


def _finished(
    program: str, lines: Sequence[Sequence[object]], jobs: int
) -> Iterator[tuple[int, float | BaseException]]:
    if jobs == 1:
        for line, arguments in enumerate(lines):
            yield line, run_program(program, *arguments)
        return
    # Not a fork of this process, which may have used the GPU, but of one that has only imported.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["infogrowth", "infogrowth.cli", "infogrowth.blip.pretrain"])
    threads = max(1, torch.get_num_threads() // jobs)
    with ProcessPoolExecutor(jobs, context, _begin_worker, (threads,)) as pool:
        waiting = {pool.submit(run_program, program, *map(str, a)): n for n, a in enumerate(lines)}
        for future in as_completed(waiting):
            yield waiting[future], future.exception() or future.result()


def _begin_worker(threads: int) -> None:
    torch.set_num_threads(threads)
    # Nobody else ends a training whose parent was killed, and the next start would train it too.
    parent = multiprocessing.parent_process()
    assert parent is not None
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()
