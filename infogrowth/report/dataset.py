"""What a report looks at: a growth folder or a result JSON as one table, and the figures of it.

Everything else in this package works on :class:`GrowthTable` and knows no file layout.
"""

import os
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa

from infogrowth.annotations import gains_array, load_annotations
from infogrowth.errors import UserError
from infogrowth.growth.ledger import read_growth
from infogrowth.growth.sampling import REVERSE_FLOOR, normalized_gains
from infogrowth.growth.sources import SourceProgress
from infogrowth.growth.thresholds import StreamEstimate

TEXTS = ("id", "caption", "original_caption", "verdict", "reason", "captioner", "recaption_rule")
NUMBERS = (
    *("alignment", "original_alignment", "recaption_alignment"),
    *("gain_image", "gain_text"),
)
NEAR_DUPLICATE = 0.2  # of the usual nearest distance
ROUNDING = 1e-6  # what float32 features of one image may be apart
_NEIGHBORS = [
    f"{space}_{what}" for space in ("image", "text") for what in ("neighbors", "distances")
]


@dataclass(frozen=True, eq=False)
class GrowthTable:
    """The last decision about each sample that was seen, in the order of the stream (N rows).

    A result JSON has kept samples only: its alignments are NaN, and it has neither neighbors nor
    features, so what needs them is left out of the report.

    Attributes:
        rows: N rows, index 0 … N − 1; the columns of a growth folder's decisions that
            :data:`TEXTS` ("" where there is none) and :data:`NUMBERS` (float64, NaN) name, and
            ``source``, the name of where the sample came from.
        neighbors: the columns of the neighbors, N rows; None for a result JSON.
        skipped: samples that came without usable features, by reason.
        kept_features: "image" or "text" -> (kept, D) float32 unit rows.
        estimate: of wrong captions; None without enough seeds.
    """

    name: str
    rows: pd.DataFrame
    settings: dict[str, Any] = field(default_factory=dict)
    neighbors: pa.Table | None = None
    skipped: dict[str, int] = field(default_factory=dict)
    kept_features: Callable[[str], np.ndarray] | None = None
    estimate: StreamEstimate | None = None

    def __post_init__(self) -> None:
        rows = self.rows
        rows["gain"] = self.gains.mean(axis=1)
        rows["improvement"] = rows.alignment - rows.original_alignment  # by the new caption

    @cached_property
    def kept(self) -> np.ndarray:
        """(N,) bool: rows that are in the grown set, the recaptioned ones too."""
        return (self.rows.verdict != "dropped").to_numpy(bool)

    @property
    def gains(self) -> np.ndarray:
        """(N, 2) float64: image, text; labeled images have their one gain in both columns."""
        image, text = (self.rows[f"gain_{space}"] for space in ("image", "text"))
        return np.column_stack([image, text if self.has_text else image])

    @property
    def has_text(self) -> bool:
        """False for class-labeled images (modality "image"), which have one gain only."""
        return self.settings.get("modality", "pair") != "image"

    @property
    def min_align(self) -> float | None:
        """The alignment threshold in force, if it is known."""
        value = self.settings.get("min_align")
        return None if value is None else float(value)

    def near(self, row: int, space: str) -> list[dict[str, Any]]:
        """``id``, cosine ``distance`` and ``caption`` (by which it is known) of the nearest kept
        samples in ``space`` when ``row`` arrived, nearest first."""
        if self.neighbors is None:
            return []
        ids, distances = (
            self.neighbors[f"{space}_{what}"][row].as_py() or []
            for what in ("neighbors", "distances")
        )
        return [
            {"id": name, "distance": distance, "caption": self.known_captions.get(name, "")}
            for name, distance in zip(ids, distances, strict=True)
        ]

    @cached_property
    def known_captions(self) -> dict[str, str]:
        """The caption under which each id is known; a kept row speaks for an id that came twice."""
        in_order = pd.concat([self.rows[~self.kept], self.rows[self.kept]])
        return dict(zip(in_order.id, in_order.caption, strict=True))


def open_dataset(path: str | os.PathLike[str]) -> GrowthTable:
    """Read a growth folder, or a file of kept samples with their gains (a result). Raises
    UserError: it is neither, it is damaged or empty, or a sample has no gains."""
    return open_growth(path) if Path(path).is_dir() else open_annotations(path)


def open_growth(directory: str | os.PathLike[str]) -> GrowthTable:
    """Read a growth folder; UserError if it is none, or damaged."""
    folder = read_growth(directory)
    table = _last_decisions(
        folder.decisions([*TEXTS, *NUMBERS, "source", "source_row", *_NEIGHBORS]), folder.sources
    )
    kinds = {"seed": "seeds from ", "retry": "processed again from "}
    names = [kinds.get(s.kind, "") + (Path(s.features).name or s.features) for s in folder.sources]
    rows = table.select([*TEXTS, *NUMBERS]).to_pandas()
    rows = rows.fillna(dict.fromkeys(TEXTS, "")).astype(dict.fromkeys(NUMBERS, np.float64))
    rows["source"] = np.array(names or [""], object)[table["source"].to_numpy()]
    return GrowthTable(
        Path(directory).resolve().name,
        rows,
        dict(folder.settings),
        table.select(_NEIGHBORS),
        _skipped(folder.sources),
        folder.kept_features,
        folder.estimate(),
    )


def open_annotations(path: str | os.PathLike[str]) -> GrowthTable:
    """Read a result: kept samples, captions and gains, nothing else; UserError if it is none."""
    annotations = load_annotations(path)
    if not annotations:
        raise UserError(f"{path} holds no samples; there is nothing to report on")
    captions = [entry["caption"] for entry in annotations]
    rows = pd.DataFrame(
        dict.fromkeys([*TEXTS, "source"], "") | dict.fromkeys(NUMBERS, np.nan),
        index=range(len(annotations)),
    )
    rows["id"] = [entry["image"] for entry in annotations]
    rows["caption"] = [text if isinstance(text, str) else " / ".join(text) for text in captions]
    rows["original_caption"], rows["verdict"] = rows.caption, "kept"
    rows[["gain_image", "gain_text"]] = gains_array(annotations)
    return GrowthTable(Path(path).name, rows)


def _last_decisions(table: pa.Table, sources: list[SourceProgress]) -> pa.Table:
    """One row per sample: one that was processed again counts by its last decision.

    Only dropped samples are processed again, so the order of the kept rows does not change.
    """
    origins = [n if source.retries is None else source.retries for n, source in enumerate(sources)]
    samples = table.select(["source", "source_row"]).to_pandas()
    samples["source"] = np.array(origins)[samples["source"]]
    return table.filter(pa.array(~samples.duplicated(keep="last")))


def _skipped(sources: list[SourceProgress]) -> dict[str, int]:
    """Samples without features by reason; features that were read twice are counted once."""
    most: dict[tuple[str, str], int] = {}
    for source in sources:
        for reason, count in source.skipped.items():
            most[source.features, reason] = max(count, most.get((source.features, reason), 0))
    total: Counter[str] = Counter()
    for (_, reason), count in most.items():
        total[reason] += count
    return total


# --- figures: pure functions of a table ---------------------------------------------------------


def headline(table: GrowthTable) -> dict[str, Any]:
    """The counts a reader wants first: ``seen`` (with seeds, without the skipped), ``seeds``,
    ``kept`` (the recaptioned too), ``recaptioned``, ``dropped``, ``skipped``; the means of the
    gains over the kept samples; and the effective size, the sum of the normalized gains: draws of
    one gain-weighted pass."""
    gains = table.gains[table.kept]
    image, text = pd.DataFrame(gains).mean().tolist()
    return {
        "seen": len(table.rows),
        "seeds": int((table.rows.reason == "seed").sum()),
        "kept": len(gains),
        "recaptioned": int((table.rows.verdict == "recaptioned").sum()),
        "dropped": len(table.rows) - len(gains),
        "skipped": sum(table.skipped.values()),
        "gain_image": image,
        "gain_text": text,
        "effective_size": float(_safe_normalized(gains).sum()),
    }


def growth_curve(table: GrowthTable, blocks: int = 120) -> pd.DataFrame:
    """The stream in blocks of equal length (the last may be shorter), a row each.

    The block means flatten when new samples bring less that is new; a block holds at least five
    samples, so that one sample does not make a spike.

    Returns:
        columns ``seen`` (samples at the end of the block), ``kept`` (without the recaptioned),
        ``recaptioned`` and ``dropped`` so far; ``gain_image`` and ``gain_text``, means over the
        block's kept samples, NaN if it has none.
    """
    count = len(table.rows)
    block = np.arange(count) // max(5, -(-count // blocks))
    verdicts = ("kept", "recaptioned", "dropped")
    each = pd.DataFrame({verdict: table.rows.verdict == verdict for verdict in verdicts})
    so_far = each.groupby(block).sum().cumsum()
    gains = pd.DataFrame(table.gains, columns=["gain_image", "gain_text"])
    means = gains.where(pd.Series(table.kept), axis=0).groupby(block).mean()
    return pd.concat([so_far.sum(axis=1).rename("seen"), so_far, means], axis=1)


def source_starts(table: GrowthTable) -> list[tuple[int, str]]:
    """Of every source the number of samples seen before it, and its name."""
    sources = table.rows.source
    return list(sources[sources != sources.shift()].items())


def by_source(table: GrowthTable) -> pd.DataFrame:
    """What each source brought, in the order in which the sources were read: columns ``source``,
    ``seen``, ``kept`` and ``gain``, the mean of its kept samples."""
    rows = table.rows.assign(kept=table.kept, gain=table.rows.gain.where(table.kept))
    return rows.groupby("source", sort=False, as_index=False).agg(
        seen=("id", "size"), kept=("kept", "sum"), gain=("gain", "mean")
    )


def expected_visits(gains: np.ndarray) -> pd.DataFrame:
    """How often each sampler is expected to draw each kept sample in an epoch (spec §2).

    * ``uniform``: once.
    * ``proportional``: N draws in repeated passes of Bernoulli(gain), so N · gain / sum(gain).
    * ``two_phase``: the mean of an ``even`` epoch, Bernoulli(gain), and an ``odd`` one,
      Bernoulli(max(1 − gain, 0.1)).

    Args:
        gains: (K, 2) image and text gains of the kept samples.

    Returns:
        K rows, a column for each word above; ``even`` is the normalized gain. The sum of a column
        is the length of an epoch.
    """
    even = _safe_normalized(gains)
    odd = np.maximum(1 - even, REVERSE_FLOOR)
    proportional = even * (len(even) / even.sum()) if even.any() else even
    return pd.DataFrame(
        {"uniform": np.ones(len(even)), "proportional": proportional}
        | {"two_phase": (even + odd) / 2, "even": even, "odd": odd}
    )


def duplicate_groups(
    table: GrowthTable, distance: float | None = None, described: int = 24
) -> dict[str, Any]:
    """Groups of kept samples that are linked through images at most ``distance`` apart.

    A sample is linked to those of its recorded nearest neighbors that are that close; groups are
    what hangs together. Largest first, then in stream order; rows in stream order.

    Args:
        distance: cosine distance; None follows the encoder: :data:`NEAR_DUPLICATE` times the
            distance at which a kept image usually finds its nearest, so that an encoder whose
            features lie close together calls no more duplicates than another.
        described: how many groups to describe.

    Returns:
        ``groups``, the ``rows`` of each described one, ``why`` they count as near-duplicates and
        their mean ``gain``; the number of ``all_groups`` and of ``samples`` in them; the
        ``distance``; and the ``usual`` one of a kept image to the nearest before it (median).
    """
    if table.neighbors is None:
        return {"groups": [], "all_groups": 0, "samples": 0, "distance": 0.0, "usual": np.nan}
    names = table.neighbors["image_neighbors"].combine_chunks()
    distances = table.neighbors["image_distances"].combine_chunks().flatten().to_numpy(False)
    rows = names.value_parent_indices().to_numpy()
    nearest = np.full(len(table.rows), np.inf)
    np.minimum.at(nearest, rows, distances)
    known = nearest[table.kept & np.isfinite(nearest)]
    usual = float(np.median(known)) if len(known) else float("nan")
    if distance is None:
        distance = max(NEAR_DUPLICATE * usual, ROUNDING) if len(known) else 0.0
    close = (distances <= distance) & table.kept[rows]
    row_of = {name: row for row, name in table.rows.id[table.kept].items()}
    near = [row_of.get(name, -1) for name in names.flatten().filter(pa.array(close)).to_pylist()]
    links = np.stack([rows[close], np.array(near, np.int64)])
    leader = _connected(len(table.rows), links[:, links[1] >= 0])
    members = pd.Series(np.arange(len(leader))).groupby(leader).agg(list)
    groups = sorted((m for m in members if len(m) > 1), key=lambda rows: (-len(rows), rows[0]))

    def why(rows: list[int]) -> str:
        linked = nearest[rows][nearest[rows] <= distance]
        widest = float(linked.max()) if len(linked) else 0.0
        captions = table.rows.caption[rows].nunique()
        words = "the same caption" if captions == 1 else f"{captions} captions"
        if widest < ROUNDING:
            return f"The same image to the encoder, under {len(rows)} ids with {words}."
        times = f"{usual / widest:.0f} times closer than usual, " if usual else ""
        return f"Each within {widest:.2g} of another, {times}with {words}."

    return {
        "groups": [
            {"rows": rows, "why": why(rows), "gain": float(table.rows.gain[rows].mean())}
            for rows in groups[:described]
        ],
        "all_groups": len(groups),
        "samples": sum(map(len, groups)),
        "distance": distance,
        "usual": usual,
    }


def reason_counts(table: GrowthTable) -> list[tuple[str, int]]:
    """Why samples are not in the grown set: dropped and skipped ones by reason, most first."""
    counts = Counter(table.rows.reason[~table.kept])
    counts.update(table.skipped)
    return sorted(counts.items(), key=lambda item: (-item[1], item[0]))


def ranks_in_percent(values: pd.Series) -> pd.Series:
    """(N,) the share of known values that are smaller, in percent; NaN stays NaN."""
    return 100 * (values.rank(method="min") - 1) / values.count()


def _safe_normalized(gains: np.ndarray) -> np.ndarray:
    """Normalized gains in [0, 1]; zeros where no sample has any gain (nothing to divide by)."""
    gains = np.nan_to_num(gains)
    if len(gains) == 0 or not (gains.mean(axis=1) > 0).any():
        return np.zeros(len(gains))
    return normalized_gains(gains)


def _connected(count: int, links: np.ndarray) -> np.ndarray:
    """The smallest number (count,) that each number hangs together with, by links (2, L)."""
    leader = np.arange(count)
    while True:
        smaller = leader[links].min(axis=0)
        found = leader.copy()
        for end in links:
            np.minimum.at(found, leader[end], smaller)
        found = found[found]
        if (found == leader).all():
            return leader
        leader = found
