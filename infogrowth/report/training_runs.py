"""Training runs read from their log.jsonl, to lay several side by side."""

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from infogrowth.errors import UserError, refusing
from infogrowth.report.charts import COLORS, NARROW, finish, is_narrow, svg

RUN_COLORS = ["image", "run2", "kept", "dropped", "text", "run6"]  # those of --run1 … in style.css
DASHES = ["solid", (0, (5, 1.5)), (0, (1.5, 1.2)), (0, (6, 1.5, 1.5, 1.5))]
RECALLS = {  # the keys of an evaluation's record, as they are shown
    "r_mean": "mean recall",
    "txt_r_mean": "text mean",
    "img_r_mean": "image mean",
    **{f"txt_r{k}": f"text R@{k}" for k in (1, 5, 10)},
    **{f"img_r{k}": f"image R@{k}" for k in (1, 5, 10)},
}


@dataclass(frozen=True, eq=False)
class TrainingRun:
    """What the log of a run holds.

    Attributes:
        loss, recall: values by the number of samples seen (index), ascending; recall is the mean
            recall in percent, empty for a run that was not evaluated.
        recall_table: of the best evaluation, in percent.
        samples_per_second: median; NaN when the log does not say.
        hours: from the first to the last record; NaN when unknown.
    """

    name: str
    loss: pd.Series
    recall: pd.Series
    recall_table: dict[str, float]
    samples_per_second: float
    hours: float

    @property
    def samples_seen(self) -> int:
        """At the last loss or evaluation."""
        return int(max(curve.index[-1] for curve in (self.loss, self.recall) if len(curve)))

    @property
    def last_loss(self) -> float:
        """Mean of the last twentieth of the losses (at least one), NaN without losses."""
        return float(self.loss.iloc[-max(1, len(self.loss) // 20) :].mean())


def read_run(directory: str | os.PathLike[str], name: str | None = None) -> TrainingRun:
    """Read ``directory``/log.jsonl, or a log file itself.

    A last line that a kill left unfinished is ignored; a resumed run's repeated steps count once,
    the later record winning. Raises UserError: there is no log, a line is not JSON, or no line has
    a loss or a recall.
    """
    path = Path(directory)
    path = path / "log.jsonl" if path.is_dir() else path
    records = _records(path)
    with_loss = [r for r in records if _is_number(r.get("loss"))]
    # An epoch's record has the mean of its steps: it counts only where no step was logged.
    losses = [r for r in with_loss if r.get("kind") != "epoch"] or with_loss
    recalls = [(_position(r), table) for r in records if "r_mean" in (table := _recalls(r))]
    if not losses and not recalls:
        raise UserError(f"{path} has neither losses nor recalls; is it the log of a training run?")
    tables = dict(recalls)  # one per position: the last
    best = max((tables[at] for at in sorted(tables)), key=lambda t: t["r_mean"], default={})
    speeds = [r["samples_per_s"] for r in records if _is_number(r.get("samples_per_s"))]
    times = [r["time"] for r in records if _is_number(r.get("time"))]
    curves = (
        {_position(record): record["loss"] for record in losses},
        {at: table["r_mean"] for at, table in tables.items()},
    )
    loss, recall = (pd.Series(curve, dtype=float).sort_index() for curve in curves)
    return TrainingRun(
        name=name or path.resolve().parent.name,
        loss=loss,
        recall=recall,
        recall_table=best,
        samples_per_second=float(np.median(speeds)) if speeds else float("nan"),
        hours=(times[-1] - times[0]) / 3600 if len(times) > 1 else float("nan"),
    )


def read_runs(directories: list[str]) -> list[TrainingRun]:
    """Several runs; those of the same folder name are named with their parent folder."""
    paths = [Path(directory).resolve() for directory in directories]
    names = [path.name for path in paths]
    return [
        read_run(path, path.name if names.count(path.name) == 1 else "/".join(path.parts[-2:]))
        for path in paths
    ]


def smoothed(curve: pd.Series, limit: int = 200) -> pd.Series:
    """Means of consecutive stretches, at most ``limit`` of them, each at its middle."""
    length = max(1, -(-len(curve) // limit))
    stretches = curve.groupby(np.arange(len(curve)) // length)
    middles = [stretch.index[len(stretch) // 2] for _, stretch in stretches]
    return pd.Series(stretches.mean().to_numpy(), middles, dtype=float)


def _records(path: Path) -> list[dict[str, Any]]:
    with refusing(path, "the log of a training run", UnicodeDecodeError, fault="is not UTF-8 text"):
        lines = path.read_text(encoding="utf-8").splitlines()
    records = []
    for number, line in enumerate(lines, start=1):
        try:
            records.append(json.loads(line.strip() or "null"))
        except json.JSONDecodeError as error:
            if number == len(lines):  # the writer was killed in the middle of it
                continue
            raise UserError(f"line {number} of {path} is not JSON: {error.msg}") from error
    return [record for record in records if isinstance(record, dict)]


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
    keys = ("samples_seen", "step", "epoch")
    return next((float(record[key]) for key in keys if _is_number(record.get(key))), 0.0)


def training_context(runs: list[TrainingRun]) -> dict[str, Any]:
    """Everything that training.html.j2 shows."""
    names = [run.name for run in runs]
    curves = {
        "loss": ("loss", [smoothed(run.loss) for run in runs]),
        "recall": ("mean recall (percent)", [run.recall for run in runs]),
    }
    charts = {
        what: svg(
            f"run-{what}",
            (480, 300),
            draw_runs,
            ylabel,
            names,
            of_runs,
            narrow=(NARROW, 300),
            description=f"{what.capitalize()} over samples seen of the runs {', '.join(names)}.",
        )
        for what, (ylabel, of_runs) in curves.items()
        if any(map(len, of_runs))
    }
    found = {key for run in runs for key in run.recall_table}
    labels = {key: label for key, label in RECALLS.items() if key in found}
    return {"training": {"charts": charts, "runs": runs, "recall_keys": labels}}


def draw_runs(
    figure: Figure, ylabel: str, names: Sequence[str], curves: Sequence[pd.Series]
) -> None:
    """A curve of each run over the samples it has seen."""
    axes = figure.subplots()
    for number, (name, curve) in enumerate(zip(names, curves, strict=True)):
        if len(curve):
            label = name if len(name) <= 24 else f"{name[:11]}…{name[-12:]}"
            if label.startswith("_"):  # matplotlib would leave it out of the legend
                label = f"\N{ZERO WIDTH SPACE}{label}"
            axes.plot(
                curve,
                color=COLORS[RUN_COLORS[number % len(RUN_COLORS)]],
                linestyle=DASHES[number // len(RUN_COLORS) % len(DASHES)],
                marker="o" if len(curve) <= 30 else "",
                markersize=4,
                label=label,
            )
    columns = 2 if is_narrow(figure) else 4
    finish(axes, "x", columns, xlabel="samples seen", ylabel=ylabel, xlim=(0, None))
