"""Writing the growth folder: one writer at a time, committed part by part, never half.

A commit writes the part's features and decisions under their final names first and then replaces
manifest.json: that rename is the commit. Files of a part that the manifest does not count are the
leftovers of a killed run, and are removed when the folder is opened for writing again. A folder
begins with growth.json, then a manifest of nothing, then data: where a later file is there without
an earlier one, that one was lost, and the folder is refused as it is.
"""

import fcntl
import os
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from infogrowth.errors import UserError
from infogrowth.files import (
    atomic_write,
    atomic_write_array,
    atomic_write_json,
    remove_leftovers,
)
from infogrowth.growth.ledger import (
    FORMAT,
    SCHEMA,
    SPACES,
    GrowthFolder,
    Layout,
    Manifest,
    read_growth,
    read_manifest,
)

# What must stay as it was when the folder was begun; `index` may change (it is only recorded).
_UNCHANGING = ("k", "modality", "dimension")


class GrowthLedger:
    """A growth folder opened for writing; holds the folder's lock until closed.

    Args:
        directory: an existing growth folder, or one to make (missing or empty).

    Raises:
        UserError: the folder holds something else, or another process is writing to it.
    """

    def __init__(self, directory: str | os.PathLike[str]):
        self.layout = Layout(directory)
        self.settings: dict[str, Any] | None = None
        self.manifest = Manifest()
        self._waiting: list[pa.Table] = []
        self._waiting_rows = 0
        self.dropped = 0  # decisions "dropped", committed or not: for the progress bar
        self._features: dict[str, list[np.ndarray]] = {space: [] for space in SPACES}
        _refuse_strangers(self.layout)
        self._lock = _take_lock(self.layout.lock)
        try:
            self._recover()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> "GrowthLedger":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Give the lock back; what was not committed is forgotten."""
        os.close(self._lock)

    @property
    def waiting_rows(self) -> int:
        """Decisions recorded since the last commit."""
        return self._waiting_rows

    def folder(self) -> GrowthFolder:
        """The committed content, for reading."""
        return read_growth(self.layout.directory)

    def settle(self, settings: dict[str, Any]) -> None:
        """Write the dataset's settings when it is begun; afterwards refuse to continue with others.

        Args:
            settings: ``k``, ``min_align``, ``min_align_rule``, ``modality``, ``dimension``,
                ``encoder`` (``{"name", "fingerprint"}`` or None), and what else is worth recording.

        Raises:
            UserError: a setting differs from the folder's; the sentence names it and both values.
        """
        if self.settings is None:
            self.settings = {"format": FORMAT, **settings}
            atomic_write_json(self.layout.settings, self.settings, indent=1)
        else:
            check_settings(self.layout.directory, self.settings, settings)
        if not self.layout.manifest.is_file():
            atomic_write_json(self.layout.manifest, Manifest().as_json(), indent=1)

    def record(self, source: int, decisions: pa.Table, kept: dict[str, np.ndarray]) -> None:
        """Take decisions in; they are on disk after the next :meth:`commit`.

        Args:
            source: the number of the source in ``manifest.sources``.
            decisions: columns of :data:`SCHEMA` but ``row`` and ``source``.
            kept: per space the ``(m, D) float32`` unit rows of the samples that joined.
        """
        first = self.manifest.rows + self._waiting_rows
        numbers = np.arange(first, first + len(decisions), dtype=np.int64)
        columns: dict[str, Any] = {name: decisions[name] for name in decisions.column_names}
        columns["row"] = pa.array(numbers)
        columns["source"] = pa.array(np.full(len(decisions), source, np.int32))
        self._waiting.append(pa.table([columns[name] for name in SCHEMA.names], schema=SCHEMA))
        self._waiting_rows += len(decisions)
        self.dropped += pc.sum(pc.equal(decisions["verdict"], "dropped")).as_py() or 0
        for space, rows in kept.items():
            self._features[space].append(rows)

    def commit(self) -> None:
        """Make everything recorded, and the sources' positions, durable in one step.

        Raises:
            UserError: the disk is full or not writable; what was committed before stays intact.
        """
        manifest = self.manifest
        if self._waiting_rows:
            table = pa.concat_tables(self._waiting).combine_chunks()
            for space, parts in self._features.items():
                if parts:
                    rows = np.concatenate(parts)
                    atomic_write_array(self.layout.kept(space, manifest.parts), rows)
            with atomic_write(self.layout.decisions(manifest.parts)) as file:
                pq.write_table(table, file, compression="zstd")
            manifest = Manifest(
                manifest.parts + 1,
                manifest.rows + len(table),
                _added(manifest.totals, table),
                manifest.sources,
            )
        atomic_write_json(self.layout.manifest, manifest.as_json(), indent=1)
        self.manifest = manifest
        self._waiting, self._waiting_rows = [], 0
        self._features = {space: [] for space in SPACES}

    def _recover(self) -> None:
        """Read what is committed and remove what a killed run left beside it."""
        _refuse_losses(self.layout)
        for folder in (
            self.layout.directory,
            self.layout.decisions_folder,
            self.layout.kept_folder,
        ):
            folder.mkdir(exist_ok=True)
            remove_leftovers(folder)
        if self.layout.settings.is_file():
            self.settings = self.folder().settings
        self.manifest = read_manifest(self.layout)
        self.dropped = self.manifest.totals["dropped"]
        for path in self.layout.decisions_folder.glob("*.parquet"):
            _remove_uncommitted(path, path.stem, self.manifest.parts)
        for path in self.layout.kept_folder.glob("*.npy"):
            _remove_uncommitted(path, path.stem.partition("_")[2], self.manifest.parts)


def check_settings(directory: Path, have: dict[str, Any], asked: dict[str, Any]) -> None:
    """Refuse to continue a dataset with other settings; UserError names the first difference."""
    pairs = {name: (have.get(name), asked.get(name)) for name in _UNCHANGING}
    have_auto = str(have.get("min_align_rule", "")).startswith("auto")
    asked_auto = str(asked.get("min_align_rule", "")).startswith("auto")
    if have_auto != asked_auto or not asked_auto:
        pairs["min_align"] = (
            f"auto ({have['min_align']:g})" if have_auto else have["min_align"],
            "auto" if asked_auto else asked["min_align"],
        )
    old, new = have.get("encoder"), asked.get("encoder")
    if old and new:  # the encoder of foreign features may be unknown
        pairs["encoder"] = (_encoder(old), _encoder(new))
    for name, (was, wanted) in pairs.items():
        if was != wanted:
            raise UserError(
                f"{directory} was grown with {name} {_spoken(was)}, and this run has "
                f"{_spoken(wanted)}; use the same, or another --growth folder"
            )


def _encoder(encoder: dict[str, Any]) -> str:
    fingerprint = str(encoder.get("fingerprint") or "")
    return (
        f"{encoder.get('name')} ({fingerprint[:12]})" if fingerprint else f"{encoder.get('name')}"
    )


def _spoken(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {part}" for key, part in value.items() if part is not None)
    return f"{value:g}" if isinstance(value, float) else str(value)


def _added(totals: dict[str, Any], table: pa.Table) -> dict[str, Any]:
    """The totals with a part's decisions counted in."""
    totals = {**totals, "reasons": dict(totals["reasons"])}
    totals["pairs"] += len(table)
    for entry in table["verdict"].value_counts().to_pylist():
        totals[entry["values"]] += entry["counts"]
    totals["dataset"] = totals["kept"] + totals["recaptioned"]
    for entry in table["reason"].value_counts().to_pylist():
        reason = entry["values"]
        totals["reasons"][reason] = totals["reasons"].get(reason, 0) + entry["counts"]
    return totals


def _refuse_strangers(layout: Layout) -> None:
    directory = layout.directory
    try:
        directory.mkdir(parents=True, exist_ok=True)
        names = {entry.name for entry in directory.iterdir()}
    except OSError as error:
        raise UserError(f"cannot use {directory} as the growth folder: {error.strerror}") from error
    known = {"growth.json", "manifest.json", "lock", "decisions", "kept"}
    strangers = [name for name in sorted(names - known) if ".tmp-" not in name]
    if strangers and "growth.json" not in names:
        raise UserError(
            f"{directory} is not a growth folder: it holds {strangers[0]!r}; "
            "give --growth an empty or a new folder"
        )


def _refuse_losses(layout: Layout) -> None:
    """A folder that lost growth.json or manifest.json must not be begun anew over its data."""
    if not layout.settings.is_file() and (layout.manifest.is_file() or layout.has_data()):
        raise UserError(
            f"{layout.directory} has lost its growth.json, and its samples cannot be continued "
            "without those settings; put the file back, or give another --growth folder"
        )
    read_manifest(layout)


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


def _remove_uncommitted(path: Path, number: str, parts: int) -> None:
    if number.isdigit() and int(number) >= parts:
        path.unlink()
