"""The picture and the tables of docs/claim.md, from the results file alone."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from claim_parts.arms import ARMS
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from infogrowth.files import atomic_write
from infogrowth.randomness import generator

Record = dict[str, Any]
_COLOURS = {
    "full": "#444444",
    "random": "#999999",
    "alignment": "#0072b2",
    "semdedup": "#56b4e9",
    "grown_static": "#e69f00",
    "grown_uniform": "#f0c070",
    "grown_proportional": "#009e73",
    "grown_two_phase": "#d55e00",
    "grown_by_right": "#882255",
    "oracle": "#cc79a7",
}
_RESAMPLES = 2000


def draw_figures(records: Sequence[Record], folder: Path) -> None:
    """Write `claim.png` and `claim_tables.md` into `folder`; nothing without evaluations."""
    curves = pd.DataFrame([r for r in records if r["kind"] == "val"])
    if curves.empty:
        return
    figure = Figure(figsize=(9, 5.5), layout="constrained")
    main = curves[curves.objectives == curves.objectives.mode()[0]]
    _draw_curves(figure.subplots(), main)
    with atomic_write(folder / "claim.png") as file:
        figure.savefig(file, format="png", dpi=120)
    tables = [_arms_table(records, part) for _, part in curves.groupby("objectives")]
    with atomic_write(folder / "claim_tables.md", "w") as text:
        text.write("\n\n".join([*tables, _growth_table(records), _cost_table(records)]) + "\n")


def _draw_curves(axes: Axes, curves: pd.DataFrame) -> None:
    """Mean recall against samples seen; the band spans the seeds."""
    for name in (name for name in ARMS if name in set(curves.arm)):
        by_time = curves[curves.arm == name].groupby("evaluation")
        mean, low, high = by_time.r_mean.mean(), by_time.r_mean.min(), by_time.r_mean.max()
        thousands = by_time.samples_seen.mean() / 1000  # an epoch's last batch may be short
        bold = name in ("full", "grown_two_phase")
        axes.plot(
            thousands, mean, color=_COLOURS[name], label=ARMS[name].says, lw=2.4 if bold else 1.4
        )
        axes.fill_between(thousands, low, high, color=_COLOURS[name], alpha=0.15, lw=0)
    full = curves[curves.arm == "full"]
    if not full.empty:
        final = full[full.evaluation == full.evaluation.max()].r_mean.mean()
        axes.axhline(final, color=_COLOURS["full"], lw=0.8, ls=":")
    axes.set_xlabel("samples seen (thousands)")
    axes.set_ylabel("mean recall on the held-out names (%)")
    axes.set_ylim(bottom=0)
    axes.set_xlim(left=0)
    axes.legend(frameon=False, fontsize=9)
    axes.spines[["top", "right"]].set_visible(False)


def samples_to_reach(curve: pd.DataFrame, recall: float) -> float:
    """Samples seen when the curve first reaches `recall`, by linear interpolation; inf if never."""
    curve = curve.sort_values("samples_seen")
    seen, values = [0.0, *curve.samples_seen], [0.0, *curve.r_mean]
    for at in range(1, len(seen)):
        if values[at] >= recall:
            share = (recall - values[at - 1]) / max(values[at] - values[at - 1], 1e-12)
            return seen[at - 1] + max(0.0, share) * (seen[at] - seen[at - 1])
    return float("inf")


def speed_up(curves: pd.DataFrame, arm: str) -> tuple[float, float, float]:
    """By how much fewer samples an arm reaches the full arm's final recall.

    Returns:
        The ratio and its 95 % interval over seeds (bootstrap of both arms' seeds); NaN when the
        full arm is missing, 0 where the arm does not reach it.
    """
    full, other = (dict(iter(curves[curves.arm == name].groupby("seed"))) for name in ("full", arm))
    if not full or not other:
        return (float("nan"),) * 3
    ratios = []
    rng = generator(0, "claim", "bootstrap", arm)
    draws: list[tuple[list[Any], list[Any]]] = [(list(full), list(other))]
    for _ in range(_RESAMPLES):
        draws.append(tuple(list(rng.choice(list(a), len(a))) for a in (full, other)))  # type: ignore[arg-type]
    for full_seeds, other_seeds in draws:
        ends = [full[s].sort_values("samples_seen").iloc[-1] for s in full_seeds]
        recall = float(np.mean([end.r_mean for end in ends]))
        seen = float(np.mean([end.samples_seen for end in ends]))
        pooled = pd.concat([other[s] for s in other_seeds]).groupby("evaluation")
        ratios.append(seen / samples_to_reach(pooled[["samples_seen", "r_mean"]].mean(), recall))
    low, high = np.quantile(ratios[1:], [0.025, 0.975])
    return ratios[0], float(low), float(high)


def _arms_table(records: Sequence[Record], curves: pd.DataFrame) -> str:
    objectives = curves.objectives.iloc[0]
    lines = [
        f"Objectives: {objectives}. Recall is the mean over seeds (lowest–highest).",
        "",
        "| arm | pairs | wrong | distinct captions | seeds | recall at its end | at samples | "
        "full arm's final recall in fewer samples |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name in (name for name in ARMS if name in set(curves.arm)):
        mine = curves[curves.arm == name]
        end = mine[mine.evaluation == mine.evaluation.max()].r_mean
        made = next(r for r in records if r["kind"] == "arm" and r["arm"] == name)
        ratio, low, high = speed_up(curves, name)
        reach = f"{ratio:.1f} × ({low:.1f}–{high:.1f})" if ratio > 0 else "not reached"
        lines.append(
            f"| {ARMS[name].says} | {made['pairs']:,} | {made['wrong']:.1%} | {made['captions']:,} "
            f"| {mine.seed.nunique()} | {end.mean():.1f} ({end.min():.1f}–{end.max():.1f}) "
            f"| {mine.samples_seen.max():,} | {reach if name != 'full' else '–'} |"
        )
    return "\n".join(lines)


def _growth_table(records: Sequence[Record]) -> str:
    lines = [
        "| portion | pairs | kept | wrong among the kept | noise estimated so far | noise true |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for r in (r for r in records if r["kind"] == "portion"):
        estimate = "–" if r["noise_so_far"] is None else f"{r['noise_so_far']:.1%}"
        lines.append(
            f"| {r['portion']} | {r['pairs']:,} | {r['kept']:,} | {r['wrong_kept']:.1%} "
            f"| {estimate} | {r['noise_true']:.1%} |"
        )
    return "\n".join(lines)


def _cost_table(records: Sequence[Record]) -> str:
    lines = ["| step | device | CPU seconds |", "| --- | --- | --- |"]
    for r in (r for r in records if r["kind"] == "cost"):
        lines.append(f"| {r['step']} | {r['device']} | {r['cpu_s']:,.0f} |")
    return "\n".join(lines)
