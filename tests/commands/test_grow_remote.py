"""`grow --features s3://…`: the same result as from the disk, streamed, resumed and retried."""

import json
import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from infogrowth import remote
from infogrowth.data.features import open_features


def datacomp(folder, selection, rows):
    """DataComp's layout: parquet and npz pairs, uids of 32 hex digits."""
    folder.mkdir()
    for number, part in enumerate(np.array_split(np.arange(rows), 3)):
        uids = [f"{row:032x}" for row in part]
        captions = [selection.expected["captions"][row] for row in part]
        pq.write_table(pa.table({"uid": uids, "text": captions}), folder / f"{number:032x}.parquet")
        image, text = (
            selection.arrays[n][part].astype(np.float16) for n in ("image_feat", "text_feat")
        )
        np.savez(folder / f"{number:032x}.npz", l14_img=image, l14_txt=text)
    return folder


def result(infogrowth, tmp_path, name, features, *arguments):
    output = tmp_path / f"{name}.json"
    status, printed = infogrowth(
        "grow", "--features", features, "--growth", tmp_path / name, "--output", output, *arguments
    )
    assert status == 0, printed
    return output.read_bytes(), printed


def test_features_in_a_bucket_grow_as_those_on_the_disk(selection, infogrowth, upload, tmp_path):
    seeds, stream = selection.folder("seeds", range(100)), selection.folder("all", range(100, 1600))
    recaptions = selection.recaptions()
    (stream / "features.json").write_text(json.dumps({"encoder": {"name": "golden"}}))
    (stream / "skipped.jsonl").write_text('{"id": "x", "reason": "the image is empty"}\n')
    local = result(
        infogrowth, tmp_path, "local", stream,
        "--seed-features", seeds, "--recaptions", recaptions,
    )  # fmt: skip
    addresses = [upload(folder) for folder in (stream, seeds, recaptions)]
    for folder in (stream, seeds, recaptions):
        shutil.rmtree(folder)
    far = result(
        infogrowth, tmp_path, "far", addresses[0],
        "--seed-features", addresses[1], "--recaptions", addresses[2],
    )  # fmt: skip
    assert far[0] == local[0]
    selection.check_golden(tmp_path / "far.json")
    assert "skipped before (no features)" in far[1]
    again = result(
        infogrowth, tmp_path, "far", addresses[0],
        "--seed-features", addresses[1], "--recaptions", addresses[2],
    )  # fmt: skip
    assert again[0] == far[0]
    assert "nothing new" in again[1]


def test_datacomp_and_single_files_in_a_bucket(selection, infogrowth, upload, tmp_path):
    folder = datacomp(tmp_path / "metadata", selection, 300)
    np.savez(
        tmp_path / "one.npz",
        ids=[f"{row:032x}" for row in range(300)],
        captions=selection.expected["captions"][:300],
        image=selection.arrays["image_feat"][:300].astype(np.float16),
        text=selection.arrays["text_feat"][:300].astype(np.float16),
    )
    local, _ = result(infogrowth, tmp_path, "local", folder)
    address = upload(folder)
    assert result(infogrowth, tmp_path, "far", address)[0] == local
    (tmp_path / "single").mkdir()
    shutil.move(tmp_path / "one.npz", tmp_path / "single/one.npz")
    single = upload(tmp_path / "single")
    assert result(infogrowth, tmp_path, "arrays", f"{single}/one.npz")[0] == local


def test_only_what_is_read_is_fetched(selection, upload, monkeypatch):
    address = upload(selection.folder("all", range(1600), shard_rows=400))
    features = open_features(address)
    fetched = []
    read = remote.RemotePath.read_range

    def counting(self, start, stop):
        fetched.append((str(self), stop - start))
        return read(self, start, stop)

    monkeypatch.setattr(remote.RemotePath, "read_range", counting)
    batch = next(features.batches(50, 1250, 1300))
    assert batch.ids == selection.expected["ids"][1250:1300]
    np.testing.assert_array_equal(batch.text, selection.arrays["text_feat"][1250:1300])
    rows = 50 * batch.text.shape[1] * selection.arrays["text_feat"].itemsize
    parts = [f"{address}/{part}/{part}_03.npy" for part in ("img_emb", "text_emb")]
    assert sorted(fetched) == [(part, size) for part in parts for size in (4096, rows)]


class Line:
    """The way to a file system; calls over it fail when ``fails`` says so of their number."""

    def __init__(self, monkeypatch):
        self.calls, self.fails, system = 0, lambda call: False, remote._system
        monkeypatch.setattr(remote, "_WAITS", (0.0, 0.0))
        monkeypatch.setattr(
            remote, "_system", lambda address: (Far(self, *system(address)[:1]), system(address)[1])
        )


class Far:
    def __init__(self, line, system):
        self._line, self._system = line, system

    def __getattr__(self, name):
        def call(*arguments, **options):
            self._line.calls += 1
            if self._line.fails(self._line.calls):
                raise ConnectionResetError("reset by peer")
            return getattr(self._system, name)(*arguments, **options)

        return call


def test_a_growth_cut_off_goes_on_and_retries_are_told(
    selection, infogrowth, upload, tmp_path, monkeypatch
):
    folder = selection.folder("all", range(1600))
    whole, _ = result(infogrowth, tmp_path, "local", folder)
    address, line = upload(folder), Line(monkeypatch)
    open_features(address)
    opening = line.calls
    growth, output = tmp_path / "far", tmp_path / "far.json"
    arguments = ("grow", "--features", address, "--growth", growth, "--output", output)
    small = ("--commit-rows", 100, "--batch-size", 100)
    line.calls, line.fails = 0, lambda call: call > opening + 30
    status, printed = infogrowth(*arguments, *small)
    assert status == 2
    assert "reset by peer" in printed
    assert f"cannot read {address}" in printed
    assert list((growth / "decisions").glob("*.parquet"))  # some of it is decided
    assert not output.exists()
    remote.retries.clear()
    line.calls, line.fails = 0, lambda call: call % 5 == 0
    status, printed = infogrowth(*arguments, *small)
    assert status == 0
    assert output.read_bytes() == whole
    assert f"{line.calls // 5} reads were tried again" in printed
    remote.retries.clear()


@pytest.mark.parametrize("address", ["s3://bucket/nothing", "nosuch://bucket/x"])
def test_an_address_without_features_is_refused(infogrowth, upload, tmp_path, address):
    status, printed = infogrowth(
        "grow", "--features", address, "--growth", tmp_path / "g", "--output", tmp_path / "o.json"
    )
    assert status == 2
    assert address.rpartition("/")[0] in printed
