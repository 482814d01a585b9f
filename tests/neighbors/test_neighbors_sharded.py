"""Shards answer as one index would: simulated in one process, and with two real Gloo ranks."""

import json
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
from oracle import in_batches, on_ranks

from infogrowth.neighbors.index import NeighborIndex
from infogrowth.rows import unit_rows

GOLDEN = Path(__file__).parents[1] / "golden"


def rows_with_copies(count, dimension=10):
    random = np.random.default_rng(count)
    rows = random.normal(size=(count, dimension))
    rows[count // 2 :] = rows[: count - count // 2]
    return unit_rows(rows)[0]


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
@pytest.mark.parametrize("count", [1, 3, 5, 257])
def test_any_number_of_shards_finds_what_one_index_finds(world_size, count):
    rows = rows_with_copies(count)

    def grow(index):  # batches of changing sizes, shards uneven or empty
        return *in_batches(index, rows, 50), index.rows(count // 3, count), index.count

    positions, products, some, held = grow(NeighborIndex(10, 4))
    assert held == count
    np.testing.assert_array_equal(some, rows[count // 3 :])
    for rank in on_ranks(world_size, grow, 10, 4):
        np.testing.assert_array_equal(rank[0], positions)
        np.testing.assert_array_equal(rank[1], products)
        np.testing.assert_array_equal(rank[2], some)


def test_rows_are_spread_evenly_and_truncated_together():
    def held(index):
        index.extend(rows_with_copies(103))
        before = index._rows.count
        index.truncate(5)
        return before, index._rows.count, index.count

    assert on_ranks(4, held, 10, 4) == [(26, 2, 5), (26, 1, 5), (26, 1, 5), (25, 1, 5)]


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
    local = growth._indexes["image"]._rows.count
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
