"""The growth folder: the memory of a growing dataset, in files that pandas and numpy read alone.

    growth.json               the settings, of which some must not change
    manifest.json             the commit point: how many parts and rows count, totals, sources
    decisions/000000.parquet  every decision ever made (decisions.SCHEMA), a file per commit
    kept/image_000000.npy     unit features of the samples that joined, a file per commit and space
    lock                      held by the one process that writes

Files come in this order: where a later one is there without an earlier one, that one was lost. A
commit writes the part's files under their final names first and then replaces manifest.json: that
rename is the commit. Files of a part that the manifest does not count are the leftovers of a killed
run, and are removed when the folder is opened for writing again.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from copy import deepcopy
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from infogrowth import files
from infogrowth.annotations import SPACES, Annotation
from infogrowth.errors import UserError, refusing
from infogrowth.growth.decisions import SCHEMA, Decisions, Reason
from infogrowth.growth.sources import SourceProgress
from infogrowth.growth.thresholds import MIN_SEEDS, StreamEstimate, estimate_stream

FORMAT = 1
_DAMAGED = "is damaged"
_OURS = {"growth.json", "manifest.json", "lock", "decisions", "kept", "reference.npz"}
PENDING_REASONS = frozenset(reason for reason in Reason if reason.startswith("alignment"))
"""Dropped for one of these, a sample may join later with a (better) caption."""


@dataclass(frozen=True)
class GrowthFolder:
    """A growth folder as it was committed when it was opened; a running `grow` does not disturb it.

    Attributes:
        settings: growth.json (``k``, ``min_align``, ``modality``, ``dimension``, ``encoder`` …);
            empty before the dataset is begun.
        parts, rows: how many files of each kind count, and how many decisions they hold.
        totals: decisions by verdict (``pairs``, ``kept``, ``recaptioned``, ``dropped``) and by
            reason (``reasons``), and ``dataset``, the number of samples now in the dataset.
        sources: the sources in the order in which they were first read.
    """

    directory: Path
    settings: dict[str, Any] = field(default_factory=dict)
    parts: int = 0
    rows: int = 0
    totals: dict[str, Any] = field(
        default_factory=lambda: {
            **dict.fromkeys(("pairs", "kept", "recaptioned", "dropped", "dataset"), 0),
            "reasons": {},
        }
    )
    sources: list[SourceProgress] = field(default_factory=list)

    def write_manifest(self) -> None:
        """The commit: from now on this is what the folder holds."""
        manifest = {name: getattr(self, name) for name in ("parts", "rows", "totals")}
        manifest = {"format": FORMAT, **manifest, "sources": list(map(asdict, self.sources))}
        files.atomic_write_json(self.directory / "manifest.json", manifest, indent=1)

    @property
    def spaces(self) -> tuple[str, ...]:
        """The spaces in which features are kept: image and text, or image alone."""
        return tuple(space for space in SPACES if self.settings["dimension"].get(space))

    def file(self, part: int, space: str | None = None) -> Path:
        """The decisions of a part, or the features that it kept in a space."""
        name = f"kept/{space}_{part:06d}.npy" if space else f"decisions/{part:06d}.parquet"
        return self.directory / name

    @property
    def decision_files(self) -> list[Path]:
        """The committed parquet files, in order."""
        return [self.file(part) for part in range(self.parts)]

    def decision_parts(self, columns: Sequence[str] = SCHEMA.names) -> Iterator[pa.Table]:
        """The decisions in the order they were made, a table per commit; one empty table when there
        is none. Columns that an older version did not write are null. Raises UserError: a part is
        missing or damaged, named by its file."""
        schema = pa.schema([SCHEMA.field(name) for name in columns])
        if not self.parts:
            yield schema.empty_table()
        for path in self.decision_files:
            with refusing(path, "the growth folder's part", pa.ArrowException, fault=_DAMAGED):
                table = pq.ParquetFile(path).read(list(columns))
            for name in set(columns) - set(table.column_names):
                table = table.append_column(name, pa.nulls(len(table), schema.field(name).type))
            yield table.select(columns)

    def decisions(self, columns: Sequence[str] = SCHEMA.names) -> pa.Table:
        """All decisions as one table (columns of :data:`SCHEMA`), in the order they were made."""
        return pa.concat_tables(self.decision_parts(columns))

    def kept_parts(self) -> Iterator[pa.Table]:
        """``id``, ``caption``, ``gain_image`` and ``gain_text`` of the dataset's samples in
        insertion order, a table per commit."""
        for table in self.decision_parts(("id", "caption", "gain_image", "gain_text", "verdict")):
            kept = table.filter(pc.not_equal(table["verdict"], "dropped")).drop("verdict")
            if len(self.spaces) < 2:  # growth in the image space alone has one gain, for both
                kept = kept.set_column(3, "gain_text", kept["gain_image"])
            yield kept

    def iter_annotations(self) -> Iterator[Annotation]:
        """``{"image", "caption", "gains"}`` of the dataset's samples in insertion order (spec §3),
        one at a time: the size of the dataset is no matter."""
        for table in self.kept_parts():
            columns = (column.to_pylist() for column in table.columns)
            for sample, caption, image, text in zip(*columns, strict=True):
                yield {"image": sample, "caption": caption, "gains": [image, text]}

    def annotations(self) -> list[Annotation]:
        return list(self.iter_annotations())

    def kept_feature_parts(self, space: str) -> Iterator[np.ndarray]:
        """``(n, D) float32`` unit rows of the kept samples, memory-mapped, one array per part.
        Raises UserError: a part is missing or damaged, named by its file."""
        width = self.settings["dimension"].get(space)
        for part in range(self.parts):
            path = self.file(part, space)
            with refusing(path, "the growth folder's part", ValueError, EOFError, fault=_DAMAGED):
                rows = np.load(path, mmap_mode="r", allow_pickle=False)
                if rows.ndim != 2 or rows.shape[1] != width or rows.dtype != np.float32:
                    raise ValueError(f"{rows.dtype} {rows.shape}, not float32 rows of {width}")
            yield rows

    def kept_features(self, space: str, first: int | None = None) -> np.ndarray:
        """Unit features ``(N, D) float32`` of all kept samples in ``space``, in insertion order, or
        of the ``first`` so many: the seeds come first."""
        width = self.settings["dimension"].get(space) or 0
        missing = self.totals["dataset"] if first is None else first
        parts = [np.empty((0, width), np.float32)]
        for part in self.kept_feature_parts(space) if width else ():
            parts.append(part[:missing])
            missing -= len(parts[-1])
            if not missing:
                break
        return np.concatenate(parts)

    def pending(self, before_source: int | None = None) -> pa.Table:
        """Samples that a better caption may let in: dropped for their alignment, and never joined
        since. ``id``, ``original_caption`` and ``original_alignment`` as they came first.

        Args:
            before_source: count only what was decided before this source began (a retry that goes
                on must process the same samples as one that was never interrupted).
        """
        names = ["id", "original_caption", "original_alignment"]
        table = self.decisions(["source", "verdict", "reason", *names])
        end = -1 if before_source is None else pc.index(table["source"], before_source).as_py()
        table = table.slice(0, end if end >= 0 else None)
        joined = table.filter(pc.not_equal(table["verdict"], "dropped"))["id"].combine_chunks()
        is_pending = pc.is_in(table["reason"], pa.array(sorted(PENDING_REASONS)))
        is_pending = pc.and_not(is_pending, pc.is_in(table["id"], joined))
        found = table.filter(is_pending).group_by("id", use_threads=False)
        return found.aggregate([(name, "first") for name in names[1:]]).rename_columns(names)

    def estimate(self) -> StreamEstimate | None:
        """How many captions of all that was processed are wrong, by the seeds and the recorded
        alignments; None where there are too few of either, or where these are no cosines."""
        if self.spaces != SPACES or self.settings.get("clean_by"):
            return None
        table = self.decisions(("source", "reason", "original_alignment"))
        seeds = pc.sum(pc.equal(table["reason"], Reason.SEED)).as_py() or 0
        streams = [number for number, source in enumerate(self.sources) if source.kind == "stream"]
        stream = table["original_alignment"].to_numpy()[np.isin(table["source"], streams)]
        stream = stream[np.isfinite(stream)]
        if seeds < MIN_SEEDS or not len(stream):
            return None
        image, text = (self.kept_features(space, seeds) for space in SPACES)
        return estimate_stream(image, text, stream)


def read_growth(directory: str | os.PathLike[str]) -> GrowthFolder:
    """Open a growth folder for reading. Raises UserError: no such folder, not a growth folder, one
    written by another format, or damaged."""
    folder = _read_folder(Path(directory))
    if not folder.settings:
        raise UserError(f"{directory} is not a growth folder: it has no growth.json")
    return folder


def _read_folder(directory: Path) -> GrowthFolder:
    """A growth folder, begun or not. UserError where a file is damaged, or lost."""
    found = any(_data_files(directory))
    for name in ("manifest.json", "growth.json"):  # a first commit may be writing them just now
        is_there = (directory / name).is_file()
        if found and not is_there:
            raise UserError(f"{directory} has lost its {name}: put it back, or grow another")
        found |= is_there
    settings, manifest = (_read(directory / name) for name in ("growth.json", "manifest.json"))
    damage = (KeyError, TypeError, AttributeError)
    with refusing(directory / "manifest.json", "the commit point", *damage, fault=_DAMAGED):
        manifest.pop("format", None)
        known = {field.name for field in fields(SourceProgress)}
        sources = [
            SourceProgress(**{name: value for name, value in source.items() if name in known})
            for source in (manifest.pop("sources") if manifest else ())
        ]
        sum(sum(source.skipped.values()) for source in sources)  # TypeError unless all are counts
        return GrowthFolder(directory, settings, **manifest, sources=sources)


def _data_files(directory: Path) -> list[Path]:
    return [*directory.glob("decisions/*.parquet"), *directory.glob("kept/*.npy")]


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    content = files.read_json(path, "the growth folder's file")
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise UserError(f"{path} has an unknown format; this version reads {FORMAT}")
    return content if len(content) > 1 else {}


# The decisions as a table, and the features of the samples that joined.
_Part = tuple[pa.Table, dict[str, np.ndarray]]


class GrowthLedger:
    """A growth folder opened for writing; a context manager that holds the folder's lock.

    Tables are built and files written in a thread of its own, one after the other, while the caller
    goes on; what fails there is raised by the next :meth:`commit` or :meth:`folder`. Raises
    UserError: the folder holds something else, or another process is writing to it.

    Args:
        directory: an existing growth folder, or one to make (missing or empty).

    Attributes:
        pending_rows: decisions recorded since the last commit.
    """

    def __init__(self, directory: str | os.PathLike[str]):
        self.pending_rows = 0
        self._recorded: list[Future[_Part]] = []
        path = Path(directory)
        self._lock = _take_lock(path)
        self._thread = ThreadPoolExecutor(1, "ledger")
        self._committing: Future[GrowthFolder] = Future()
        try:
            folder = _read_folder(path)
            for part in (path, path / "decisions", path / "kept"):
                part.mkdir(exist_ok=True)
                files.remove_leftovers(part)
            for file in _data_files(path):  # what a killed run left beside what is committed
                number = file.stem.rpartition("_")[2]
                if number.isdigit() and int(number) >= folder.parts:
                    file.unlink()
            self._committing.set_result(folder)
        except BaseException:
            self.__exit__()
            raise

    def __enter__(self) -> GrowthLedger:
        return self

    def __exit__(self, *exception: object) -> None:
        """Give the lock back; what was not committed is forgotten."""
        self._thread.shutdown()
        os.close(self._lock)

    def folder(self) -> GrowthFolder:
        """The committed content, for reading; waits until all commits are done."""
        return self._committing.result()

    def record(self, source: int, decisions: Decisions, rows: np.ndarray) -> None:
        """Take decisions in; they are on disk after the next :meth:`commit`.

        Args:
            source: the number of the source.
            rows: (N,) the samples' rows in the source's features.
        """

        def part() -> _Part:
            kept = slice(None) if decisions.kept.all() else decisions.kept  # spares copies
            features = {space: features[kept] for space, features in decisions.features.items()}
            return decisions.table(source, rows), features

        self._recorded.append(self._thread.submit(part))
        self.pending_rows += len(decisions)

    def commit(self, settings: dict[str, Any], sources: Sequence[SourceProgress]) -> None:
        """Make everything recorded, and how far the sources are, durable in one step. Raises
        UserError: the disk is full or not writable; what was committed before stays intact.

        Args:
            settings: what growth.json is to hold.
        """
        before = self.folder()  # at most one commit's decisions wait in memory
        given = {"format": FORMAT, **deepcopy(settings)}, deepcopy(list(sources)), self._recorded
        self._committing = self._thread.submit(_commit, before, *given)
        self._recorded, self.pending_rows = [], 0


def _commit(
    before: GrowthFolder,
    settings: dict[str, Any],
    sources: list[SourceProgress],
    recorded: list[Future[_Part]],
) -> GrowthFolder:
    """Write a part, if anything was recorded, and the manifest; returns the folder as it is now."""
    if settings != before.settings:
        files.atomic_write_json(before.directory / "growth.json", settings, indent=1)
    if not (before.directory / "manifest.json").is_file():
        before.write_manifest()
    after = replace(before, settings=settings, sources=sources)
    if recorded:
        tables, features = zip(*(part.result() for part in recorded), strict=True)
        table = pa.concat_tables(tables)
        numbers = np.arange(before.rows, before.rows + len(table), dtype=np.int64)
        table = table.combine_chunks().add_column(0, "row", pa.array(numbers)).cast(SCHEMA)
        for space in after.spaces:
            files.atomic_write_array(
                before.file(before.parts, space), *(f[space] for f in features)
            )
        with files.atomic_write(before.file(before.parts)) as file:
            pq.write_table(table, file, compression="zstd")
        rows = before.rows + len(table)
        totals = deepcopy(before.totals)
        totals["pairs"] += len(table)
        for counted, column in ((totals, "verdict"), (totals["reasons"], "reason")):
            for entry in table[column].value_counts().to_pylist():
                counted[entry["values"]] = counted.get(entry["values"], 0) + entry["counts"]
        totals["dataset"] = totals["kept"] + totals["recaptioned"]
        after = replace(after, parts=before.parts + 1, rows=rows, totals=totals)
    after.write_manifest()
    return after


def _take_lock(directory: Path) -> int:
    """The folder's lock file, open and exclusively locked: the lock goes when the process ends,
    however it ends. UserError where the folder is another's, or in use."""
    with refusing(directory, "the growth folder", action="use"):
        directory.mkdir(parents=True, exist_ok=True)
        names = {entry.name for entry in directory.iterdir()}
        foreign = [name for name in sorted(names - _OURS) if files.TEMPORARY_MARK not in name]
        if foreign and "growth.json" not in names:
            raise UserError(f"{directory} is not a growth folder: it holds {foreign[0]!r}")
        lock = os.open(directory / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        owner = os.read(lock, 32).decode(errors="replace").strip() or "unknown"
        os.close(lock)
        raise UserError(f"{directory} is in use by another run (process {owner})") from error
    os.ftruncate(lock, 0)
    os.pwrite(lock, f"{os.getpid()}\n".encode(), 0)
    return lock
