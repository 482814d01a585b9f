"""How well each score separates the sample's right captions from the swapped ones.

    python -m infogrowth score --features FEATURES --by cosine negclip itm --output output/scores
    python benchmarks/caption_scores.py --scores output/scores

Read against the planted truth, seeds left out: AUROC with its 95 % interval over resamplings, and
the precision of "swapped" at the threshold that finds 80 % of the swapped captions.
"""

import sys
from dataclasses import dataclass

import numpy as np
import pandas as pd

from infogrowth.annotations import read_ids
from infogrowth.cli import run_script
from infogrowth.config import option
from infogrowth.evaluation.truth import auroc
from infogrowth.files import read_json


@dataclass(frozen=True)
class Config:
    """Options of the comparison."""

    scores: str = option(help="a folder that `score` wrote")
    truth: str = option("processed_data/sample_truth.json", help="what is swapped, by id")
    seeds: str = option("processed_data/sample_seeds.json", help="ids that are left out")
    recall: float = option(0.8, help="share of the swapped captions to find")


def precision_at_recall(scores: np.ndarray, positive: np.ndarray, recall: float) -> float:
    """The precision of the highest scores, as many as hold this share of the positive samples;
    samples that score the same are taken together.

    Args:
        scores: ``(N,)`` real numbers; positive: ``(N,)`` booleans with at least one True.
    """
    scores, positive = np.asarray(scores), np.asarray(positive, dtype=bool)
    wanted = int(np.ceil(recall * positive.sum() - 1e-9))
    threshold = np.sort(scores[positive])[::-1][wanted - 1]
    taken = scores >= threshold
    return float(positive[taken].mean())


def run(config: Config) -> int:
    """Print one line per score."""
    truth, seeds = read_json(config.truth, "the truth file"), read_ids(config.seeds)
    table = pd.read_parquet(config.scores)
    table = table[~table.id.isin(seeds)]
    swapped = table.id.map(lambda sample: truth[sample]["swapped"]).to_numpy(bool)
    random = np.random.default_rng(0)
    print(f"{len(table)} pairs, {swapped.sum()} of them swapped")
    print(f"{'score':<10} {'AUROC':>6}  {'95 % interval':>13}  precision at recall {config.recall}")
    for name in (c for c in table.columns if c != "id" and not c.startswith("recaption_")):
        values = table[name].to_numpy()
        draws = [random.integers(len(values), size=len(values)) for _ in range(200)]
        low, high = np.quantile([auroc(values[d], ~swapped[d]) for d in draws], [0.025, 0.975])
        precision = precision_at_recall(-values, swapped, config.recall)
        area = auroc(values, ~swapped)
        print(f"{name:<10} {area:>6.3f}  {low:>6.3f}–{high:.3f}  {precision:>19.3f}")
    return 0


if __name__ == "__main__":
    sys.exit(run_script(Config, run))
