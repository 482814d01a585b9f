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
SETTING = ("swapped", "min_align", "k", "static_size")  # what a user may vary


def draw_figures(records: Sequence[Record], folder: Path) -> None:
    """Write `claim.png` and `claim_tables.md` into `folder`; nothing without evaluations."""
    table = pd.DataFrame(records)
    everything = table[table.kind == "val"]
    if everything.empty:
        return
    modes = everything.reindex(columns=SETTING).mode().iloc[0]  # of most runs; others vary it
    main = modes.dropna().to_dict()
    here = table[[_is_main(record, main) for record in records]]
    curves = here[here.kind == "val"]
    settings = sorted(curves.groupby(["objectives", "init_lr"]), key=lambda s: (len(s[0][0]), s[0]))
    figure = Figure(figsize=(5.4 * len(settings), 5), layout="constrained")
    panels = figure.subplots(1, len(settings), sharey=True, squeeze=False)[0]
    for axes, (_, part) in zip(panels, settings, strict=True):
        _draw_curves(axes, part)
        axes.set_title(_setting(part), fontsize=10)
    panels[0].set_ylabel("mean recall on the held-out names (%)")
    drawn = {
        line.get_label(): line for axes in panels for line in axes.get_lines() if line.get_gid()
    }
    figure.legend(
        drawn.values(), drawn.keys(), loc="outside lower center", ncols=4, frameon=False, fontsize=9
    )
    with atomic_write(folder / "claim.png") as file:
        figure.savefig(file, format="png", dpi=110)
    tables = [_arms_table(here[here.kind == "arm"], part) for _, part in settings]
    tables += [_growth_table(here), _variations_table(table, everything), _cost_table(table)]
    with atomic_write(folder / "claim_tables.md", "w") as text:
        text.write("\n\n".join(tables) + "\n")


def _is_main(record: Record, main: Record) -> bool:
    return all(record.get(name, value) == value for name, value in main.items())


def _draw_curves(axes: Axes, curves: pd.DataFrame) -> None:
    """Mean recall against samples seen; the band spans the seeds."""
    for name in (name for name in ARMS if name in set(curves.arm)):
        by_time = curves[curves.arm == name].groupby("evaluation")
        mean, low, high = by_time.r_mean.mean(), by_time.r_mean.min(), by_time.r_mean.max()
        thousands = by_time.samples_seen.mean() / 1000  # an epoch's last batch may be short
        bold = name in ("full", "grown_two_phase")
        axes.plot(
            thousands, mean, color=_COLOURS[name], label=ARMS[name].says, gid=name,
            lw=2.4 if bold else 1.4,
        )  # fmt: skip
        axes.fill_between(thousands, low, high, color=_COLOURS[name], alpha=0.15, lw=0)
    full = curves[curves.arm == "full"]
    if not full.empty:
        axes.axhline(final_recall(full), color=_COLOURS["full"], lw=0.8, ls=":")
    axes.set_xlabel("samples seen (thousands)")
    axes.set_ylim(bottom=0)
    axes.set_xlim(left=0)
    axes.spines[["top", "right"]].set_visible(False)


def _setting(curves: pd.DataFrame) -> str:
    first = curves.iloc[0]
    return f"Objectives {first.objectives.replace('+', ', ')}; learning rate {first.init_lr:g}"


def final_recall(curves: pd.DataFrame) -> float:
    """Mean recall over the seeds that were trained longest, at their end."""
    return float(curves[curves.evaluation == curves.evaluation.max()].r_mean.mean())


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
        The ratio and its 95 % interval over seeds (bootstrap of both arms' seeds, those that were
        trained longest); NaN when the full arm is missing, 0 where the arm does not reach it.
    """
    full, other = (_longest(curves[curves.arm == name]) for name in ("full", arm))
    if not full or not other:
        return (float("nan"),) * 3
    ratios = []
    rng = generator(0, "claim", "bootstrap", arm)
    draws: list[tuple[list[Any], list[Any]]] = [(list(full), list(other))]
    for _ in range(_RESAMPLES):
        draws.append(tuple(list(rng.choice(list(a), len(a))) for a in (full, other)))  # type: ignore[arg-type]
    for full_seeds, other_seeds in draws:
        pooled_full = pd.concat([full[s] for s in full_seeds])
        recall, seen = final_recall(pooled_full), float(pooled_full.samples_seen.max())
        pooled = pd.concat([other[s] for s in other_seeds]).groupby("evaluation")
        ratios.append(seen / samples_to_reach(pooled[["samples_seen", "r_mean"]].mean(), recall))
    low, high = np.quantile(ratios[1:], [0.025, 0.975])
    return ratios[0], float(low), float(high)


def _longest(curves: pd.DataFrame) -> dict[int, pd.DataFrame]:
    """The curves of the seeds that were trained longest."""
    last = curves.evaluation.max()
    seeds = curves.groupby("seed").filter(lambda rows: rows.evaluation.max() == last)
    return dict(iter(seeds.groupby("seed")))


def _arms_table(made: pd.DataFrame, curves: pd.DataFrame) -> str:
    common = int(curves.groupby("arm").evaluation.max().min())  # where every arm was evaluated
    at_common = curves[curves.evaluation == common]
    lines = [
        f"{_setting(curves)}. Recall: mean over seeds (lowest–highest).",
        "",
        "| arm | pairs | wrong | distinct captions "
        f"| recall at {at_common.samples_seen.max():,.0f} (seeds) "
        "| recall at the end (seeds; samples) | full arm's final recall in fewer samples |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name in (name for name in ARMS if name in set(curves.arm)):
        mine = curves[curves.arm == name]
        end = mine[mine.evaluation == mine.evaluation.max()]
        ratio, low, high = speed_up(curves, name)
        lowest = f"{low:.1f}" if low else "not reached"
        interval = f" ({lowest}–{high:.1f})" if high > low else ""
        reach = f"{ratio:.1f} ×{interval}" if ratio > 0 else "not reached"
        lines.append(
            f"| {ARMS[name].says} | {_pairs(made[made.arm == name])} "
            f"| {_over_seeds(at_common[at_common.arm == name])} "
            f"| {_over_seeds(end, f'; {end.samples_seen.max():,.0f}')} "
            f"| {reach if name != 'full' else '–'} |"
        )
    return "\n".join(lines)


def _over_seeds(rows: pd.DataFrame, more: str = "") -> str:
    recall = rows.r_mean
    spread = f", {recall.min():.1f}–{recall.max():.1f}" if len(rows) > 1 else ""
    return f"{recall.mean():.1f} ({len(rows)}{spread}{more})"


def _pairs(made: pd.DataFrame) -> str:
    first = made.iloc[0]  # of the seeds
    return f"{first.pairs:,.0f} | {first.wrong:.1%} | {first.captions:,.0f}"


def _variations_table(table: pd.DataFrame, curves: pd.DataFrame) -> str:
    """Every setting and rate that was tried, at the same number of samples."""
    tried = curves[curves.objectives == "ita"].reindex(columns=curves.columns.union(SETTING))
    keys = [*SETTING, "arm", "init_lr"]
    common = tried.groupby(keys, dropna=False).evaluation.max().min()
    at_common = tried[tried.evaluation == common]
    lines = [
        "| captions swapped | `--min-align` | k | size | arm | rate | pairs | wrong "
        f"| distinct captions | recall at {at_common.samples_seen.max():,.0f} (seeds) |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    made = table[table.kind == "arm"].reindex(columns=tried.columns.union(table.columns))
    made = made.fillna({"static_size": 0})
    rows = at_common.fillna({"static_size": 0}).groupby(keys)
    for (swapped, threshold, k, size, arm, rate), runs in rows:
        mine = made[
            (made.swapped == swapped) & (made.min_align == threshold) & (made.k == k)
            & (made.static_size == size) & (made.arm == arm)
        ]  # fmt: skip
        lines.append(
            f"| {swapped:.0%} | {threshold} | {k:.0f} | {f'{size:,.0f}' if size else 'all'} "
            f"| {ARMS[arm].says} | {rate:g} | {_pairs(mine)} | {_over_seeds(runs)} |"
        )
    return "\n".join(lines)


def _growth_table(table: pd.DataFrame) -> str:
    lines = [
        "| portion | pairs | kept | wrong among the kept | noise estimated so far | noise true |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for r in table[table.kind == "portion"].itertuples():
        estimate = "–" if pd.isna(r.noise_so_far) else f"{r.noise_so_far:.1%}"
        lines.append(
            f"| {r.portion:.0f} | {r.pairs:,.0f} | {r.kept:,.0f} | {r.wrong_kept:.1%} "
            f"| {estimate} | {r.noise_true:.1%} |"
        )
    return "\n".join(lines)


def _cost_table(table: pd.DataFrame) -> str:
    """CPU seconds of each step, on average over the settings or seeds that it was done for."""
    costs = table[table.kind == "cost"].fillna({"arm": "", "objectives": ""})
    lines = ["| step | device | done | CPU seconds each |", "| --- | --- | --- | --- |"]
    for (step, arm, objectives, device), rows in costs.groupby(
        ["step", "arm", "objectives", "device"], sort=False
    ):
        name = f"{step} {arm} ({objectives})" if arm else step
        lines.append(f"| {name} | {device} | {len(rows)} | {rows.cpu_s.mean():,.0f} |")
    return "\n".join(lines)
