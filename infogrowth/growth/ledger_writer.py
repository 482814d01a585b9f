"""Writing the growth folder: one writer at a time, committed part by part, never half.

A commit writes the part's files under their final names first and then replaces manifest.json: that
rename is the commit. Files of a part that the manifest does not count are the leftovers of a killed
run, and are removed when the folder is opened for writing again. A folder begins with growth.json,
then a manifest of nothing, then data: where a later file is there without an earlier one, that one
was lost, and the folder is refused as it is.
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
from infogrowth.growth.ledger import (
    FORMAT,
    GrowthFolder,
    GrowthPaths,
    Manifest,
    read_growth,
    read_manifest,
)
from infogrowth.growth.plan import SourceProgress
from infogrowth.growth.thresholds import Thresholds

# What must stay as it was when the folder was begun; `index` may change (it is only recorded).
_UNCHANGING = ("k", "modality", "dimension", "clean_by")


class GrowthLedger:
    """A growth folder opened for writing; holds the folder's lock until closed.

    Records are built and files written in a thread of its own, one after the other, while the
    caller goes on; what fails there is raised by the next :meth:`commit` or :meth:`flush`.

    Args:
        directory: an existing growth folder, or one to make (missing or empty).

    Attributes:
        settings: growth.json, None before the dataset is begun.
        manifest: what is committed.
        sources: the manifest's sources, which the caller brings up to date before a commit.
        pending_rows: decisions recorded since the last commit.
        dropped: decisions "dropped", committed or not: for the progress bar.

    Raises:
        UserError: the folder holds something else, or another process is writing to it.
    """

    def __init__(self, directory: str | os.PathLike[str]):
        self.paths = GrowthPaths(directory)
        self.settings: dict[str, Any] | None = None
        self.pending_rows = 0
        self._tables: list[pa.Table] = []
        self._features: dict[str, list[np.ndarray]] = {space: [] for space in SPACES}
        _refuse_foreign_folder(self.paths)
        self._lock = _take_lock(self.paths.lock)
        self._thread = ThreadPoolExecutor(1, "ledger")
        self._error: BaseException | None = None
        self._committing: Future[None] | None = None
        try:
            self.manifest = self._recover()
        except BaseException:
            self.close()
            raise
        self.sources = deepcopy(self.manifest.sources)
        self.dropped = self.manifest.totals["dropped"]

    def __enter__(self) -> GrowthLedger:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Give the lock back; what was not committed is forgotten."""
        self._thread.shutdown()
        os.close(self._lock)

    def folder(self) -> GrowthFolder:
        """The committed content, for reading."""
        self.flush()
        return read_growth(self.paths.directory)

    def begin(self, settings: dict[str, Any]) -> None:
        """Write the dataset's settings when it is begun; afterwards refuse to continue with others.

        Args:
            settings: ``k``, ``min_align``, ``min_align_rule``, ``modality``, ``dimension``,
                ``encoder`` (``{"name", "fingerprint"}`` or None), and what else is worth recording.

        Raises:
            UserError: a setting differs from the folder's; the sentence names it and both values.
        """
        if self.settings is None:
            self.settings = {"format": FORMAT, **settings}
            atomic_write_json(self.paths.settings, self.settings, indent=1)
        else:
            check_settings(self.paths.directory, self.settings, settings)
        if not self.paths.manifest.is_file():
            atomic_write_json(self.paths.manifest, Manifest().as_json(), indent=1)

    def record_search(self, report: dict[str, Any]) -> None:
        """Put down how neighbors are searched, with its measured error, before the next commit."""
        if self.settings is not None and report and report != self.settings.get("search"):
            self.settings = {**self.settings, "search": report}
            atomic_write_json(self.paths.settings, self.settings, indent=1)

    def record(self, source: int, decided: Sequence[tuple[Decisions, np.ndarray]]) -> None:
        """Take decisions in; they are on disk after the next :meth:`commit`.

        Args:
            source: the number of the source in ``sources``.
            decided: decisions, and the samples' rows in the source's features; where there are
                several, their rows interleave and are brought into order.
        """
        self._later(self._add, source, decided)
        for decisions, _ in decided:
            self.pending_rows += len(decisions)
            self.dropped += len(decisions) - int(decisions.kept.sum())

    def commit(self) -> None:
        """Make everything recorded, and the sources' positions, durable in one step.

        Raises:
            UserError: the disk is full or not writable; what was committed before stays intact.
        """
        if self._committing is not None:  # at most one commit's decisions wait in memory
            self._committing.result()
        self._raise_error()
        self._committing = self._later(self._write, deepcopy(self.sources))
        self.pending_rows = 0

    def flush(self) -> None:
        """Wait until all that was recorded and committed is done."""
        self._later(lambda: None).result()
        self._raise_error()

    def _later(self, job: Callable[..., None], *arguments: Any) -> Future[None]:
        def run() -> None:
            if self._error is None:  # after a failure nothing more may be committed
                try:
                    job(*arguments)
                except BaseException as error:
                    self._error = error

        return self._thread.submit(run)

    def _raise_error(self) -> None:
        if self._error is not None:
            raise self._error

    def _add(self, source: int, decided: Sequence[tuple[Decisions, np.ndarray]]) -> None:
        table = pa.concat_tables([batch.table(source, rows) for batch, rows in decided])
        self._tables.append(table.sort_by("source_row") if len(decided) > 1 else table)
        for batch, _ in decided:
            for space, rows in batch.features.items():
                self._features[space].append(rows if batch.kept.all() else rows[batch.kept])

    def _write(self, sources: list[SourceProgress]) -> None:
        before = self.manifest
        manifest = Manifest(before.parts, before.rows, before.totals, sources)
        if self._tables:
            table = pa.concat_tables(self._tables).combine_chunks()
            numbers = np.arange(before.rows, before.rows + len(table), dtype=np.int64)
            table = table.add_column(0, "row", pa.array(numbers)).cast(SCHEMA)
            assert self.settings is not None
            for space, width in self.settings["dimension"].items():
                if width:
                    parts = self._features[space] or [np.empty((0, width), np.float32)]
                    atomic_write_array(self.paths.kept(space, before.parts), *parts)
            with atomic_write(self.paths.decisions(before.parts)) as file:
                pq.write_table(table, file, compression="zstd")
            manifest.parts += 1
            manifest.rows += len(table)
            manifest.totals = _added(before.totals, table)
        atomic_write_json(self.paths.manifest, manifest.as_json(), indent=1)
        self.manifest, self._tables = manifest, []
        self._features = {space: [] for space in SPACES}

    def _recover(self) -> Manifest:
        """Read what is committed and remove what a killed run left beside it."""
        paths = self.paths
        if not paths.settings.is_file() and (paths.manifest.is_file() or paths.data()):
            raise UserError(
                f"{paths.directory} has lost its growth.json, and its samples cannot be continued "
                "without those settings; put the file back, or give another --growth folder"
            )
        manifest = read_manifest(paths)
        for folder in (paths.directory, paths.decisions_folder, paths.kept_folder):
            folder.mkdir(exist_ok=True)
            remove_leftovers(folder)
        if paths.settings.is_file():
            self.settings = read_growth(paths.directory).settings
        for path in paths.data():
            number = path.stem.rpartition("_")[2]
            if number.isdigit() and int(number) >= manifest.parts:
                path.unlink()
        return manifest


def check_settings(directory: Path, have: dict[str, Any], asked: dict[str, Any]) -> None:
    """Refuse to continue a dataset with other settings; UserError names the first difference."""
    pairs = {name: (have.get(name), asked.get(name)) for name in _UNCHANGING}
    found, wanted = Thresholds.of_settings(have), Thresholds.of_settings(asked)
    for name, request in found.requests.items():
        if request != wanted.requests[name]:
            value = getattr(found, name)
            was = f"{request} ({value:g})" if isinstance(request, str) else request
            pairs[name] = (was, wanted.requests[name])
    old, new = have.get("encoder"), asked.get("encoder")
    if old and new:  # the encoder of foreign features may be unknown
        pairs["encoder"] = (_encoder(old), _encoder(new))
    for name, (was, now) in pairs.items():
        if was != now:
            raise UserError(
                f"{directory} was grown with {name} {_readable(was)}, and this run has "
                f"{_readable(now)}; use the same, or another --growth folder"
            )


def _encoder(encoder: dict[str, Any]) -> str:
    fingerprint = str(encoder.get("fingerprint") or "")
    return f"{encoder.get('name')}" + (f" ({fingerprint[:12]})" if fingerprint else "")


def _readable(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {part}" for key, part in value.items() if part is not None)
    return f"{value:g}" if isinstance(value, float) else str(value)


def _added(totals: dict[str, Any], table: pa.Table) -> dict[str, Any]:
    """The totals with a part's decisions counted in."""
    totals = {**totals, "reasons": dict(totals["reasons"])}
    totals["pairs"] += len(table)
    for counted, column in ((totals, "verdict"), (totals["reasons"], "reason")):
        for entry in table[column].value_counts().to_pylist():
            counted[entry["values"]] = counted.get(entry["values"], 0) + entry["counts"]
    totals["dataset"] = totals["kept"] + totals["recaptioned"]
    return totals


def _refuse_foreign_folder(paths: GrowthPaths) -> None:
    directory = paths.directory
    try:
        directory.mkdir(parents=True, exist_ok=True)
        names = {entry.name for entry in directory.iterdir()}
    except OSError as error:
        raise UserError(f"cannot use {directory} as the growth folder: {error.strerror}") from error
    known = {"growth.json", "manifest.json", "lock", "decisions", "kept"}
    foreign = [name for name in sorted(names - known) if TEMPORARY_MARK not in name]
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
