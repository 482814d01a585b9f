"""The growth folder: committed part by part, readable without us, one writer, leftovers removed."""

import json

import numpy as np
import pandas as pd
import pytest

from infogrowth.errors import UserError
from infogrowth.growth.engine import InfoGrowth
from infogrowth.growth.ledger import GrowthLedger, read_growth
from infogrowth.growth.sources import SourceProgress

SETTINGS = {
    "k": 4,
    "min_align": 0.4,
    "min_align_rule": "given",
    "modality": "pair",
    "dimension": {"image": 8, "text": 8},
    "encoder": {"name": "tiny", "fingerprint": "f" * 64},
}


def samples(count, first=0, seed=0):
    """Ids, captions and features of ``count`` samples, about half of which align."""
    random = np.random.default_rng((seed, first))
    image = random.normal(size=(count, 8)).astype(np.float32)
    noise = random.normal(size=(count, 8)).astype(np.float32)
    text = np.where(np.arange(count)[:, None] % 2, noise, image)
    ids = [f"s{number}" for number in range(first, first + count)]
    return ids, [f"caption of {name}" for name in ids], image, text


def record(ledger, growth, count, first):
    decisions = growth.process(*samples(count, first))
    ledger.record(0, decisions, np.arange(first, first + count))
    return decisions


@pytest.fixture
def grown(tmp_path):
    """A folder with two commits, and the engine whose decisions it holds."""
    growth = InfoGrowth(device="cpu")
    with GrowthLedger(tmp_path / "growth") as ledger:
        sources = [SourceProgress("stream", "features", rows=50, position=50)]
        record(ledger, growth, 20, 0)
        record(ledger, growth, 10, 20)
        ledger.commit(SETTINGS, sources)
        record(ledger, growth, 20, 30)
        ledger.commit(SETTINGS, sources)
    return tmp_path / "growth", growth


def test_what_was_committed_reads_back_the_same(grown):
    directory, growth = grown
    folder = read_growth(directory)
    assert folder.annotations() == growth.annotations()
    for space in ("image", "text"):
        np.testing.assert_array_equal(folder.kept_features(space), growth.kept_features(space))
    assert folder.totals["pairs"] == 50
    assert folder.totals["kept"] == folder.totals["dataset"] == len(growth)
    assert folder.totals["dropped"] == 50 - len(growth)
    assert sum(folder.totals["reasons"].values()) == 50
    assert folder.sources[0].features == "features"
    kept = folder.annotations()
    restored = InfoGrowth.restore(
        folder.settings,
        [entry["image"] for entry in kept],
        [entry["caption"] for entry in kept],
        [entry["gains"] for entry in kept],
        list(folder.kept_feature_parts("image")),
        list(folder.kept_feature_parts("text")),
        device="cpu",
    )
    more = samples(30, 50)
    assert list(restored.process(*more)) == list(growth.process(*more))


def test_pandas_and_numpy_read_it_without_us(grown):
    directory, growth = grown
    parts = sorted((directory / "decisions").glob("*.parquet"))
    assert [path.name for path in parts] == ["000000.parquet", "000001.parquet"]
    frame = pd.concat([pd.read_parquet(path) for path in parts], ignore_index=True)
    assert list(frame["row"]) == list(range(50))
    assert list(frame["source_row"]) == list(range(50))
    assert list(frame["id"][frame["verdict"] == "kept"]) == growth.kept_ids
    arrays = [np.load(directory / f"kept/image_00000{part}.npy") for part in (0, 1)]
    np.testing.assert_array_equal(np.concatenate(arrays), growth.kept_features("image"))
    manifest = json.loads((directory / "manifest.json").read_text())
    assert (manifest["parts"], manifest["rows"]) == (2, 50)


def test_decision_records_become_columns_one_to_one(tmp_path):
    growth = InfoGrowth(device="cpu")
    ids, captions, image, text = samples(12)
    image[3] = np.nan
    text[5] = 0
    ids[7] = ids[0]
    decisions = growth.process(ids, captions, image, text)
    rows = decisions.table(0, np.arange(12)).to_pylist()
    for row, decision in zip(rows, decisions, strict=True):
        for name in ("id", "verdict", "reason", "alignment", "gain_image", "gain_text", "caption"):
            assert row[name] == getattr(decision, name)
        neighbors = list(zip(row["image_neighbors"], row["image_distances"], strict=True))
        assert neighbors == decision.image_neighbors
        neighbors = list(zip(row["text_neighbors"], row["text_distances"], strict=True))
        assert neighbors == decision.text_neighbors
    assert rows[3]["alignment"] is None
    assert rows[3]["reason"] == "image feature is not finite"
    assert rows[5]["reason"] == "text feature is zero"
    assert rows[7]["reason"] == "id is already in the dataset"


def test_files_of_a_part_that_was_not_committed_are_removed(grown):
    directory, _ = grown
    committed = sorted(path for path in directory.rglob("*") if path.is_file())
    (directory / "decisions" / "000002.parquet").write_bytes(b"half")
    (directory / "kept" / "image_000002.npy").write_bytes(b"half")
    (directory / "kept" / "text_000000.npy.tmp-17-ab").write_bytes(b"half")
    (directory / "manifest.json.tmp-17-cd").write_bytes(b"{")
    assert read_growth(directory).totals["pairs"] == 50  # reading is not disturbed
    with GrowthLedger(directory):
        pass
    assert sorted(path for path in directory.rglob("*") if path.is_file()) == committed


def test_what_was_recorded_but_not_committed_is_forgotten(grown):
    directory, growth = grown
    before = (directory / "manifest.json").read_bytes()
    with GrowthLedger(directory) as ledger:
        record(ledger, growth, 5, 100)
        assert ledger.pending_rows == 5
    assert (directory / "manifest.json").read_bytes() == before
    assert read_growth(directory).decisions().num_rows == 50


def test_one_commit_makes_one_file_of_each_kind_whatever_was_recorded(tmp_path):
    growth = InfoGrowth(device="cpu")
    with GrowthLedger(tmp_path / "g") as ledger:
        for first in range(0, 60, 3):
            record(ledger, growth, 3, first)
        ledger.commit(SETTINGS, [])
        ledger.commit(SETTINGS, [])  # nothing new: no file
    assert len(list((tmp_path / "g/decisions").iterdir())) == 1
    assert len(list((tmp_path / "g/kept").iterdir())) == 2


def test_a_folder_in_use_is_refused(grown):
    directory, _ = grown
    with GrowthLedger(directory), pytest.raises(UserError, match=r"in use .*\d+"):
        GrowthLedger(directory)
    with GrowthLedger(directory):
        pass


def test_a_folder_with_other_things_in_it_is_left_alone(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match=r"notes\.txt"):
        GrowthLedger(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_image_growth_has_one_space_and_its_gain_in_both_columns(tmp_path):
    ids, labels, image, _ = samples(4)
    decisions = InfoGrowth(modality="image", device="cpu").process(ids, labels, image)
    with GrowthLedger(tmp_path / "g") as ledger:
        ledger.record(0, decisions, np.arange(4))
        ledger.commit({**SETTINGS, "dimension": {"image": 8, "text": None}}, [])
    folder = read_growth(tmp_path / "g")
    assert folder.spaces == ("image",)
    assert all(a["gains"][0] == a["gains"][1] for a in folder.annotations())


def test_a_damaged_part_is_named(grown):
    directory, _ = grown
    (directory / "decisions" / "000001.parquet").write_bytes(b"PAR1 no more")
    with pytest.raises(UserError, match=r"000001\.parquet .*damaged"):
        read_growth(directory).decisions()


def test_a_folder_that_is_no_growth_folder_is_named(tmp_path):
    with pytest.raises(UserError, match="not a growth"):
        read_growth(tmp_path)


def test_a_folder_without_its_manifest_is_refused_by_readers_and_writers(grown):
    directory, _ = grown
    (directory / "manifest.json").unlink()
    for opening in (read_growth, GrowthLedger):
        with pytest.raises(UserError, match=r"lost its manifest\.json"):
            opening(directory)
    assert len(list((directory / "decisions").iterdir())) == 2


def test_a_folder_killed_right_after_its_settings_were_written_is_begun_again(tmp_path):
    with GrowthLedger(tmp_path / "growth") as ledger:
        ledger.commit(SETTINGS, [])
    (tmp_path / "growth/manifest.json").unlink()
    assert read_growth(tmp_path / "growth").totals["pairs"] == 0
    with GrowthLedger(tmp_path / "growth") as ledger:
        record(ledger, InfoGrowth(device="cpu"), 20, 0)
        ledger.commit(SETTINGS, [SourceProgress("stream", "features", rows=20, position=20)])
    assert read_growth(tmp_path / "growth").totals["pairs"] == 20


def test_samples_are_pending_until_they_join(grown):
    directory, growth = grown
    frame = read_growth(directory).decisions().to_pandas()
    dropped = frame[frame.verdict == "dropped"]
    pending = read_growth(directory).pending().to_pandas()
    assert list(pending.id) == list(dropped.id)
    assert list(pending.original_alignment) == list(dropped.original_alignment)
    ids, captions, image, _ = samples(20)  # those of the first part once more, with what fits
    with GrowthLedger(directory) as ledger:
        ledger.record(1, growth.process(ids, captions, image, image), np.arange(20))
        ledger.commit(SETTINGS, [])
    later = read_growth(directory)
    assert list(later.pending()["id"].to_pylist()) == [
        name for name in dropped.id if name not in ids
    ]
    assert later.pending(before_source=1).to_pandas().equals(pending)
