"""The growth folder: the memory of a growing dataset, in files that pandas and numpy read alone.

    growth.json               the settings, of which some must not change
    manifest.json             the commit point: how many parts and rows count, totals, sources
    decisions/000000.parquet  every decision ever made (decisions.SCHEMA), a file per commit
    kept/image_000000.npy     unit features of the samples that joined, a file per commit and space
    lock                      held by the one process that writes

This is the reading side; writing is ledger_writer.py.
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
from infogrowth.errors import UserError
from infogrowth.files import read_json
from infogrowth.growth.decisions import SCHEMA, Reason
from infogrowth.growth.plan import Features, SourceProgress
from infogrowth.growth.thresholds import MIN_SEEDS, StreamEstimate, estimate_stream

FORMAT = 1
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


class GrowthPaths:
    """The paths inside a growth folder."""

    def __init__(self, directory: str | os.PathLike[str]):
        self.directory = Path(directory)
        self.settings = self.directory / "growth.json"
        self.manifest = self.directory / "manifest.json"
        self.lock = self.directory / "lock"
        self.decisions_folder = self.directory / "decisions"
        self.kept_folder = self.directory / "kept"

    def decisions(self, part: int) -> Path:
        return self.decisions_folder / f"{part:06d}.parquet"

    def kept(self, space: str, part: int) -> Path:
        return self.kept_folder / f"{space}_{part:06d}.npy"

    def data(self) -> list[Path]:
        """Files of decisions and features, committed or not."""
        return [*self.decisions_folder.glob("*.parquet"), *self.kept_folder.glob("*.npy")]


@dataclass(frozen=True)
class GrowthFolder:
    """A growth folder as it was committed when it was opened; a running `grow` does not disturb it.

    Attributes:
        settings: growth.json (``k``, ``min_align``, ``modality``, ``dimension``, ``encoder`` …).
        totals: decisions by verdict (``pairs``, ``kept``, ``recaptioned``, ``dropped``) and by
            reason (``reasons``), and ``dataset``, the number of samples now in the dataset.
        sources: the sources in the order in which they were first read.
    """

    directory: Path
    settings: dict[str, Any]
    manifest: Manifest

    @property
    def paths(self) -> GrowthPaths:
        return GrowthPaths(self.directory)

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

    @property
    def decision_files(self) -> list[Path]:
        """The committed parquet files, in order; others that lie beside them do not count."""
        return [self.paths.decisions(part) for part in range(self.manifest.parts)]

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
            try:
                table = pq.ParquetFile(path).read(list(columns))
            except (OSError, pa.ArrowException) as error:
                raise UserError(f"{path} of the growth folder is damaged: {error}") from error
            for name in set(columns) - set(table.column_names):
                table = table.append_column(name, pa.nulls(len(table), schema.field(name).type))
            yield table.select(columns)

    def decisions(self, columns: Sequence[str] = SCHEMA.names) -> pa.Table:
        """All decisions as one table (columns of :data:`SCHEMA`), in the order they were made."""
        return pa.concat_tables(self.decision_parts(columns))

    def kept_feature_parts(self, space: str) -> Iterator[np.ndarray]:
        """``(n, D) float32`` unit rows of the kept samples, memory-mapped, one array per part.

        Raises:
            UserError: a part is missing or damaged, named by its file.
        """
        width = self.settings["dimension"].get(space)
        for part in range(self.manifest.parts):
            path = self.paths.kept(space, part)
            try:
                rows = np.load(path, mmap_mode="r", allow_pickle=False)
            except (OSError, ValueError, EOFError) as error:  # EOFError: a file of 0 bytes
                raise UserError(f"{path} of the growth folder is damaged: {error}") from error
            if rows.ndim != 2 or rows.shape[1] != width or rows.dtype != np.float32:
                raise UserError(
                    f"{path} of the growth folder is damaged: it holds {rows.dtype} of shape "
                    f"{rows.shape}, not float32 rows of {width} numbers"
                )
            yield rows

    def kept_features(self, space: str) -> np.ndarray:
        """All kept samples' unit features ``(N, D) float32`` in ``space``, in insertion order."""
        dimension = self.settings["dimension"].get(space) or 0
        parts = list(self.kept_feature_parts(space)) if dimension else []
        return np.concatenate([np.empty((0, dimension), np.float32), *parts])

    def kept_samples(self) -> tuple[list[str], list[str], np.ndarray]:
        """Ids, captions and gains ``(N, 2) float64`` of the dataset, in insertion order."""
        table = pa.concat_tables(self._kept_parts())
        gains = np.stack([table["gain_image"].to_numpy(), table["gain_text"].to_numpy()], axis=1)
        return table["id"].to_pylist(), table["caption"].to_pylist(), gains

    def iter_annotations(self) -> Iterator[Annotation]:
        """``{"image", "caption", "gains"}`` of the dataset's samples in insertion order (spec §3),
        one at a time: the size of the dataset is no matter."""
        for table in self._kept_parts():
            columns = (table[name].to_pylist() for name in table.column_names)
            for sample, caption, image, text in zip(*columns, strict=True):
                yield {"image": sample, "caption": caption, "gains": [image, text]}

    def annotations(self) -> list[Annotation]:
        """All of :meth:`iter_annotations`."""
        return list(self.iter_annotations())

    def _kept_parts(self) -> Iterator[pa.Table]:
        """Ids, captions, image and text gains of the samples in the dataset, a table per part."""
        for table in self.decision_parts(("id", "caption", "gain_image", "gain_text", "verdict")):
            kept = table.filter(pc.not_equal(table["verdict"], "dropped")).drop("verdict")
            if len(self.spaces) < 2:  # growth in the image space alone has one gain, for both
                kept = kept.set_column(3, "gain_text", kept["gain_image"])
            yield kept

    def pending_ids(self, before_source: int | None = None) -> set[str]:
        """Ids that wait for a better caption: dropped for their alignment, and never joined since.

        Args:
            before_source: count only what was decided before this source began (a retry that goes
                on must process the same samples as one that was never interrupted).
        """
        pending: set[str] = set()
        joined: set[str] = set()
        names = ("source", "id", "verdict", "reason")
        for table in self.decision_parts(names):
            columns = (table[name].to_pylist() for name in names)
            for source, sample, verdict, reason in zip(*columns, strict=True):
                if source == before_source:
                    return pending - joined
                if verdict != "dropped":
                    joined.add(sample)
                elif reason in PENDING_REASONS:
                    pending.add(sample)
        return pending - joined

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

    def first_kept_features(self, space: str, count: int) -> np.ndarray:
        """Unit rows of the first ``count`` kept samples: the seeds come first."""
        parts: list[np.ndarray] = []
        for rows in self.kept_feature_parts(space):
            parts.append(rows[: count - sum(map(len, parts))])
            if sum(map(len, parts)) == count:
                break
        return np.concatenate(parts)

    def rows_of(self, sources: Sequence[int]) -> np.ndarray:
        """Rows in their features of all samples decided in these sources, in order."""
        rows = [np.empty(0, np.int64)]
        for table in self.decision_parts(("source", "source_row")) if sources else ():
            rows.append(
                table["source_row"].to_numpy()[np.isin(table["source"].to_numpy(), sources)]
            )
        return np.concatenate(rows)

    def seeded_rows(self, features: Features) -> np.ndarray:
        """Rows of ``features`` that were taken out of it as seeds, so are not processed again."""
        sources = enumerate(self.manifest.sources)
        return self.rows_of(
            [n for n, s in sources if s.kind == "seed" and s.seed_ids and s.is_of(features)]
        )


def read_growth(directory: str | os.PathLike[str]) -> GrowthFolder:
    """Open a growth folder for reading.

    Raises:
        UserError: no such folder, not a growth folder, or one written by another format.
    """
    paths = GrowthPaths(directory)
    if not paths.settings.is_file():
        raise UserError(
            f"{paths.directory} is not a growth folder (it has no growth.json); "
            "give the --growth folder of `python -m infogrowth grow`"
        )
    settings = read_json(paths.settings, "the growth folder's file")
    if not isinstance(settings, dict) or settings.get("format") != FORMAT:
        raise UserError(f"{paths.settings} has an unknown format; this version reads {FORMAT}")
    return GrowthFolder(paths.directory, settings, read_manifest(paths))


def read_manifest(paths: GrowthPaths) -> Manifest:
    """The commit point; an empty one when nothing was committed yet. UserError where it is damaged,
    or lost: data files lie there without it."""
    if not paths.manifest.is_file():
        # Looked for twice: a first commit may arrive between the two looks.
        if paths.data() and not paths.manifest.is_file():
            raise UserError(
                f"{paths.directory} has lost its manifest.json, without which its "
                "decisions cannot be trusted; put the file back, or give another --growth folder"
            )
        return Manifest()
    content = read_json(paths.manifest, "the growth folder's file")
    try:
        if content.pop("format") != FORMAT:
            raise UserError(f"{paths.manifest} has an unknown format; this version reads {FORMAT}")
        names = {f.name for f in fields(SourceProgress)}
        sources = [
            SourceProgress(**{name: value for name, value in source.items() if name in names})
            for source in content.pop("sources")
        ]
        sum(sum(source.skipped.values()) for source in sources)  # TypeError unless all are counts
        return Manifest(**content, sources=sources)
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{paths.manifest} is damaged: {error!r}") from error
