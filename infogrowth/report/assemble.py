"""The report's pages put together: what each section of the template gets to show."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from infogrowth.randomness import generator
from infogrowth.report import figures, numbers, projection
from infogrowth.report.charts import PAGE, compact, to_page
from infogrowth.report.dataset import GrownDataset
from infogrowth.report.galleries import Card, CardMaker, galleries, groups
from infogrowth.report.page import decimal
from infogrowth.report.pictures import Pictures
from infogrowth.report.training_figures import runs_figure
from infogrowth.report.training_runs import RECALLS, TrainingRun

MAP_POINTS = 8000
MAP_LEVELS = 7
PICTURE_ON_MAP = (0.052, 0.092)  # with a margin, as shares of the frame on a wide screen
PICTURE_ON_SMALL_MAP = (0.125, 0.1)  # the same on a phone


@dataclass(frozen=True)
class Landmark:
    """A picture on the map; places in percent of the frame."""

    left: float
    top: float
    card: Card
    level: int  # of its gain, as the dots' colors
    on_small_screens: bool


@dataclass(frozen=True)
class Map:
    """The kept set in two dimensions: dots by level of gain as SVG paths, and some pictures."""

    points: int
    explained: float
    paths: list[str]
    low: float
    high: float
    landmarks: list[Landmark]


def dataset_context(
    dataset: GrownDataset, pictures: Pictures, notes: list[str], duplicate_distance: float
) -> dict[str, Any]:
    """Everything that dataset.html.j2 shows."""
    maker = CardMaker(dataset, pictures)
    shown, total, samples = groups(dataset, maker, duplicate_distance)
    curve = numbers.growth_curve(dataset)
    visits = numbers.expected_visits(dataset.gains[dataset.kept])
    return {
        "dataset": True,
        "has_decisions": dataset.has_decisions,
        "has_text": dataset.has_text,
        "headline": numbers.headline(dataset),
        "settings_line": settings_line(dataset),
        "settings_table": sorted((key, str(value)) for key, value in dataset.settings.items()),
        "k": dataset.settings.get("k"),
        "notes": notes,
        "sources": numbers.by_source(dataset),
        "figures": _charts(dataset, curve, visits),
        "epoch_lengths": visits.epoch_length,
        "galleries": galleries(dataset, maker),
        "groups": {
            "shown": shown,
            "total": total,
            "samples": samples,
            "distance": duplicate_distance,
        },
        "map": kept_map(dataset, maker),
        "reasons": numbers.reason_counts(dataset),
    }


def settings_line(dataset: GrownDataset) -> str:
    """The settings that matter in one line."""
    if not dataset.has_decisions:
        return "A result JSON: kept samples with their gains. A growth folder tells more."
    settings = dataset.settings
    # An encoder from a folder is named by its path: the last part says enough.
    encoder = str((settings.get("encoder") or {}).get("name") or "").rstrip("/").rsplit("/", 1)[-1]
    parts = [
        f"features of {encoder}" if encoder else None,
        f"alignment threshold {dataset.min_align:.3g}" if dataset.min_align is not None else None,
        f"gain over {settings['k']} nearest neighbors" if settings.get("k") else None,
    ]
    line = ", ".join(part for part in parts if part)
    return line[:1].upper() + line[1:] + "."


def kept_map(dataset: GrownDataset, maker: CardMaker) -> Map | None:
    """The map of the kept set, or None when there are no features or too few to draw."""
    rows = np.flatnonzero(dataset.kept)
    if dataset.kept_features is None or len(rows) < 3:
        return None
    flat = projection.project(
        dataset.kept_features("image"), MAP_POINTS, generator(0, "report", "map")
    )
    rows = rows[flat.rows]
    gain = np.nan_to_num(dataset.mean_gain[rows])
    low, high = (float(value) for value in np.quantile(gain, [0.02, 0.98]))
    level = np.clip((gain - low) / max(high - low, 1e-9) * MAP_LEVELS, 0, MAP_LEVELS - 1).astype(
        int
    )
    places = np.round(15 + 970 * flat.points).astype(int)
    places[:, 1] = 1000 - places[:, 1]
    return Map(
        points=len(rows),
        explained=100 * flat.explained,
        paths=[_dots(places[level == value]) for value in range(MAP_LEVELS)],
        low=low,
        high=high,
        landmarks=_landmarks(places / 1000, rows, level, maker),
    )


def _landmarks(
    places: np.ndarray, rows: np.ndarray, level: np.ndarray, maker: CardMaker
) -> list[Landmark]:
    chosen = projection.spread_out(places, PICTURE_ON_MAP)
    small = {chosen[i] for i in projection.spread_out(places[chosen], PICTURE_ON_SMALL_MAP)}
    marks = [
        Landmark(
            left=100 * float(places[at, 0]),
            top=100 * float(places[at, 1]),
            card=maker.card(rows[at]),
            level=int(level[at]),
            on_small_screens=at in small,
        )
        for at in chosen
    ]
    # Tab walks from the top left to the bottom right.
    shown = [mark for mark in marks if mark.card.picture]
    return sorted(shown, key=lambda mark: (mark.top // 10, mark.left))


def _dots(places: np.ndarray) -> str:
    """A path whose round line ends are the dots: ten bytes each, so thousands are cheap."""
    return "".join(f"M{x} {y}h0" for x, y in np.unique(places, axis=0).tolist())


def _charts(
    dataset: GrownDataset, curve: numbers.GrowthCurve, visits: numbers.Visits
) -> dict[str, Any]:
    head = numbers.headline(dataset)
    charts: dict[str, Any] = {"growth": None, "growth_narrow": None, "alignment": None}
    if dataset.has_decisions:
        description = (
            f"Of {head.seen} samples seen, {head.kept} were kept, {head.recaptioned} of them with "
            f"a new caption, and {head.dropped} dropped. {_flattening(curve)}"
        )
        wide = figures.growth_figure(curve, PAGE, 680)
        narrow = figures.growth_figure(curve, PAGE, 350)
        charts["growth"] = to_page(wide, "growth", description)
        charts["growth_narrow"] = to_page(narrow, "growth-narrow", description)
    if np.isfinite(dataset.alignment).any():
        under = int((dataset.alignment < (dataset.min_align or 0)).sum())
        figure = figures.alignment_figure(
            dataset.alignment, dataset.verdicts, dataset.min_align, PAGE
        )
        charts["alignment"] = to_page(
            figure,
            "alignment",
            f"Histogram of alignment; {compact(under)} samples lie under the threshold.",
        )
    charts["gain"] = to_page(
        figures.gain_figure(dataset.gains[dataset.kept], dataset.has_text, PAGE),
        "gains",
        f"Histogram of gains of the kept samples; means {decimal(head.gain_image)} image "
        f"and {decimal(head.gain_text)} text.",
    )
    charts["visits"] = to_page(
        figures.visits_figure(visits, PAGE),
        "visits",
        "Expected visits per epoch of the kept samples, ordered by gain, under the uniform, "
        "proportional and two-phase samplers.",
    )
    return charts


def _flattening(curve: numbers.GrowthCurve) -> str:
    """First against last fifth of the stream, for readers who cannot see the curve."""
    gain = (curve.gain_image + curve.gain_text) / 2
    fifth = max(1, len(gain) // 5)
    first, last = gain[:fifth], gain[-fifth:]
    if not (np.isfinite(first).any() and np.isfinite(last).any()):
        return ""
    return (
        f"The mean gain went from {decimal(float(np.nanmean(first)))} in the first fifth of the "
        f"stream to {decimal(float(np.nanmean(last)))} in the last."
    )


def training_context(runs: list[TrainingRun]) -> dict[str, Any]:
    """Everything that training.html.j2 shows."""
    charts: dict[str, Any] = {"recall": None, "recall_narrow": None}
    names = ", ".join(run.name for run in runs)
    for what in ("loss", "recall"):
        if any(len(getattr(run, what).values) for run in runs):
            description = f"{what.capitalize()} over samples seen of the runs {names}."
            for key, width in ((what, 480), (f"{what}_narrow", 350)):
                figure = runs_figure(runs, what, PAGE, width)
                charts[key] = to_page(figure, f"run-{key}", description)
    found = {key for run in runs for key in run.recall_table}
    labels = {key: label for key, label in RECALLS.items() if key in found}
    return {
        "training": {"loss": None, "loss_narrow": None, "runs": runs, "recall_keys": labels}
        | charts
    }
