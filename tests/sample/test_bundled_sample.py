"""The bundled sample is what its README says: readable, small, with exactly the planted faults."""

import hashlib
import json
from collections import Counter
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from infogrowth.data.images import decode_image
from infogrowth.data.sources import open_source

PAIRS, SEEDS, SWAPPED, COPIES = 2200, 220, 440, 176


@pytest.fixture(scope="module")
def data(repository: Path) -> Path:
    return repository / "processed_data"


@pytest.fixture(scope="module")
def samples(data):
    return list(open_source(data / "sample"))


@pytest.fixture(scope="module")
def truth(data):
    return json.loads((data / "sample_truth.json").read_text())


def test_it_reads_as_a_webdataset_of_good_pairs_in_order(data, samples):
    source = open_source(data / "sample")
    assert source.layout == "webdataset" and not list(source.notes)
    assert len(samples) == PAIRS
    assert [sample.problem for sample in samples] == [None] * PAIRS
    assert all(sample.caption and sample.data for sample in samples)
    ids = [sample.id for sample in samples]
    assert ids == sorted(ids) and all(len(key) == 9 and key.isdigit() for key in ids)


def test_every_picture_decodes_and_shows_something(samples):
    for sample in samples:
        image = decode_image(sample.data)
        assert min(image.size) >= 64 and max(image.size) <= 128, sample.id
        assert max(high - low for low, high in image.getextrema()) > 15, sample.id


def test_tables_and_statistics_agree_with_the_tars(data, samples):
    folder, by_id = data / "sample", {sample.id: sample for sample in samples}
    rows = [row for t in sorted(folder.glob("*.parquet")) for row in pq.read_table(t).to_pylist()]
    assert [row["key"] for row in rows] == list(by_id)
    for row in rows:
        sample = by_id[row["key"]]
        assert row["sha256"] == hashlib.sha256(sample.data).hexdigest()
        assert row["caption"] == sample.caption and row["status"] == "success"
        assert row["url"].startswith("pkg:npm/%40iconify-json/")
    counted = [json.loads(path.read_text()) for path in sorted(folder.glob("*_stats.json"))]
    assert sum(stats["successes"] for stats in counted) == PAIRS
    assert all(stats["status_dict"] == {"success": stats["count"]} for stats in counted)


def test_it_stays_within_twelve_megabytes(data):
    files = [path for path in data.rglob("sample*/*") if path.is_file()]
    files += [path for path in data.glob("sample_*.json") if path.name != "sample_grown.json"]
    assert sum(path.stat().st_size for path in files) <= 12_000_000


def test_the_planted_shares_are_exact(samples, truth):
    assert list(truth) == [sample.id for sample in samples]
    assert sum(entry["swapped"] for entry in truth.values()) == SWAPPED
    kinds = Counter(entry["copy_kind"] for entry in truth.values())
    assert kinds["exact"] + kinds["near"] == COPIES and min(kinds["exact"], kinds["near"]) > 60


def test_swapped_captions_belong_to_another_picture_and_share_no_word(samples, truth):
    owners = {entry["true_caption"] for entry in truth.values() if entry["swapped"]}
    for sample in samples:
        entry = truth[sample.id]
        if not entry["swapped"]:
            assert sample.caption == entry["true_caption"], sample.id
            continue
        assert sample.caption in owners
        shared = _words(sample.caption) & _words(entry["true_caption"])
        assert not shared, (sample.id, shared)


def test_copies_follow_a_clean_original(samples, truth):
    pictures = {sample.id: sample.data for sample in samples}
    for key, entry in truth.items():
        original = entry["copy_of"]
        assert (original is None) == (entry["copy_kind"] is None)
        if original is None:
            continue
        assert original < key and truth[original]["copy_of"] is None
        assert not entry["swapped"] and not truth[original]["swapped"]
        assert entry["concept"] == truth[original]["concept"]
        same_bytes = pictures[key] == pictures[original]
        assert same_bytes == (entry["copy_kind"] == "exact"), key
        assert (entry["change"] is None) == same_bytes


def test_no_two_pictures_are_the_same_except_planted_copies(samples, truth):
    originals = [s.data for s in samples if truth[s.id]["copy_of"] is None]
    assert len(set(originals)) == len(originals) == PAIRS - COPIES


def test_seeds_are_the_first_pairs_and_clean(data, samples, truth):
    seeds = json.loads((data / "sample_seeds.json").read_text())
    assert seeds == [sample.id for sample in samples[:SEEDS]]
    assert not any(truth[key]["swapped"] or truth[key]["copy_of"] for key in seeds)


def test_most_things_are_drawn_by_several_artists(truth):
    artists = {}
    for entry in truth.values():
        artists.setdefault(entry["concept"], set()).add(entry["artist"])
    assert sum(len(names) >= 2 for names in artists.values()) > len(artists) / 2
    assert set.union(*artists.values()) == {"twemoji", "fluent", "streamline"}


def test_the_retrieval_pictures_are_disjoint_from_the_pile_and_from_each_other(data, samples):
    contents = {sample.data for sample in samples}
    used = {}
    for split, pictures in {"train": 240, "val": 80, "test": 120}.items():
        entries = json.loads((data / f"sample_retrieval_{split}.json").read_text())
        names = {entry["image"] for entry in entries}
        assert len(names) == pictures
        for name in names:
            content = (data / "sample_retrieval" / name).read_bytes()
            assert content not in contents and used.setdefault(content, split) == split, name
        wanted = str if split == "train" else list
        assert all(isinstance(entry["caption"], wanted) for entry in entries)
    assert len(list((data / "sample_retrieval").iterdir())) == 440


def test_every_source_is_credited_with_its_licence(data):
    sources = json.loads((data / "sample_sources.json").read_text())
    readme = (data / "README.md").read_text()
    for source in sources:
        assert source["source_url"] in readme and source["version"] in readme, source["name"]
        spoken = source["licence"].replace("CC-BY-SA-4.0", "CC BY-SA 4.0")
        assert spoken.replace("CC-BY-4.0", "CC BY 4.0") in readme
    of_sample = {s["artist"]: s["licence"] for s in sources if s["role"] == "sample pictures"}
    of_training = {s["artist"] for s in sources if s["role"] == "training pictures"}
    assert of_sample == {"twemoji": "CC-BY-4.0", "fluent": "MIT", "streamline": "CC-BY-4.0"}
    assert not of_sample.keys() & of_training


def _words(text: str) -> set[str]:
    return set(text.replace(",", " ").split())
