"""Sources at addresses: an S3 server on loopback gives what the same files give on a disk."""

import gc
import gzip
import json
import pickle
from collections import Counter

import pytest
from layouts import LAYOUTS, write_files, write_flat, write_webdataset

from infogrowth import remote
from infogrowth.cli import main
from infogrowth.data.sources import open_source
from infogrowth.errors import UserError


@pytest.mark.parametrize("layout", ["files", "webdataset", "parquet", "imagefolder below train"])
def test_an_address_gives_the_samples_of_the_folder(tmp_path, pairs, upload, layout):
    LAYOUTS[layout](tmp_path, pairs)
    if layout == "webdataset":
        packed = (tmp_path / "00001.tar").read_bytes()
        (tmp_path / "00001.tar.gz").write_bytes(gzip.compress(packed))
        (tmp_path / "00001.tar").unlink()
    here, there = open_source(tmp_path), open_source(upload(tmp_path))
    assert list(there) == list(here)
    assert (there.layout, there.ignored) == (here.layout, here.ignored)
    assert pickle.loads(pickle.dumps(there)).read(7) == here.read(7)


def test_packing_from_an_address_can_be_interrupted_and_gives_the_same(tmp_path, pairs, upload):
    write_webdataset(tmp_path / "in", pairs)
    address = upload(tmp_path / "in")
    here, there = tmp_path / "here", tmp_path / "there"
    assert main(["pack", "--image_root", str(tmp_path / "in"), "--output_root", str(here),
                 "--quiet"]) == 0  # fmt: skip
    arguments = ["pack", "--image_root", address, "--output_root", str(there), "--quiet"]
    assert main(arguments) == 0
    (there / "cc3m_train.json").unlink()  # as if it had been killed before the end
    assert main(arguments) == 0
    for name in ("lmdb_train/data.mdb", "cc3m_train.json", "lmdb_train_skipped.jsonl"):
        assert (there / name).read_bytes() == (here / name).read_bytes()
    assert main([*arguments[:3], "--quiet"]) == 2  # results stay on a disk


def test_reads_that_fail_are_tried_again_and_counted(tmp_path, pairs, upload, monkeypatch, capsys):
    write_flat(tmp_path / "in", pairs)
    address = upload(tmp_path / "in")
    import s3fs

    failures = Counter()
    whole = s3fs.S3FileSystem._cat_file

    async def cat_file(self, path, *arguments, **options):
        failures[path] += 1
        if failures[path] == 1:
            raise ConnectionError("reset by peer")
        return await whole(self, path, *arguments, **options)

    monkeypatch.setattr(s3fs.S3FileSystem, "_cat_file", cat_file)
    s3fs.S3FileSystem.clear_instance_cache()
    monkeypatch.setattr(remote, "_WAITS", (0.0, 0.0))
    monkeypatch.setattr(remote, "retries", Counter())
    assert main(["pack", "--image_root", address, "--output_root", str(tmp_path / "out"),
                 "--quiet"]) == 0  # fmt: skip
    assert len(json.loads((tmp_path / "out" / "cc3m_train.json").read_text())) == 12
    assert "24 reads were tried again" in capsys.readouterr().err


def test_an_address_that_gives_nothing_is_one_sentence(tmp_path, upload, pairs):
    write_files(tmp_path / "in", pairs)
    address = upload(tmp_path / "in")
    with pytest.raises(UserError, match="nowhere holds no"):
        open_source(f"{address}/nowhere")


def test_a_tar_that_is_copied_leaves_nothing_behind(tmp_path, pairs, upload, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    write_webdataset(tmp_path / "in", pairs)
    source = open_source(upload(tmp_path / "in"))
    assert source.read(3).data == pairs["000000003"][0]
    del source
    gc.collect()
    assert list((tmp_path / "temporary").iterdir()) == []
