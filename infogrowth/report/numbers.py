"""The figures behind the report: pure functions of arrays, no files, no drawing."""

from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from infogrowth.growth.sampling import REVERSE_FLOOR, normalized_gains
from infogrowth.report.dataset import GrownDataset


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
    """What one source brought to the dataset."""

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


def headline(dataset: GrownDataset) -> Headline:
    """Count the verdicts and average the gains."""
    kept = dataset.kept
    gains = dataset.gains[kept]
    means = np.nanmean(gains, axis=0) if np.isfinite(gains).any() else np.full(2, np.nan)
    return Headline(
        seen=len(kept),
        seeds=int(dataset.seeds.sum()),
        kept=int(kept.sum()),
        recaptioned=int(dataset.recaptioned.sum()),
        dropped=int((~kept).sum()),
        skipped=sum(dataset.skipped.values()),
        gain_image=float(means[0]),
        gain_text=float(means[1]),
        effective_size=float(_safe_normalized(gains).sum()),
    )


def growth_curve(dataset: GrownDataset, blocks: int = 120) -> GrowthCurve:
    """Cumulative counts and the mean gain of each block of the stream.

    The block means flatten when new samples bring less that is new; a block holds at least five
    samples, so that one sample does not make a spike.
    """
    count = len(dataset.ids)
    length = max(5, -(-count // blocks))
    starts = np.arange(0, count, length)
    ends = np.minimum(starts + length, count)
    kept = dataset.kept

    def so_far(mask: np.ndarray) -> np.ndarray:
        return np.cumsum(mask)[ends - 1]

    image, text = (_block_means(dataset.gains[:, i], kept, starts) for i in (0, 1))
    return GrowthCurve(
        seen=ends,
        kept=so_far(kept & ~dataset.recaptioned),
        recaptioned=so_far(dataset.recaptioned),
        dropped=so_far(~kept),
        gain_image=image,
        gain_text=text,
        source_starts=_source_starts(dataset.sources),
    )


def by_source(dataset: GrownDataset) -> list[SourceShare]:
    """What each source brought, in the order in which the sources were read."""
    gain = dataset.mean_gain
    shares = []
    for name in dict.fromkeys(dataset.sources.tolist()):
        of_source = dataset.sources == name
        kept = of_source & dataset.kept
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


def duplicate_groups(
    dataset: GrownDataset, distance: float, space: str = "image"
) -> list[list[int]]:
    """Groups of kept samples that are linked through pairs closer than ``distance``.

    A sample is linked to those of its recorded nearest neighbors that are within ``distance``;
    groups are what hangs together. Largest first, then in stream order; rows in stream order.

    Returns:
        lists of at least two row numbers.
    """
    if dataset.neighbor_table is None:
        return []
    kept = dataset.kept
    row_of = {dataset.ids[row]: row for row in np.flatnonzero(kept).tolist()}
    parent = list(range(len(dataset.ids)))

    def root(row: int) -> int:
        while parent[row] != row:
            parent[row] = parent[parent[row]]
            row = parent[row]
        return row

    for row, neighbor in _close_pairs(dataset, distance, space):
        if neighbor in row_of and kept[row]:
            first, second = sorted((root(row), root(row_of[neighbor])))
            parent[second] = first
    members: dict[int, list[int]] = {}
    for row in row_of.values():
        members.setdefault(root(row), []).append(row)
    groups = [sorted(rows) for rows in members.values() if len(rows) > 1]
    return sorted(groups, key=lambda rows: (-len(rows), rows[0]))


def reason_counts(dataset: GrownDataset) -> list[tuple[str, int]]:
    """Why samples are not in the grown set: dropped and skipped ones by reason, most first."""
    reasons, counts = np.unique(dataset.reasons[~dataset.kept], return_counts=True)
    merged = dict(zip(reasons.tolist(), counts.tolist(), strict=True))
    for reason, count in dataset.skipped.items():
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


def _close_pairs(dataset: GrownDataset, distance: float, space: str) -> list[tuple[int, str]]:
    """(row, neighbor id) of every recorded neighbor within ``distance``."""
    assert dataset.neighbor_table is not None
    names = dataset.neighbor_table[f"{space}_neighbors"].combine_chunks()
    distances = dataset.neighbor_table[f"{space}_distances"].combine_chunks()
    rows = names.value_parent_indices().to_numpy()
    close = distances.flatten().to_numpy(zero_copy_only=False) <= distance
    chosen = names.flatten().filter(pa.array(close)).to_pylist()
    return list(zip(rows[close].tolist(), chosen, strict=True))
