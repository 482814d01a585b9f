"""The figures behind the report: pure functions of arrays, no files, no drawing."""

from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from infogrowth.growth.sampling import REVERSE_FLOOR, normalized_gains
from infogrowth.report.dataset import GrowthTable

NEAR_DUPLICATE = 0.2  # of the usual nearest distance
ROUNDING = 1e-6  # what float32 features of one image may be apart


@dataclass(frozen=True)
class Headline:
    """The counts a reader wants first. ``seen`` includes seeds, not the skipped samples."""

    seen: int
    seeds: int
    kept: int
    recaptioned: int
    dropped: int
    skipped: int
    gain_image: float  # means over the kept samples
    gain_text: float
    effective_size: float  # sum of the normalized gains: draws of one gain-weighted pass


@dataclass(frozen=True)
class GrowthCurve:
    """The stream in blocks: ``B`` blocks of equal length (the last may be shorter)."""

    seen: np.ndarray  # (B,) int: samples seen at the end of the block
    kept: np.ndarray  # (B,) int: kept so far, without the recaptioned
    recaptioned: np.ndarray  # (B,) int, so far
    dropped: np.ndarray  # (B,) int, so far
    gain_image: np.ndarray  # (B,) float64: mean over the block's kept samples, NaN if none
    gain_text: np.ndarray  # (B,) float64
    source_starts: list[tuple[int, str]]  # (samples seen before it, name) of every source


@dataclass(frozen=True)
class SourceShare:
    """What one source brought to the table."""

    name: str
    seen: int
    kept: int
    mean_gain: float  # of its kept samples, mean of image and text


@dataclass(frozen=True)
class Visits:
    """Expected visits of each kept sample in one training epoch (K,), and epoch lengths."""

    gains: np.ndarray  # (K,) normalized gain
    per_epoch: dict[str, np.ndarray]  # sampler -> (K,)
    phases: dict[str, np.ndarray]  # "even" and "odd" epochs of two_phase -> (K,)
    epoch_length: dict[str, float]  # sampler (and phase) -> expected draws


@dataclass(frozen=True)
class DuplicateGroups:
    """Kept samples that hang together through images that are nearly the same to the encoder."""

    groups: list[list[int]]  # at least two rows each
    distance: float  # up to which two images count as near-duplicates
    usual: float  # median distance of a kept image to the nearest one before it
    table: GrowthTable
    nearest: np.ndarray  # (N,) distance to the nearest kept image at arrival, inf without one

    def why(self, number: int) -> str:
        """Why the samples of a group count as near-duplicates, in one sentence."""
        rows = self.groups[number]
        linked = self.nearest[rows][self.nearest[rows] <= self.distance]
        widest = float(linked.max()) if len(linked) else 0.0
        captions = len({self.table.captions[row] for row in rows})
        words = "the same caption" if captions == 1 else f"{captions} captions"
        if widest < ROUNDING:
            return f"The same image to the encoder, under {len(rows)} ids with {words}."
        times = f"{self.usual / widest:.0f} times closer than usual, " if self.usual else ""
        return f"Each within {widest:.2g} of another, {times}with {words}."


def headline(table: GrowthTable) -> Headline:
    """Count the verdicts and average the gains."""
    kept = table.kept
    gains = table.gains[kept]
    means = np.nanmean(gains, axis=0) if np.isfinite(gains).any() else np.full(2, np.nan)
    return Headline(
        seen=len(kept),
        seeds=int(table.seeds.sum()),
        kept=int(kept.sum()),
        recaptioned=int(table.recaptioned.sum()),
        dropped=int((~kept).sum()),
        skipped=sum(table.skipped.values()),
        gain_image=float(means[0]),
        gain_text=float(means[1]),
        effective_size=float(_safe_normalized(gains).sum()),
    )


def growth_curve(table: GrowthTable, blocks: int = 120) -> GrowthCurve:
    """Cumulative counts and the mean gain of each block of the stream.

    The block means flatten when new samples bring less that is new; a block holds at least five
    samples, so that one sample does not make a spike.
    """
    count = len(table.ids)
    length = max(5, -(-count // blocks))
    starts = np.arange(0, count, length)
    ends = np.minimum(starts + length, count)
    kept = table.kept

    def so_far(mask: np.ndarray) -> np.ndarray:
        return np.cumsum(mask)[ends - 1]

    image, text = (_block_means(table.gains[:, i], kept, starts) for i in (0, 1))
    return GrowthCurve(
        seen=ends,
        kept=so_far(kept & ~table.recaptioned),
        recaptioned=so_far(table.recaptioned),
        dropped=so_far(~kept),
        gain_image=image,
        gain_text=text,
        source_starts=_source_starts(table.sources),
    )


def by_source(table: GrowthTable) -> list[SourceShare]:
    """What each source brought, in the order in which the sources were read."""
    gain = table.mean_gain
    shares = []
    for name in dict.fromkeys(table.sources.tolist()):
        of_source = table.sources == name
        kept = of_source & table.kept
        known = gain[kept & np.isfinite(gain)]
        mean = float(known.mean()) if len(known) else float("nan")
        shares.append(SourceShare(name, int(of_source.sum()), int(kept.sum()), mean))
    return shares


def expected_visits(gains: np.ndarray) -> Visits:
    """How often each sampler is expected to draw each sample in an epoch (spec §2).

    * ``uniform``: once.
    * ``proportional``: N draws in repeated passes of Bernoulli(gain), so N · gain / sum(gain).
    * ``two_phase``: the mean of an even epoch, Bernoulli(gain), and an odd one,
      Bernoulli(max(1 − gain, 0.1)).

    Args:
        gains: (K, 2) image and text gains of the kept samples.
    """
    normalized = _safe_normalized(gains)
    count, total = len(normalized), normalized.sum()
    reverse = np.maximum(1 - normalized, REVERSE_FLOOR)
    proportional = normalized * (count / total) if total > 0 else np.zeros(count)
    return Visits(
        gains=normalized,
        per_epoch={
            "uniform": np.ones(count),
            "proportional": proportional,
            "two_phase": (normalized + reverse) / 2,
        },
        phases={"even": normalized, "odd": reverse},
        epoch_length={
            "uniform": float(count),
            "proportional": float(count) if total > 0 else 0.0,
            "two_phase, even epochs": float(total),
            "two_phase, odd epochs": float(reverse.sum()),
        },
    )


def duplicate_groups(table: GrowthTable, distance: float | None = None) -> DuplicateGroups:
    """Groups of kept samples that are linked through images at most ``distance`` apart.

    A sample is linked to those of its recorded nearest neighbors that are that close; groups are
    what hangs together. Largest first, then in stream order; rows in stream order.

    Args:
        distance: cosine distance; None follows the encoder: :data:`NEAR_DUPLICATE` times the
            distance at which a kept image usually finds its nearest, so that an encoder whose
            features lie close together calls no more duplicates than another.
    """
    if table.neighbor_table is None:
        return DuplicateGroups([], distance or 0.0, float("nan"), table, np.zeros(0))
    kept = table.kept
    rows, names, distances = _links(table)
    nearest = np.full(len(kept), np.inf)
    np.minimum.at(nearest, rows, distances)
    known = nearest[kept & np.isfinite(nearest)]
    usual = float(np.median(known)) if len(known) else float("nan")
    if distance is None:
        distance = max(NEAR_DUPLICATE * usual, ROUNDING) if len(known) else 0.0
    row_of = {table.ids[row]: row for row in np.flatnonzero(kept).tolist()}
    parent = list(range(len(kept)))

    def root(row: int) -> int:
        while parent[row] != row:
            parent[row] = parent[parent[row]]
            row = parent[row]
        return row

    close = (distances <= distance) & kept[rows]
    for row, name in zip(
        rows[close].tolist(), names.filter(pa.array(close)).to_pylist(), strict=True
    ):
        if name in row_of:
            first, second = sorted((root(row), root(row_of[name])))
            parent[second] = first
    members: dict[int, list[int]] = {}
    for row in row_of.values():
        members.setdefault(root(row), []).append(row)
    groups = [sorted(rows) for rows in members.values() if len(rows) > 1]
    groups.sort(key=lambda rows: (-len(rows), rows[0]))
    return DuplicateGroups(groups, distance, usual, table, nearest)


def reason_counts(table: GrowthTable) -> list[tuple[str, int]]:
    """Why samples are not in the grown set: dropped and skipped ones by reason, most first."""
    reasons, counts = np.unique(table.reasons[~table.kept], return_counts=True)
    merged = dict(zip(reasons.tolist(), counts.tolist(), strict=True))
    for reason, count in table.skipped.items():
        merged[reason] = merged.get(reason, 0) + count
    return sorted(merged.items(), key=lambda item: (-item[1], item[0]))


def ranks_in_percent(values: np.ndarray) -> np.ndarray:
    """(N,) the share of finite values that are smaller, in percent; NaN stays NaN."""
    finite = np.sort(values[np.isfinite(values)])
    shares = 100 * np.searchsorted(finite, values, side="left") / max(len(finite), 1)
    return np.where(np.isfinite(values), shares, np.nan)


def _safe_normalized(gains: np.ndarray) -> np.ndarray:
    """Normalized gains in [0, 1]; zeros where no sample has any gain (nothing to divide by)."""
    gains = np.nan_to_num(gains)
    if len(gains) == 0 or not (gains.mean(axis=1) > 0).any():
        return np.zeros(len(gains))
    return normalized_gains(gains)


def _block_means(values: np.ndarray, kept: np.ndarray, starts: np.ndarray) -> np.ndarray:
    valid = kept & np.isfinite(values)
    sums = np.add.reduceat(np.where(valid, values, 0.0), starts) if len(starts) else np.zeros(0)
    counts = np.add.reduceat(valid.astype(np.float64), starts) if len(starts) else np.zeros(0)
    return np.divide(sums, counts, out=np.full(len(starts), np.nan), where=counts > 0)


def _source_starts(sources: np.ndarray) -> list[tuple[int, str]]:
    if len(sources) == 0:
        return []
    changes = np.flatnonzero(sources[1:] != sources[:-1]) + 1
    return [(int(row), str(sources[row])) for row in [0, *changes.tolist()]]


def _links(table: GrowthTable) -> tuple[np.ndarray, pa.Array, np.ndarray]:
    """Every recorded image neighbor: the row it belongs to, the neighbor's id, the distance."""
    assert table.neighbor_table is not None
    names = table.neighbor_table["image_neighbors"].combine_chunks()
    distances = table.neighbor_table["image_distances"].combine_chunks()
    rows = names.value_parent_indices().to_numpy()
    return rows, names.flatten(), distances.flatten().to_numpy(zero_copy_only=False)
