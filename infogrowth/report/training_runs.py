"""Training runs read from their log.jsonl, to lay several side by side."""

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from infogrowth.errors import UserError
from infogrowth.report.charts import (
    PAGE,
    Palette,
    chart_style,
    compact_counts,
    legend_above,
    new_figure,
    to_page,
)

DASHES = ["solid", (0, (5, 1.5)), (0, (1.5, 1.2)), (0, (6, 1.5, 1.5, 1.5))]

RECALLS = {  # the keys of an evaluation's record, as they are shown
    "r_mean": "mean recall",
    "txt_r_mean": "text mean",
    "img_r_mean": "image mean",
    **{f"txt_r{k}": f"text R@{k}" for k in (1, 5, 10)},
    **{f"img_r{k}": f"image R@{k}" for k in (1, 5, 10)},
}


@dataclass(frozen=True)
class Curve:
    """One measured quantity along a run: (n,) samples seen, (n,) values."""

    seen: np.ndarray
    values: np.ndarray


@dataclass(frozen=True)
class TrainingRun:
    """What the log of a run holds."""

    name: str
    loss: Curve
    recall: Curve  # mean recall in percent; empty for a run that was not evaluated
    recall_table: dict[str, float]  # recall of the best evaluation
    samples_seen: int
    samples_per_second: float  # median; NaN when the log does not say
    hours: float  # from the first to the last record; NaN when unknown

    @property
    def last_loss(self) -> float:
        """Mean of the last twentieth of the losses (at least one), NaN without losses."""
        tail = self.loss.values[-max(1, len(self.loss.values) // 20) :]
        return float(tail.mean()) if len(tail) else float("nan")


def read_run(directory: str | os.PathLike[str], name: str | None = None) -> TrainingRun:
    """Read ``directory``/log.jsonl, or a log file itself.

    A last line that was cut off by a kill is left out; a resumed run's repeated steps count once,
    the later record winning.

    Raises:
        UserError: there is no log, a line is not JSON, or no line has a loss or a recall.
    """
    path = Path(directory)
    path = path / "log.jsonl" if path.is_dir() else path
    records = _records(path)
    with_loss = [r for r in records if _is_number(r.get("loss"))]
    # An epoch's record has the mean of its steps: it speaks only where no step was logged.
    losses = _one_per_step([r for r in with_loss if r.get("kind") != "epoch"] or with_loss)
    recalls = _one_per_step([r for r in records if "r_mean" in _recalls(r)])
    if not losses and not recalls:
        raise UserError(f"{path} has neither losses nor recalls; is it the log of a training run?")
    best = max((_recalls(r) for r in recalls), key=lambda table: table["r_mean"], default={})
    speeds = [r["samples_per_s"] for r in records if _is_number(r.get("samples_per_s"))]
    return TrainingRun(
        name=name or path.resolve().parent.name,
        loss=Curve(_seen(losses), np.array([r["loss"] for r in losses], dtype=np.float64)),
        recall=Curve(_seen(recalls), np.array([_recalls(r)["r_mean"] for r in recalls])),
        recall_table=best,
        samples_seen=int(max((_position(r) for r in [*losses, *recalls]), default=0)),
        samples_per_second=float(np.median(speeds)) if speeds else float("nan"),
        hours=_hours(records),
    )


def read_runs(directories: list[str]) -> list[TrainingRun]:
    """Several runs; those of the same folder name are told apart by their parent folder."""
    names = [Path(d).resolve().name for d in directories]
    runs = []
    for directory, name in zip(directories, names, strict=True):
        if names.count(name) > 1:
            name = f"{Path(directory).resolve().parent.name}/{name}"
        runs.append(read_run(directory, name))
    return runs


def smoothed(values: np.ndarray, limit: int = 200) -> tuple[np.ndarray, np.ndarray]:
    """Means of consecutive stretches, at most ``limit`` of them, and where each one's middle is.

    Returns:
        (m,) positions as indexes into ``values``, (m,) means.
    """
    length = max(1, -(-len(values) // limit))
    starts = np.arange(0, len(values), length)
    lengths = np.minimum(length, len(values) - starts)
    means = np.add.reduceat(values, starts) / lengths if len(values) else values
    return (starts + lengths // 2).astype(int), means


def _records(path: Path) -> list[dict[str, Any]]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise UserError(f"{path} cannot be read; give the OUTPUT_DIR of a training run") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text (byte {error.start})") from error
    records = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            if number == len(lines):  # the writer was killed in the middle of it
                continue
            raise UserError(f"line {number} of {path} is not JSON: {error.msg}") from error
        if isinstance(record, dict):
            records.append(record)
    return records


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and np.isfinite(value)


def _recalls(record: dict[str, Any]) -> dict[str, float]:
    """The recalls of an evaluation, in percent: the validation set's where there are several.

    Pretraining's own validation has them in the record itself.
    """
    tables = record if record.get("kind") == "val" else record.get("recall")
    if not isinstance(tables, dict):
        return {}
    table = tables.get("val") or tables.get("test") or tables
    return {key: float(table[key]) for key in RECALLS if _is_number(table.get(key))}


def _position(record: dict[str, Any]) -> float:
    """Where in the run a record lies: samples seen, else the step, else the epoch."""
    for key in ("samples_seen", "step", "epoch"):
        if _is_number(record.get(key)):
            return float(record[key])
    return 0.0


def _seen(records: list[dict[str, Any]]) -> np.ndarray:
    return np.array([_position(record) for record in records], dtype=np.float64)


def _one_per_step(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    by_position = {_position(record): record for record in records}
    return [by_position[position] for position in sorted(by_position)]


def _hours(records: list[dict[str, Any]]) -> float:
    times = [r["time"] for r in records if _is_number(r.get("time"))]
    return (times[-1] - times[0]) / 3600 if len(times) > 1 else float("nan")


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


def runs_figure(
    runs: Sequence[TrainingRun], what: str, palette: Palette, width: float = 570
) -> Figure:
    """``what`` ("loss" or "recall") of each run over the samples it has seen."""
    with chart_style(palette):
        figure = new_figure(width, 300)
        axes = figure.subplots()
        colors = palette.runs()
        for number, run in enumerate(runs):
            curve = run.loss if what == "loss" else run.recall
            if len(curve.values) == 0:
                continue
            at, means = smoothed(curve.values) if what == "loss" else (slice(None), curve.values)
            axes.plot(
                curve.seen[at],
                means,
                color=colors[number % len(colors)],
                linestyle=DASHES[number // len(colors) % len(DASHES)],
                marker="o" if len(means) <= 30 else "",
                markersize=4,
                label=_short(run.name),
            )
        axes.set_xlabel("samples seen")
        axes.set_ylabel("loss" if what == "loss" else "mean recall (percent)")
        axes.set_xlim(left=0)
        compact_counts(axes, "x")
        legend_above(axes, columns=2 if width < 450 else 4)
        return figure


def _short(name: str) -> str:
    # matplotlib leaves labels that begin with an underscore out of the legend
    name = name if len(name) <= 24 else name[:11] + "…" + name[-12:]
    return f"\N{ZERO WIDTH SPACE}{name}" if name.startswith("_") else name
