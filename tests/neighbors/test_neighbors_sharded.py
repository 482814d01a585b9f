"""Shards answer as one index would: simulated in one process, and with two real Gloo ranks."""

import json
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest

from infogrowth.neighbors.base import merge_neighbors
from infogrowth.neighbors.exact import ExactIndex
from infogrowth.neighbors.rows import unit_rows
from infogrowth.neighbors.sharded import ShardedIndex

GOLDEN = Path(__file__).parents[1] / "golden"


def rows_with_copies(count, dimension=10):
    random = np.random.default_rng(count)
    rows = random.normal(size=(count, dimension))
    rows[count // 2 :] = rows[: count - count // 2]
    return unit_rows(rows)[0]


def shards(world_size, k=4):
    def no_gathering(_):
        raise AssertionError("simulated shards are merged by hand")

    return [
        ShardedIndex(ExactIndex(10, k), rank, world_size, no_gathering)
        for rank in range(world_size)
    ]


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("count", [1, 3, 5, 257])
def test_any_number_of_shards_finds_what_one_index_finds(world_size, count):
    rows = rows_with_copies(count)
    whole, parts = ExactIndex(10, 4), shards(world_size)
    for start in range(0, count, 50):  # batches of changing sizes, shards uneven or empty
        batch = rows[start : start + 50]
        whole.extend(batch)
        for part in parts:
            part.extend(batch)
    visible = np.arange(1, count + 1)
    expected = whole.search(rows, visible)
    found = merge_neighbors([part.local_search(rows, visible) for part in parts], 4)
    np.testing.assert_array_equal(found.positions, expected.positions)
    np.testing.assert_array_equal(found.products, expected.products)


def test_rows_are_spread_evenly_and_truncated_together():
    parts = shards(4)
    for part in parts:
        part.extend(rows_with_copies(103))
        assert part.count == 103
    assert [part.local.count for part in parts] == [26, 26, 26, 25]
    for part in parts:
        part.truncate(5)
    assert [part.local.count for part in parts] == [2, 1, 1, 1]


def test_rows_come_back_in_order_from_any_start():
    rows = rows_with_copies(23)
    for start, stop in [(0, 23), (3, 20), (7, 8), (5, 5)]:
        parts = shards(3)
        for part in parts:
            part.extend(rows)
        own = [
            part.local.rows(int(part._own(np.int64(start))), int(part._own(np.int64(stop))))
            for part in parts
        ]
        for part in parts:
            part._gather = lambda _, own=own: own
            np.testing.assert_array_equal(part.rows(start, stop), rows[start:stop])


PROGRAM = """
import json, sys
import numpy as np
from infogrowth import InfoGrowth, distributed
from infogrowth.growth.engine import Recaption

golden, output = sys.argv[1:]
arrays = np.load(golden + "/selection_seed0.npz")
story = json.load(open(golden + "/selection_seed0.json"))
names = zip(story["recap_ids"], story["recap_captions"], arrays["recap_text_feat"])
table = {name: Recaption(caption, feature) for name, caption, feature in names}
def rows(part):
    features = arrays["image_feat"][part], arrays["text_feat"][part]
    return story["ids"][part], story["captions"][part], *features
with distributed.process_group("cpu"):
    growth = InfoGrowth(device="cpu")
    growth.seed(*rows(slice(0, 1)))
    growth.seed(*rows(slice(1, 100)))
    first = growth.process(*rows(slice(100, 101)), table)
    growth.process(*rows(slice(101, 900)), table)
    features = [growth.kept_features(space) for space in ("image", "text")]
    local = growth._indexes["image"].local.count
    captions = [entry["caption"] for entry in growth.annotations()]
    saved = growth.settings, growth.kept_ids, captions, growth.kept_gains
    growth = InfoGrowth.restore(*saved, *features, device="cpu")
    growth.process(*rows(slice(900, 1600)), table)
    result = {"annotations": growth.annotations(), "local": local, "held": len(features[0])}
    json.dump(result, open(f"{output}/{distributed.rank()}.json", "w"))
"""


def test_two_ranks_grow_the_golden_selection_with_half_the_rows_each(tmp_path):
    program = tmp_path / "program.py"
    program.write_text(textwrap.dedent(PROGRAM))
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    subprocess.run(
        [sys.executable, *launcher, program, str(GOLDEN), str(tmp_path)],
        check=True, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    results = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1)]
    assert results[0]["annotations"] == results[1]["annotations"]
    story = json.loads((GOLDEN / "selection_seed0.json").read_text())
    exact = np.load(GOLDEN / "selection_seed0.npz")["gains_exact"]
    grown = results[0]["annotations"]
    assert [row["image"] for row in grown] == story["kept_ids"]
    assert [row["caption"] for row in grown] == story["final_captions"]
    np.testing.assert_allclose([row["gains"] for row in grown], exact, atol=1e-6, rtol=0)
    held = results[0]["held"]
    assert sorted(r["local"] for r in results) == [held // 2, held - held // 2]
