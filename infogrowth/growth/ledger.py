"""The growth folder: the memory of a growing dataset, in files that pandas and numpy read alone.

    growth.json               the settings, of which some must not change
    manifest.json             the commit point: how many parts and rows count, totals, sources
    decisions/000000.parquet  every decision ever made (decisions.SCHEMA), a file per commit
    kept/image_000000.npy     unit features of the samples that joined, a file per commit and space
    lock                      held by the one process that writes

Files come in this order: where a later one is there without an earlier one, that one was lost. This
is the reading side; writing is ledger_writer.py.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from infogrowth.annotations import SPACES, Annotation
from infogrowth.errors import UserError, refusing
from infogrowth.files import read_json
from infogrowth.growth.decisions import SCHEMA, Reason
from infogrowth.growth.sources import Features, SourceProgress
from infogrowth.growth.thresholds import MIN_SEEDS, StreamEstimate, Thresholds, estimate_stream

FORMAT = 1
_DAMAGED = "is damaged"
PENDING_REASONS = frozenset(
    reason.value for reason in Reason if reason.value.startswith("alignment")
)
"""Dropped for one of these, a sample may join later with a (better) caption."""


@dataclass
class Manifest:
    """What is committed: ``parts`` files of each kind, holding ``rows`` decisions."""

    parts: int = 0
    rows: int = 0
    totals: dict[str, Any] = field(
        default_factory=lambda: {
            **dict.fromkeys(("pairs", "kept", "recaptioned", "dropped", "dataset"), 0),
            "reasons": {},
        }
    )
    sources: list[SourceProgress] = field(default_factory=list)

    def as_json(self) -> dict[str, Any]:
        return {"format": FORMAT, **asdict(self)}


@dataclass(frozen=True)
class GrowthFolder:
    """A growth folder as it was committed when it was opened; a running `grow` does not disturb it.

    Attributes:
        settings: growth.json (``k``, ``min_align``, ``modality``, ``dimension``, ``encoder`` …);
            empty before the dataset is begun.
        totals: decisions by verdict (``pairs``, ``kept``, ``recaptioned``, ``dropped``) and by
            reason (``reasons``), and ``dataset``, the number of samples now in the dataset.
        sources: the sources in the order in which they were first read.
    """

    directory: Path
    settings: dict[str, Any]
    manifest: Manifest

    @property
    def totals(self) -> dict[str, Any]:
        return self.manifest.totals

    @property
    def sources(self) -> list[dict[str, Any]]:
        return [asdict(source) for source in self.manifest.sources]

    @property
    def spaces(self) -> tuple[str, ...]:
        """The spaces in which features are kept: image and text, or image alone."""
        return tuple(space for space in SPACES if self.settings["dimension"].get(space))

    def file(self, part: int, space: str | None = None) -> Path:
        """The decisions of a part, or the features that it kept in a space."""
        if space is None:
            return self.directory / "decisions" / f"{part:06d}.parquet"
        return self.directory / "kept" / f"{space}_{part:06d}.npy"

    @property
    def decision_files(self) -> list[Path]:
        """The committed parquet files, in order; others that lie beside them do not count."""
        return [self.file(part) for part in range(self.manifest.parts)]

    def decision_parts(self, columns: Sequence[str] = SCHEMA.names) -> Iterator[pa.Table]:
        """The decisions in the order they were made, a table per commit; one empty table when there
        is none. Columns that an older version did not write are null.

        Raises:
            UserError: a part is missing or damaged, named by its file.
        """
        schema = pa.schema([SCHEMA.field(name) for name in columns])
        if not self.manifest.parts:
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
        """All of :meth:`iter_annotations`."""
        return list(self.iter_annotations())

    def kept_feature_parts(self, space: str) -> Iterator[np.ndarray]:
        """``(n, D) float32`` unit rows of the kept samples, memory-mapped, one array per part.

        Raises:
            UserError: a part is missing or damaged, named by its file.
        """
        width = self.settings["dimension"].get(space)
        for part in range(self.manifest.parts):
            path = self.file(part, space)
            with refusing(path, "the growth folder's part", ValueError, EOFError, fault=_DAMAGED):
                rows = np.load(path, mmap_mode="r", allow_pickle=False)
                if rows.ndim != 2 or rows.shape[1] != width or rows.dtype != np.float32:
                    raise ValueError(f"{rows.dtype} {rows.shape}, not float32 rows of {width}")
            yield rows

    def kept_features(self, space: str) -> np.ndarray:
        """All kept samples' unit features ``(N, D) float32`` in ``space``, in insertion order."""
        return self.first_kept_features(space, self.totals["dataset"])

    def first_kept_features(self, space: str, count: int) -> np.ndarray:
        """Unit rows of the first ``count`` kept samples: the seeds come first."""
        width = self.settings["dimension"].get(space) or 0
        rows, filled = np.empty((count if width else 0, width), np.float32), 0
        for part in self.kept_feature_parts(space) if width else ():
            part = part[: count - filled]
            rows[filled : filled + len(part)] = part
            filled += len(part)
            if filled == count:
                break
        return rows[:filled]

    def pending(self, before_source: int | None = None) -> pa.Table:
        """Samples that wait for a better caption: dropped for their alignment, and never joined
        since. ``id``, ``original_caption`` and ``original_alignment`` as they came first.

        Args:
            before_source: count only what was decided before this source began (a retry that goes
                on must process the same samples as one that was never interrupted).
        """
        names = ("id", "original_caption", "original_alignment")
        table = self.decisions(("source", "verdict", "reason", *names))
        if (
            before_source is not None
            and (end := pc.index(table["source"], before_source).as_py()) >= 0
        ):
            table = table.slice(0, end)
        dropped = pc.equal(table["verdict"], "dropped")
        joined = table.filter(pc.invert(dropped))["id"]
        waits = pc.and_(dropped, pc.is_in(table["reason"], pa.array(sorted(PENDING_REASONS))))
        waits = pc.and_(waits, pc.invert(pc.is_in(table["id"], joined.combine_chunks())))
        first = [(name, "first") for name in names[1:]]
        found = table.filter(waits).group_by("id", use_threads=False).aggregate(first)
        return found.select(["id", *(f"{name}_first" for name in names[1:])]).rename_columns(names)

    def estimate(self) -> StreamEstimate | None:
        """How many captions of all that was processed are wrong, by the seeds and the recorded
        alignments; None where there are too few of either."""
        if self.spaces != SPACES:
            return None
        kinds = np.array([source.kind for source in self.manifest.sources] or [""])
        seeds, parts = 0, [np.empty(0)]
        for table in self.decision_parts(("source", "reason", "original_alignment")):
            seeds += pc.sum(pc.equal(table["reason"], Reason.SEED)).as_py() or 0
            own = pc.fill_null(table["original_alignment"], float("nan")).to_numpy()
            parts.append(own[kinds[table["source"].to_numpy()] == "stream"])
        stream = np.concatenate(parts)
        stream = stream[np.isfinite(stream)]
        if seeds < MIN_SEEDS or not len(stream):
            return None
        image, text = (self.first_kept_features(space, seeds) for space in SPACES)
        return estimate_stream(image, text, stream)

    def rows_of(self, sources: Sequence[int]) -> np.ndarray:
        """Rows in their features of all samples decided in these sources, in order."""
        if not sources:
            return np.empty(0, np.int64)
        table = self.decisions(("source", "source_row"))
        return table["source_row"].to_numpy()[np.isin(table["source"].to_numpy(), sources)]

    def seeded_rows(self, features: Features) -> np.ndarray:
        """Rows of ``features`` that were taken out of it as seeds, so are not processed again."""
        sources = enumerate(self.manifest.sources)
        return self.rows_of(
            [n for n, s in sources if s.kind == "seed" and s.seed_ids and s.is_of(features)]
        )

    def refuse_other(self, settings: dict[str, Any]) -> None:
        """Refuse to continue with other settings; UserError names the first difference."""
        before, now = _identity(self.settings), _identity(settings)
        for name, value in before.items():
            if now.get(name, value) != value:
                raise UserError(
                    f"{self.directory} was grown with {name} {value}, and this run has "
                    f"{now[name]}; use the same, or another --growth folder"
                )


def _identity(settings: dict[str, Any]) -> dict[str, str]:
    """What must stay as it was when the folder was begun, human-readable; without the encoder
    where it is unknown. ``index`` may change: it is only recorded."""

    def readable(value: Any) -> str:
        if isinstance(value, dict):
            return ", ".join(f"{key} {part}" for key, part in value.items() if part is not None)
        return f"{value:g}" if isinstance(value, float) else str(value)

    parts = {name: settings.get(name) for name in ("k", "modality", "dimension", "clean_by")}
    parts |= Thresholds.of_settings(settings).requests
    if encoder := settings.get("encoder"):
        fingerprint = str(encoder.get("fingerprint") or "")[:12]
        parts["encoder"] = str(encoder.get("name")) + (f" ({fingerprint})" if fingerprint else "")
    return {name: readable(value) for name, value in parts.items()}


def read_growth(directory: str | os.PathLike[str]) -> GrowthFolder:
    """Open a growth folder for reading.

    Raises:
        UserError: no such folder, not a growth folder, one written by another format, or damaged.
    """
    folder = read_folder(Path(directory))
    if not folder.settings:
        raise UserError(
            f"{directory} is not a growth folder (it has no growth.json); "
            "give the --growth folder of `python -m infogrowth grow`"
        )
    return folder


def read_folder(directory: Path) -> GrowthFolder:
    """A growth folder, begun or not. UserError where a file is damaged, or lost."""
    found, lost = any(data_files(directory)), None
    for name in ("manifest.json", "growth.json"):  # a first commit may be writing them just now
        if (directory / name).is_file():
            found = True
        elif found:
            lost = name
    if lost:
        raise UserError(
            f"{directory} has lost its {lost}, without which its decisions cannot be trusted; "
            "put the file back, or give another --growth folder"
        )
    settings = _read(directory / "growth.json")
    content = _read(directory / "manifest.json")
    if not content:
        return GrowthFolder(directory, settings, Manifest())
    damage = (KeyError, TypeError, AttributeError)
    with refusing(directory / "manifest.json", "the commit point", *damage, fault=_DAMAGED):
        del content["format"]
        names = {f.name for f in fields(SourceProgress)}
        sources = [
            SourceProgress(**{name: value for name, value in source.items() if name in names})
            for source in content.pop("sources")
        ]
        sum(sum(source.skipped.values()) for source in sources)  # TypeError unless all are counts
        return GrowthFolder(directory, settings, Manifest(**content, sources=sources))


def data_files(directory: Path) -> list[Path]:
    """Files of decisions and features, committed or not."""
    return [*directory.glob("decisions/*.parquet"), *directory.glob("kept/*.npy")]


def _read(path: Path) -> dict[str, Any]:
    content = read_json(path, "the growth folder's file") if path.is_file() else {"format": FORMAT}
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise UserError(f"{path} has an unknown format; this version reads {FORMAT}")
    return content if len(content) > 1 else {}
