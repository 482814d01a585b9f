"""The growth folder: where things lie in it, and reading it back. Writing is ledger_writer.py.

A growth folder is the memory of a growing dataset: every decision ever made, the features of what
was kept, the settings that must not change, and how far each source of samples has been read. It
is plain JSON, parquet and npy: pandas and numpy read it without this package.
"""

import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from infogrowth.annotations import Annotation
from infogrowth.errors import UserError
from infogrowth.files import read_json

FORMAT = 1
SPACES = ("image", "text")
VERDICTS = ("kept", "recaptioned", "dropped")

SCHEMA = pa.schema(
    [
        ("row", pa.int64()),  # running number of the decision in this folder
        ("source", pa.int32()),  # which of the manifest's sources offered the sample
        ("source_row", pa.int64()),  # its row in the features of that source
        ("id", pa.string()),
        ("verdict", pa.string()),
        ("reason", pa.string()),
        ("alignment", pa.float64()),
        ("original_alignment", pa.float64()),
        ("gain_image", pa.float64()),
        ("gain_text", pa.float64()),
        ("image_neighbors", pa.list_(pa.string())),  # nearest first
        ("image_distances", pa.list_(pa.float64())),
        ("text_neighbors", pa.list_(pa.string())),
        ("text_distances", pa.list_(pa.float64())),
        ("caption", pa.string()),
        ("original_caption", pa.string()),
    ]
)


@dataclass
class Source:
    """Samples that were offered, in row order, and how far they have been decided.

    Attributes:
        kind: ``"seed"``, ``"stream"``, or ``"retry"`` (dropped samples offered again because a
            recaption table arrived).
        features: the features' path, as it was given.
        start: the first row of the features that belongs to this source.
        position: rows before this one are decided; the next run goes on here.
        rows: where the source ends, as far as was known when it was last opened.
        digest: fingerprint of the features up to ``position``: tells the same ones again.
        recaptions: fingerprint of the recaption table in use, or None.
        retries: for ``"retry"``, the number of the source whose samples are offered again.
        seed_ids: fingerprint of the list of seed ids, where seeds are rows of the features.
        skipped: samples that never got features, by reason (told by ``embed``).
    """

    kind: str
    features: str
    start: int = 0
    position: int = 0
    rows: int = 0
    digest: str = ""
    recaptions: str | None = None
    retries: int | None = None
    seed_ids: str | None = None
    skipped: dict[str, int] = field(default_factory=dict)

    @property
    def complete(self) -> bool:
        return self.position >= self.rows


@dataclass
class Manifest:
    """What is committed: ``parts`` files of each kind, holding ``rows`` decisions."""

    parts: int = 0
    rows: int = 0
    totals: dict[str, Any] = field(default_factory=lambda: empty_totals())
    sources: list[Source] = field(default_factory=list)

    def as_json(self) -> dict[str, Any]:
        return {"format": FORMAT, **asdict(self)}


def empty_totals() -> dict[str, Any]:
    """Totals of nothing: decisions by verdict and by reason, and the dataset's size."""
    return {"pairs": 0, "kept": 0, "recaptioned": 0, "dropped": 0, "dataset": 0, "reasons": {}}


class Layout:
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

    def has_data(self) -> bool:
        """Whether files of decisions or features are there, committed or not."""
        files = (self.decisions_folder.glob("*.parquet"), self.kept_folder.glob("*.npy"))
        return any(True for found in files for _ in found)


@dataclass(frozen=True)
class GrowthFolder:
    """A growth folder as it was committed when it was opened; a running `grow` does not disturb it.

    Attributes:
        settings: growth.json (``k``, ``min_align``, ``modality``, ``dimension``, ``encoder`` …).
        totals: decisions by verdict (``pairs``, ``kept``, ``recaptioned``, ``dropped``) and by
            reason (``reasons``), and ``dataset``, the number of samples now in the dataset.
        sources: the sources in the order in which they were first offered.
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

    def decision_parts(self, columns: Sequence[str] | None = None) -> Iterator[pa.Table]:
        """The committed decisions, one table per part, in order.

        Raises:
            UserError: a part is missing or damaged, named by its file.
        """
        for part in range(self.manifest.parts):
            path = Layout(self.directory).decisions(part)
            try:
                yield pq.ParquetFile(path).read(list(columns) if columns else None)
            except (OSError, pa.ArrowException) as error:
                raise UserError(f"{path} of the growth folder is damaged: {error}") from error

    def decisions(self, columns: Sequence[str] | None = None) -> pa.Table:
        """All decisions as one table (columns of :data:`SCHEMA`), in the order they were made."""
        wanted = list(columns) if columns else SCHEMA.names
        empty = pa.schema([SCHEMA.field(name) for name in wanted]).empty_table()
        return pa.concat_tables([empty, *self.decision_parts(wanted)])

    def kept_feature_parts(self, space: str) -> Iterator[np.ndarray]:
        """``(n, D) float32`` unit rows of the kept samples, memory-mapped, one array per part.

        Raises:
            UserError: a part is missing or damaged, named by its file.
        """
        for part in range(self.manifest.parts):
            path = Layout(self.directory).kept(space, part)
            try:
                rows = np.load(path, mmap_mode="r", allow_pickle=False)
            except (OSError, ValueError, EOFError) as error:  # EOFError: a file of 0 bytes
                raise UserError(f"{path} of the growth folder is damaged: {error}") from error
            width = self.settings["dimension"].get(space)
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

    def decision_tables(self) -> Iterator[pa.Table]:
        """Like :meth:`decision_parts` with all columns, and one empty table when there is none."""
        if self.manifest.parts == 0:
            yield SCHEMA.empty_table()
        yield from self.decision_parts()

    def kept_samples(self) -> tuple[list[str], list[str], np.ndarray]:
        """Ids, captions and gains ``(N, 2) float64`` of the dataset, in insertion order."""
        parts = list(self._kept_parts())
        return (
            [sample for ids, _, _ in parts for sample in ids],
            [caption for _, captions, _ in parts for caption in captions],
            np.concatenate([np.empty((0, 2)), *(gains for _, _, gains in parts)]),
        )

    def annotation_parts(self) -> Iterator[list[Annotation]]:
        """The dataset's samples in insertion order, a list per part (spec §3)."""
        for ids, captions, gains in self._kept_parts():
            yield [
                {"image": sample, "caption": caption, "gains": pair}
                for sample, caption, pair in zip(ids, captions, gains.tolist(), strict=True)
            ]

    def annotations(self) -> list[Annotation]:
        """``{"image", "caption", "gains"}`` of every sample in the dataset, in insertion order."""
        return [entry for part in self.annotation_parts() for entry in part]

    def _kept_parts(self) -> Iterator[tuple[list[str], list[str], np.ndarray]]:
        for table in self.decision_parts(("id", "verdict", "caption", "gain_image", "gain_text")):
            kept = table.filter(pc.not_equal(table["verdict"], "dropped"))
            image = kept["gain_image"].to_numpy()
            # Growth in the image space alone has one gain; both places hold it.
            text = kept["gain_text"].to_numpy() if len(self.spaces) == 2 else image
            gains = np.stack([image, text], axis=1).astype(np.float64)
            yield kept["id"].to_pylist(), kept["caption"].to_pylist(), gains


def read_growth(directory: str | os.PathLike[str]) -> GrowthFolder:
    """Open a growth folder for reading.

    Raises:
        UserError: no such folder, not a growth folder, or one written by another format.
    """
    layout = Layout(directory)
    if not layout.settings.is_file():
        raise UserError(
            f"{layout.directory} is not a growth folder (it has no growth.json); "
            "give the --growth folder of `python -m infogrowth grow`"
        )
    settings = read_json(layout.settings, "the growth folder's file")
    if not isinstance(settings, dict) or settings.get("format") != FORMAT:
        raise UserError(f"{layout.settings} has an unknown format; this version reads {FORMAT}")
    return GrowthFolder(layout.directory, settings, read_manifest(layout))


def read_manifest(layout: Layout) -> Manifest:
    """The commit point; an empty one when nothing was committed yet.

    Raises:
        UserError: it is damaged, or lost: data files lie there without it.
    """
    if not layout.manifest.is_file():
        # Looked for twice: a first commit may arrive between the two looks.
        if layout.has_data() and not layout.manifest.is_file():
            raise UserError(
                f"{layout.directory} has lost its manifest.json, and its decisions cannot be told "
                "from leftovers without it; put the file back, or give another --growth folder"
            )
        return Manifest()
    content = read_json(layout.manifest, "the growth folder's file")
    try:
        if content.pop("format") != FORMAT:
            raise UserError(f"{layout.manifest} has an unknown format; this version reads {FORMAT}")
        names = {f.name for f in fields(Source)}
        sources = [
            Source(**{name: value for name, value in source.items() if name in names})
            for source in content.pop("sources")
        ]
        sum(sum(source.skipped.values()) for source in sources)  # TypeError unless all are counts
        return Manifest(**content, sources=sources)
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{layout.manifest} is damaged: {error!r}") from error
