"""Writing the growth folder: one writer at a time, committed part by part, never half.

A commit writes the part's files under their final names first and then replaces manifest.json: that
rename is the commit. Files of a part that the manifest does not count are the leftovers of a killed
run, and are removed when the folder is opened for writing again. A folder begins with growth.json,
then a manifest of nothing, then data.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from infogrowth.annotations import SPACES
from infogrowth.errors import UserError
from infogrowth.files import (
    TEMPORARY_MARK,
    atomic_write,
    atomic_write_array,
    atomic_write_json,
    remove_leftovers,
)
from infogrowth.growth.decisions import SCHEMA, Decisions
from infogrowth.growth.ledger import FORMAT, GrowthFolder, Manifest, data_files, read_folder
from infogrowth.growth.sources import SourceProgress

_KNOWN = {"growth.json", "manifest.json", "lock", "decisions", "kept", "reference.npz"}


class GrowthLedger:
    """A growth folder opened for writing; a context manager that holds the folder's lock.

    Tables are built and files written in a thread of its own, one after the other, while the
    caller goes on; what fails there is raised by the next :meth:`commit` or :meth:`folder`.

    Args:
        directory: an existing growth folder, or one to make (missing or empty).

    Attributes:
        pending_rows: decisions recorded since the last commit.
        dropped: decisions "dropped", committed or not: for the progress bar.

    Raises:
        UserError: the folder holds something else, or another process is writing to it.
    """

    def __init__(self, directory: str | os.PathLike[str]):
        self.pending_rows = 0
        self._tables: list[pa.Table] = []
        self._features: dict[str, list[np.ndarray]] = {space: [] for space in SPACES}
        _refuse_foreign_folder(Path(directory))
        self._lock = _take_lock(Path(directory) / "lock")
        self._thread = ThreadPoolExecutor(1, "ledger")
        self._error: BaseException | None = None
        self._committing: Future[None] | None = None
        try:
            self._folder = _recovered(Path(directory))
        except BaseException:
            self.__exit__()
            raise
        self.dropped = self._folder.totals["dropped"]

    def __enter__(self) -> GrowthLedger:
        return self

    def __exit__(self, *exception: object) -> None:
        """Give the lock back; what was not committed is forgotten."""
        self._thread.shutdown()
        os.close(self._lock)

    def folder(self) -> GrowthFolder:
        """The committed content, for reading; waits until all commits are done."""
        self._wait(self._later(lambda: None))
        return self._folder

    def record(self, source: int, decisions: Decisions, rows: np.ndarray) -> None:
        """Take decisions in; they are on disk after the next :meth:`commit`.

        Args:
            source: the number of the source.
            rows: (N,) the samples' rows in the source's features.
        """
        self._later(self._add, source, decisions, rows)
        self.pending_rows += len(decisions)
        self.dropped += len(decisions) - int(decisions.kept.sum())

    def commit(self, settings: dict[str, Any], sources: Sequence[SourceProgress]) -> None:
        """Make everything recorded, and how far the sources are, durable in one step.

        Args:
            settings: what growth.json is to hold.

        Raises:
            UserError: the disk is full or not writable; what was committed before stays intact.
        """
        if self._committing is not None:  # at most one commit's decisions wait in memory
            self._wait(self._committing)
        self._committing = self._later(self._write, deepcopy(settings), deepcopy(list(sources)))
        self.pending_rows = 0

    def _later(self, job: Callable[..., None], *arguments: Any) -> Future[None]:
        def run() -> None:
            if self._error is None:  # after a failure nothing more may be committed
                try:
                    job(*arguments)
                except BaseException as error:
                    self._error = error

        return self._thread.submit(run)

    def _wait(self, job: Future[None]) -> None:
        job.result()
        if self._error is not None:
            raise self._error

    def _add(self, source: int, decisions: Decisions, rows: np.ndarray) -> None:
        self._tables.append(decisions.table(source, rows))
        for space, features in decisions.features.items():
            kept = decisions.kept
            self._features[space].append(features if kept.all() else features[kept])

    def _write(self, settings: dict[str, Any], sources: list[SourceProgress]) -> None:
        directory, before = self._folder.directory, self._folder.manifest
        settings = {"format": FORMAT, **settings}
        if settings != self._folder.settings:
            atomic_write_json(directory / "growth.json", settings, indent=1)
        if not (directory / "manifest.json").is_file():
            atomic_write_json(directory / "manifest.json", Manifest().as_json(), indent=1)
        manifest = Manifest(before.parts, before.rows, before.totals, sources)
        if self._tables:
            table = pa.concat_tables(self._tables).combine_chunks()
            numbers = np.arange(before.rows, before.rows + len(table), dtype=np.int64)
            table = table.add_column(0, "row", pa.array(numbers)).cast(SCHEMA)
            for space, width in settings["dimension"].items():
                if width:
                    parts = self._features[space] or [np.empty((0, width), np.float32)]
                    atomic_write_array(self._folder.file(before.parts, space), *parts)
            with atomic_write(self._folder.file(before.parts)) as file:
                pq.write_table(table, file, compression="zstd")
            manifest.parts += 1
            manifest.rows += len(table)
            manifest.totals = _added(before.totals, table)
        atomic_write_json(directory / "manifest.json", manifest.as_json(), indent=1)
        self._folder = GrowthFolder(directory, settings, manifest)
        self._tables, self._features = [], {space: [] for space in SPACES}


def _recovered(directory: Path) -> GrowthFolder:
    """What is committed; what a killed run left beside it is removed."""
    folder = read_folder(directory)
    for part in (directory, directory / "decisions", directory / "kept"):
        part.mkdir(exist_ok=True)
        remove_leftovers(part)
    for path in data_files(directory):
        number = path.stem.rpartition("_")[2]
        if number.isdigit() and int(number) >= folder.manifest.parts:
            path.unlink()
    return folder


def _added(totals: dict[str, Any], table: pa.Table) -> dict[str, Any]:
    """The totals with a part's decisions counted in."""
    totals = {**totals, "reasons": dict(totals["reasons"])}
    totals["pairs"] += len(table)
    for counted, column in ((totals, "verdict"), (totals["reasons"], "reason")):
        for entry in table[column].value_counts().to_pylist():
            counted[entry["values"]] = counted.get(entry["values"], 0) + entry["counts"]
    totals["dataset"] = totals["kept"] + totals["recaptioned"]
    return totals


def _refuse_foreign_folder(directory: Path) -> None:
    try:
        directory.mkdir(parents=True, exist_ok=True)
        names = {entry.name for entry in directory.iterdir()}
    except OSError as error:
        raise UserError(f"cannot use {directory} as the growth folder: {error.strerror}") from error
    foreign = [name for name in sorted(names - _KNOWN) if TEMPORARY_MARK not in name]
    if foreign and "growth.json" not in names:
        raise UserError(
            f"{directory} is not a growth folder: it holds {foreign[0]!r}; "
            "give --growth an empty or a new folder"
        )


def _take_lock(path: Path) -> int:
    """An open, exclusively locked file; the lock goes when the process ends, however it ends."""
    try:
        lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    except OSError as error:
        raise UserError(f"cannot write to {path.parent}: {error.strerror}") from error
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        owner = os.read(lock, 32).decode(errors="replace").strip() or "unknown"
        os.close(lock)
        raise UserError(
            f"{path.parent} is in use by another run (process {owner}); wait for it to end"
        ) from error
    os.ftruncate(lock, 0)
    os.pwrite(lock, f"{os.getpid()}\n".encode(), 0)
    return lock
