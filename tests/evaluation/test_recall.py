"""Recall tables against the paper's own (golden D), the stated tie rule, and broken scores."""

import json

import numpy as np
import pytest

from infogrowth.errors import UserError
from infogrowth.evaluation.retrieval import as_text, chance_table, first_rank, recall_table


@pytest.fixture(scope="module")
def meta(golden):
    return json.loads((golden / "retrieval_meta.json").read_text())


@pytest.fixture(scope="module")
def arrays(golden):
    return np.load(golden / "retrieval_arrays.npz")


def truth(meta):
    img2txt = [meta["eval"]["img2txt"][str(i)] for i in range(12)]
    txt2img = [meta["eval"]["txt2img"][str(t)] for t in range(30)]
    return img2txt, txt2img


@pytest.mark.parametrize(
    ("scores", "table"),
    [
        ("itm_s", "itm_synthetic_ties"),
        ("itm_u", "itm_synthetic_unique"),
        ("eval_k8_score", "eval_k8_itm_eval"),
        ("eval_k12_score", "eval_k12_itm_eval"),
    ],
)
def test_recall_tables_are_the_golden_ones(meta, arrays, scores, table):
    found = recall_table(arrays[f"{scores}_i2t"], arrays[f"{scores}_t2i"], *truth(meta))
    assert found.keys() == meta[table].keys()
    for key, value in meta[table].items():
        assert found[key] == pytest.approx(value, abs=1e-9), key


def test_first_rank_is_what_a_reversed_stable_sort_gives():
    random = np.random.default_rng(0)
    scores = random.integers(0, 6, (40, 23)).astype(np.float32)  # many ties
    right = [random.choice(23, size=random.integers(1, 5), replace=False) for _ in range(40)]
    order = np.argsort(scores, axis=1, kind="stable")[:, ::-1]
    expected = [min(int(np.flatnonzero(order[q] == r)[0]) for r in right[q]) for q in range(40)]
    assert first_rank(scores, right).tolist() == expected


def test_equal_scores_rank_the_higher_index_first():
    scores = np.zeros((4, 4))
    assert first_rank(scores, [[0], [1], [2], [3]]).tolist() == [3, 2, 1, 0]


def test_a_query_without_a_right_answer_is_never_found():
    assert first_rank(np.ones((1, 3)), [[]]).tolist() == [3]


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_scores_that_are_not_finite_are_no_perfect_recall(value):
    scores = np.zeros((3, 3))
    scores[1, 1] = value
    with pytest.raises(UserError, match="not finite"):
        recall_table(scores, np.zeros((3, 3)), [[0], [1], [2]], [0, 1, 2])


def test_chance_is_what_random_scores_give():
    random = np.random.default_rng(1)
    tables = [
        recall_table(
            random.random((20, 60)),
            random.random((60, 20)),
            [[3 * i, 3 * i + 1, 3 * i + 2] for i in range(20)],
            [t // 3 for t in range(60)],
        )
        for _ in range(400)
    ]
    for key, value in chance_table(20, 60).items():
        assert np.mean([table[key] for table in tables]) == pytest.approx(value, abs=2.5), key


def test_tables_print_aligned_in_per_cent(meta):
    text = as_text({"val": meta["eval_k8_itm_eval"]}).splitlines()
    assert text[0].split() == ["TR@1", "TR@5", "TR@10", "IR@1", "IR@5", "IR@10", "mean"]
    assert text[1].split() == ["val", "8.33", "25.00", "50.00", "10.00", "50.00", "86.67", "38.33"]
    assert len(text[0]) == len(text[1])
