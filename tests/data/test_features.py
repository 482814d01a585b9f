"""Feature folders: written shard by shard, read as one stream, other people's layouts included."""

import itertools
import json
import zipfile

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from infogrowth.data.feature_writer import FeatureWriter, finished_shards, write_shard
from infogrowth.data.features import open_features
from infogrowth.errors import UserError

RANDOM = np.random.default_rng(0)
IMAGE = RANDOM.normal(size=(23, 6)).astype(np.float32)
TEXT = RANDOM.normal(size=(23, 6)).astype(np.float32)
IDS = [f"id{row:02d}" for row in range(23)]
CAPTIONS = [f"caption {row}" for row in range(23)]
SIZES = (5, 9, 0, 6, 3)  # rows per shard


def unit(rows):
    return rows / np.linalg.norm(rows.astype(np.float64), axis=1, keepdims=True)


def shard_slices():
    ends = np.cumsum(SIZES)
    return [slice(end - size, end) for end, size in zip(ends, SIZES, strict=True)]


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "features"
    for number, rows in enumerate(shard_slices()):
        texts, extra = (IDS[rows], CAPTIONS[rows]), {"url": CAPTIONS[rows]}
        write_shard(folder, f"{number}", *texts, IMAGE[rows], TEXT[rows], extra)
    return folder


def collected(stream, **options):
    batches = list(stream.batches(**options))
    ids = [sample for batch in batches for sample in batch.ids]
    return batches, ids


def test_the_stream_is_the_shards_one_after_the_other(folder):
    stream = open_features(folder)
    assert (stream.rows, stream.dimension) == (23, 6)
    for batch_size, start in itertools.product((1, 4, 7, 23, 100), (0, 5, 13, 22)):
        check_batches(stream, batch_size, start)


def check_batches(stream, batch_size, start):
    batches, ids = collected(stream, batch_size=batch_size, start_row=start)
    assert ids == IDS[start:]
    assert all(len(batch) == batch_size for batch in batches[:-1])
    assert np.concatenate([batch.rows for batch in batches]).tolist() == list(range(start, 23))
    for space, rows in (("image", IMAGE), ("text", TEXT)):
        read = np.concatenate([getattr(batch, space) for batch in batches])
        assert read.dtype == np.float32
        np.testing.assert_allclose(read, unit(rows)[start:], rtol=0, atol=6e-4)


def test_files_lie_where_clip_retrieval_puts_them_in_half_precision(folder):
    assert (folder / "img_emb/img_emb_0.npy").is_file()
    assert (folder / "text_emb/text_emb_4.npy").is_file()
    stored = np.load(folder / "img_emb/img_emb_1.npy")
    assert stored.dtype == np.float16
    assert list(pq.read_table(folder / "metadata/metadata_1.parquet").column_names) == [
        "image_path",
        "caption",
        "url",
    ]


def test_numbers_are_padded_to_one_width(tmp_path):
    """A folder that grows keeps the zeros it has."""

    def opened_for(rows):
        samples = [(f"{row}", f"{row}") for row in range(rows)]
        identity = {"samples": f"{rows}"}
        return FeatureWriter(tmp_path, identity, rows, shard_size=1, samples=samples)

    assert opened_for(5).name(3) == "3"
    write_shard(tmp_path, "3", ["3"], ["3"], IMAGE[:1], TEXT[:1])
    assert opened_for(101).name(7) == "7"
    (tmp_path / "finished/3.json").unlink()
    assert opened_for(102).name(7) == "007"


def test_chosen_rows_fill_whole_batches(folder):
    stream = open_features(folder)
    odd = np.arange(23) % 2 == 1
    batches, ids = collected(stream, batch_size=4, start_row=2, stop_row=20, chosen=odd)
    assert ids == IDS[3:20:2]
    assert [len(batch) for batch in batches] == [4, 4, 1]
    assert batches[0].rows.tolist() == [3, 5, 7, 9]
    np.testing.assert_array_equal(batches[1].image, open_rows(stream, batches[1].rows))


def open_rows(stream, rows):
    return np.concatenate([stream.row(int(row)).image for row in rows])


def test_one_row_at_a_time(folder):
    stream = open_features(folder)
    assert [stream.row(row).ids[0] for row in (0, 4, 5, 13, 14, 22)] == [
        IDS[row] for row in (0, 4, 5, 13, 14, 22)
    ]


def test_a_shard_is_finished_when_all_its_files_are_in_place(folder):
    assert finished_shards(folder) == dict(enumerate(SIZES))
    (folder / "text_emb/text_emb_3.npy").unlink()
    (folder / "finished/1.json").unlink()
    assert finished_shards(folder).keys() == {0, 2, 4}


def test_a_killed_write_leaves_no_finished_shard(tmp_path, monkeypatch):
    shard = tmp_path, "0", ["a"], ["b"], IMAGE[:1], TEXT[:1]

    def full_disk(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(pq, "write_table", full_disk)
    with pytest.raises(UserError, match=r"metadata_0\.parquet.*space"):
        write_shard(*shard)
    assert finished_shards(tmp_path) == {}
    monkeypatch.undo()
    write_shard(*shard)
    assert finished_shards(tmp_path) == {0: 1}


def test_skipped_samples_are_joined_in_shard_order_and_counted(tmp_path):
    writer = FeatureWriter(tmp_path, {}, rows=2, shard_size=1)
    no_image = [{"id": "z", "reason": "no image"}]
    write_shard(tmp_path, "1", [], [], IMAGE[:0], TEXT[:0], skipped=no_image)
    strange = "y\u2028\x85\n"  # where str.splitlines would break a line
    shard = tmp_path, "0", ["a"], ["b"], IMAGE[:1], TEXT[:1]
    write_shard(*shard, skipped=[{"id": strange, "reason": "x"}])
    assert writer.finish()["skipped"] == {"x": 1, "no image": 1}
    lines = (tmp_path / "skipped.jsonl").read_bytes().splitlines()
    assert [json.loads(line)["id"] for line in lines] == [strange, "z"]
    assert open_features(tmp_path).skipped == {"x": 1, "no image": 1}


def test_the_fingerprint_knows_the_same_features_again(folder, tmp_path):
    stream = open_features(folder)
    prints = [stream.fingerprint(rows) for rows in (0, 1, 5, 6, 14, 15, 23)]
    # Within a shard it stays; a zero-row shard between makes no difference.
    assert prints[1] == prints[2] != prints[3] == prints[4] != prints[5] != prints[6]
    copied = folder.rename(tmp_path / "moved")
    assert open_features(copied).fingerprint(15) == prints[5]
    other = np.array(IMAGE[14:20])
    other[0] += 1
    write_shard(copied, "3", IDS[14:20], CAPTIONS[14:20], other, TEXT[14:20])
    assert open_features(copied).fingerprint(14) == prints[4]
    assert open_features(copied).fingerprint(15) != prints[5]


@pytest.mark.parametrize("names", [("images", "texts"), ("image_emb", "txt_emb"), None])
def test_other_peoples_names_for_the_same_layout(tmp_path, names):
    for number, rows in enumerate((slice(0, 10), slice(10, 23))):
        for name, features in zip(names or ("img_emb", "text_emb"), (IMAGE, TEXT), strict=True):
            target = tmp_path / name if names else tmp_path  # None: all in one folder
            target.mkdir(exist_ok=True)
            np.save(target / f"{name}_{number}.npy", features[rows])
        target = tmp_path / "metadata" if names else tmp_path
        target.mkdir(exist_ok=True)
        table = pa.table({"key": IDS[rows], "TEXT": CAPTIONS[rows], "url": IDS[rows]})
        pq.write_table(table, target / f"metadata_{number}.parquet")
    batches, ids = collected(open_features(tmp_path), batch_size=50)
    assert ids == IDS
    assert batches[0].captions == CAPTIONS
    np.testing.assert_array_equal(batches[0].text, TEXT)


def test_shards_are_read_by_number_not_by_name(tmp_path):
    for kind in ("img_emb", "text_emb", "metadata"):
        (tmp_path / kind).mkdir()
    for number in range(12):  # 10 sorts before 2 as text
        rows = slice(number, number + 1)
        np.save(tmp_path / f"img_emb/img_emb_{number}.npy", IMAGE[rows])
        np.save(tmp_path / f"text_emb/text_emb_{number}.npy", TEXT[rows])
        table = pa.table({"image_path": IDS[rows], "caption": CAPTIONS[rows]})
        pq.write_table(table, tmp_path / f"metadata/metadata_{number}.parquet")
    assert collected(open_features(tmp_path), batch_size=5)[1] == IDS[:12]


def test_missing_ids_and_captions_become_empty_text(tmp_path):
    write_shard(tmp_path, "0", ["a", None, "c"], [None, "x", "y"], IMAGE[:3], TEXT[:3])
    (batch,) = open_features(tmp_path).batches(10)
    assert batch.ids == ["a", "", "c"]
    assert batch.captions == ["", "x", "y"]


def test_text_only_folder_is_a_recaption_table(tmp_path):
    write_shard(tmp_path, "0", IDS, CAPTIONS, None, TEXT)
    (batch,) = open_features(tmp_path, spaces=("text",)).batches(50)
    assert batch.image is None
    assert batch.text.shape == (23, 6)
    with pytest.raises(UserError, match="no image features"):
        open_features(tmp_path)


def test_extra_columns_come_when_asked_for(folder):
    (batch,) = open_features(folder, extra=("url", "nothing")).batches(50)
    assert batch.extra == {"url": CAPTIONS}


def datacomp(folder, keys=("b32", "l14")):
    folder.mkdir(parents=True, exist_ok=True)
    for number, rows in enumerate((slice(0, 10), slice(10, 23))):
        stem = f"{number:032x}"
        uids = [f"{row:032x}" for row in range(23)][rows]
        pq.write_table(pa.table({"uid": uids, "text": CAPTIONS[rows]}), folder / f"{stem}.parquet")
        arrays = {f"{key}_img": IMAGE[rows].astype(np.float16) for key in keys}
        arrays.update({f"{key}_txt": TEXT[rows].astype(np.float16) for key in keys})
        np.savez(folder / f"{stem}.npz", **arrays)


@pytest.mark.parametrize("target", [".", "metadata"])
def test_datacomp_pairs_of_parquet_and_npz(tmp_path, target):
    datacomp(tmp_path / target)
    stream = open_features(tmp_path, key="l14")
    assert stream.encoder == {"name": "DataComp l14"}
    batches, ids = collected(stream, batch_size=7)
    assert ids == [f"{row:032x}" for row in range(23)]
    read = np.concatenate([batch.image for batch in batches])
    np.testing.assert_array_equal(read, IMAGE.astype(np.float16).astype(np.float32))
    assert stream.row(12).captions == ["caption 12"]


def test_datacomp_uids_need_not_end_in_a_number(tmp_path):
    datacomp(tmp_path / "metadata")
    for path in sorted((tmp_path / "metadata").iterdir()):
        path.rename(path.with_stem(path.stem[:-1] + "ab"[int(path.stem[-1])]))
    stream = open_features(tmp_path, key="b32")
    assert (stream.encoder, stream.rows) == ({"name": "DataComp b32"}, 23)


def test_datacomp_with_one_kind_of_features_needs_no_key(tmp_path):
    datacomp(tmp_path, keys=("b32",))
    assert open_features(tmp_path).encoder == {"name": "DataComp b32"}


def test_a_compressed_npz_of_datacomp_that_is_damaged_is_named(tmp_path):
    datacomp(tmp_path, keys=("b32",))
    path = tmp_path / f"{0:032x}.npz"
    noise = np.random.default_rng(0).normal(size=(10, 5000)).astype(np.float32)
    np.savez_compressed(path, b32_img=noise[:, :6], b32_txt=noise[:, :6], padding=noise)
    with zipfile.ZipFile(path) as content:
        member = content.getinfo("b32_txt.npy")
    data = bytearray(path.read_bytes())
    end = member.header_offset + 30 + len(member.filename) + 20 + member.compress_size
    data[end - 30 : end] = b"\xff" * 30
    path.write_bytes(data)
    with pytest.raises(UserError, match=r"0{32}\.npz"):
        list(open_features(tmp_path).batches(10))


@pytest.mark.parametrize("suffix", [".npz", ".pth"])
def test_a_single_file_of_arrays_with_ids(tmp_path, suffix):
    path = tmp_path / f"features{suffix}"
    if suffix == ".npz":
        np.savez(path, ids=IDS, captions=CAPTIONS, image=IMAGE, text_features=TEXT)
    else:
        content = {"ids": IDS, "captions": CAPTIONS, "text": torch.tensor(TEXT).bfloat16()}
        torch.save({**content, "image": torch.tensor(IMAGE)}, path)
    stream = open_features(path)
    batches, ids = collected(stream, batch_size=10)
    assert ids == IDS
    np.testing.assert_array_equal(np.concatenate([b.image for b in batches]), IMAGE)
    np.testing.assert_allclose(np.concatenate([b.text for b in batches]), TEXT, rtol=0.01)
    assert len(stream.fingerprint(23)) == 32


HALF_A_PAIR = "fox \ud83d!"  # half of an emoji, as cutting UTF-16 text in two leaves it


@pytest.mark.parametrize("suffix", [".npz", ".pth"])
def test_text_that_is_no_unicode_is_repaired_and_its_sample_stays(tmp_path, suffix):
    path = tmp_path / f"features{suffix}"
    content = {"ids": [HALF_A_PAIR, "b"], "captions": ["\ud83e\udd8a", HALF_A_PAIR]}
    if suffix == ".npz":
        np.savez(path, **content, image=IMAGE[:2], text=TEXT[:2])
    else:
        arrays = {"image": torch.tensor(IMAGE[:2]), "text": torch.tensor(TEXT[:2])}
        torch.save({**content, **arrays}, path)
    (batch,) = open_features(path).batches(10)
    assert batch.ids == ["fox \ufffd!", "b"]
    assert batch.captions == ["\U0001f98a", "fox \ufffd!"]  # both halves: the emoji itself


def text_column(*values):
    """Bytes as a column of text, checked by nobody (as a faulty writer leaves it)."""
    return pa.array(values, pa.binary()).view(pa.string())


def one_shard(folder, **columns):
    rows = len(next(iter(columns.values())))
    write_shard(folder, "0", IDS[:rows], CAPTIONS[:rows], IMAGE[:rows], TEXT[:rows])
    pq.write_table(pa.table(columns), folder / "metadata/metadata_0.parquet")
    return folder


def test_a_damaged_text_in_a_parquet_is_repaired_and_its_sample_stays(tmp_path):
    damaged = text_column(b"caf\xe9", "狐".encode(), None)
    folder = one_shard(tmp_path, id=pa.array(list("abc")), caption=damaged, label=damaged)
    (batch,) = open_features(folder, extra=("label",)).batches(10)
    assert batch.captions == ["caf\ufffd", "狐", ""]
    assert batch.extra == {"label": ["caf\ufffd", "狐", None]}


@pytest.mark.parametrize(
    "kind", [pa.binary(), pa.large_binary(), pa.dictionary(pa.int8(), pa.binary())]
)
def test_binary_ids_in_a_parquet_are_text(tmp_path, kind):
    ids = pa.array([b"x1", "狐".encode(), b"caf\xe9"], pa.binary()).cast(kind)
    folder = one_shard(tmp_path, id=ids, caption=pa.array(list("abc")), label=ids)
    (batch,) = open_features(folder, extra=("label",)).batches(10)
    assert batch.ids == batch.extra["label"] == ["x1", "狐", "caf\ufffd"]


def test_binary_ids_in_a_npz_are_text(tmp_path):
    ids = np.array([b"x1", "狐".encode()])
    np.savez(tmp_path / "f.npz", ids=ids, captions=ids, image=IMAGE[:2], text=TEXT[:2])
    (batch,) = open_features(tmp_path / "f.npz").batches(10)
    assert batch.ids == batch.captions == ["x1", "狐"]


def test_of_several_captions_the_first_is_taken(tmp_path):
    captions = pa.array([["one", "two"], ["three"], [], None])
    folder = one_shard(tmp_path, id=pa.array(list("abcd")), caption=captions)
    (batch,) = open_features(folder).batches(10)
    assert batch.captions == ["one", "three", "", ""]
