"""Every download layout gives the same samples; what is damaged is listed with its reason."""

import csv
import io
import json
import pickle
import tarfile
from concurrent.futures import ThreadPoolExecutor

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from layouts import LAYOUTS, add_member, failed_row, metadata_row, write_stats, write_webdataset

from infogrowth.data.sources import Sample, open_source
from infogrowth.errors import UserError

KINDS = {"files": "files", "webdataset": "webdataset", "parquet": "parquet"}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_gives_the_same_samples_in_order(tmp_path, pairs, layout):
    LAYOUTS[layout](tmp_path, pairs)
    source = open_source(tmp_path)
    assert source.layout == KINDS.get(layout, "folder")
    expected = [Sample(key, caption, data, None) for key, (data, caption) in pairs.items()]
    assert list(source) == expected
    assert source.ids == list(pairs) and len(source) == 12 and source.notes == []


@pytest.mark.parametrize("layout", LAYOUTS)
def test_sources_are_picklable_and_read_by_many_threads_in_any_order(tmp_path, pairs, layout):
    LAYOUTS[layout](tmp_path, pairs)
    source = open_source(tmp_path)
    expected = list(source)
    copy = pickle.loads(pickle.dumps(source))
    order = [number * 7 % 12 for number in range(120)]
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(copy.read, order)) == [expected[number] for number in order]


@pytest.mark.parametrize("layout", ["files", "webdataset", "parquet"])
def test_failed_downloads_are_samples_with_a_problem(tmp_path, pairs, layout):
    LAYOUTS[layout](tmp_path, pairs, failed={"000000004": "failed_to_download"})
    source = open_source(tmp_path)
    assert source.ids == list(pairs)
    sample = source.read(4)
    assert sample == Sample("000000004", None, None, "the download failed")
    assert sum(s.problem is not None for s in source) == 1


@pytest.mark.parametrize("layout", ["files", "webdataset", "parquet"])
def test_shards_without_their_finished_mark_wait_for_it(tmp_path, pairs, layout):
    LAYOUTS[layout](tmp_path, pairs)
    marks = sorted(tmp_path.glob("*_stats.json"))
    assert len(marks) == 2
    marks[1].unlink()
    source = open_source(tmp_path)
    assert source.ids == list(pairs)[:6]
    (note,) = source.notes
    assert note[0].startswith("00001") and "not finished" in note[1]


def test_a_tar_that_breaks_off_is_read_as_far_as_it_goes(tmp_path, pairs):
    write_webdataset(tmp_path, pairs)
    tar = tmp_path / "00001.tar"
    tar.write_bytes(tar.read_bytes()[: tar.stat().st_size // 2])
    source = open_source(tmp_path)
    problems = {sample.id: sample.problem for sample in source}
    assert list(problems) == list(pairs)  # its table still names all
    lost = [key for key, problem in problems.items() if problem]
    assert 2 <= len(lost) <= 5 and min(lost) > "000000005"
    assert set(filter(None, problems.values())) <= {
        "there is no image of this name",
        "00001.tar breaks off in this sample",
        "the caption is missing or empty",
    }


def test_garbage_in_place_of_a_tar_is_noted(tmp_path, pairs):
    write_webdataset(tmp_path, pairs)
    (tmp_path / "00001.tar").write_bytes(b"garbage " * 1000)
    source = open_source(tmp_path)
    assert source.notes[0][0] == "00001.tar" and "damaged" in source.notes[0][1]
    assert sum(sample.problem is None for sample in source) == 6


def test_a_tar_may_name_its_members_with_folders_and_other_files(tmp_path, jpegs):
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        add_member(tar, "./b/1.PNG", jpegs["000000001"])
        add_member(tar, "./b/1.jpg", jpegs["000000002"])  # a jpg is preferred
        add_member(tar, "./b/1.txt", b"caption\n")
        add_member(tar, "./b/1.cls", b"7")
        add_member(tar, "a/1.webp", jpegs["000000003"])
        add_member(tar, "a/1.json", json.dumps({"caption": " from json "}).encode())
    source = open_source(tmp_path)
    assert source.ignored == {".cls": 1}
    assert [(s.id, s.caption, s.data) for s in source] == [
        ("a/1", "from json", jpegs["000000003"]),
        ("b/1", "caption", jpegs["000000002"]),
        ("b/1", "caption", jpegs["000000001"]),  # another image of one name is no secret
    ]


CAPTIONS = {
    "empty": ({"txt": b""}, None, "the caption is missing or empty"),
    "spaces": ({"txt": b" \n "}, None, "the caption is missing or empty"),
    "none": ({}, None, "the caption is missing or empty"),
    "latin1": ({"txt": "caf\xe9".encode("latin-1")}, "café", None),
    "cp1252": ({"txt": b"a child\x92s toy"}, "a child’s toy", None),
    "whole json": ({"txt": b"caf\xe9 bl\x81", "json": b'{"caption": "cafe"}'}, "cafe", None),
    "utf-16": ({"txt": "Käfer".encode("utf-16")}, "Käfer", None),
    "utf-16 big": ({"txt": b"\xfe\xff" + "Käfer".encode("utf-16-be")}, "Käfer", None),
    "half emoji": ({"json": b'{"caption": "red \\ud83d box"}'}, "red \ufffd box", None),
    "nul": ({"txt": b"red \0 box"}, "red \ufffd box", None),
    "list": ({"json": b'{"caption": ["one", " ", "two "]}'}, ["one", "two"], None),
    "list of one": ({"json": b'{"caption": ["one", null]}'}, "one", None),
    "fallback": ({"json": b'{"caption": null, "text": "", "TXT": "words"}'}, "words", None),
    "caption file": ({"caption": b"words"}, "words", None),
    "capitals": ({"TXT": b"words"}, "words", None),
    "of the file": ({"jpg.txt": b"words"}, "words", None),
    "after all": ({"txt": b" ", "caption": b"words", "json": b"{"}, "words", None),
    "byte order mark": ({"txt": b"\xef\xbb\xbfwords\n"}, "words", None),
    "txt wins": ({"txt": b"from txt", "json": b'{"caption": "from json"}'}, "from txt", None),
    "empty txt": ({"txt": b"", "json": b'{"caption": "from json"}'}, "from json", None),
    "bad json": ({"json": b'{"caption": "x'}, None, "the .json beside the image is not valid JSON"),
    "json list": ({"json": b"[1]"}, None, "the caption is not text but int"),
    "null": ({"json": b'{"caption": null}'}, None, "the caption is missing or empty"),
    "number": ({"json": b'{"caption": 7}'}, None, "the caption is not text but int"),
    "text key": ({"json": b'{"text": "words"}'}, "words", None),
}


@pytest.mark.parametrize("tarred", [False, True], ids=["flat", "tar"])
@pytest.mark.parametrize("case", CAPTIONS)
def test_captions_come_from_txt_or_json_or_are_a_problem(tmp_path, jpegs, case, tarred):
    members, caption, problem = CAPTIONS[case]
    members = {**members, "jpg": jpegs["000000000"]}
    if tarred:
        with tarfile.open(tmp_path / "0.tar", "w") as tar:
            for suffix, content in members.items():
                add_member(tar, f"x.{suffix}", content)
    else:
        for suffix, content in members.items():
            (tmp_path / f"x.{suffix}").write_bytes(content)
    (sample,) = open_source(tmp_path)
    assert (sample.id, sample.caption, sample.problem) == ("x", caption, problem)


def test_a_flat_folder_lists_captions_without_image_and_double_keys(tmp_path, jpegs):
    for name in ("a.jpg", "b.png", "b.jpg"):
        (tmp_path / name).write_bytes(jpegs["000000000"])
    for name in ("a.txt", "b.txt", "c.txt", "cc3m_train.json", ".hidden.jpg"):
        (tmp_path / name).write_text("words")
    source = open_source(tmp_path)
    assert source.ignored == {"hidden files and folders": 1, "results of infogrowth": 1}
    assert [(s.id, s.problem) for s in source] == [
        ("a", None),
        ("b", None),
        ("b", None),
        ("c", "there is no image of this name"),
    ]


def test_imagefolder_metadata_as_csv(tmp_path, jpegs):
    (tmp_path / "cat").mkdir()
    (tmp_path / "cat" / "1.jpg").write_bytes(jpegs["000000001"])
    text = io.StringIO()
    writer = csv.DictWriter(text, ["file_name", "text"])
    writer.writeheader()
    writer.writerow({"file_name": "cat/1.jpg", "text": 'a "quoted", cat'})
    (tmp_path / "metadata.csv").write_text(text.getvalue())
    assert list(open_source(tmp_path)) == [
        Sample("cat/1", 'a "quoted", cat', jpegs["000000001"], None)
    ]


def test_imagefolder_problems_are_listed_one_by_one(tmp_path, jpegs):
    (tmp_path / "a.jpg").write_bytes(jpegs["000000001"])
    (tmp_path / "unnamed.jpg").write_bytes(jpegs["000000002"])
    lines = [
        json.dumps({"file_name": "a.jpg", "text": "fine"}),
        "{broken",
        json.dumps({"text": "no name"}),
        json.dumps({"file_name": "gone.jpg", "text": "x"}),
        json.dumps({"file_name": "../a.jpg", "text": "x"}),
        json.dumps({"file_name": "/etc/hostname", "text": "x"}),
    ]
    (tmp_path / "metadata.jsonl").write_text("\n".join(lines))
    source = open_source(tmp_path)
    assert source.notes == [
        ("metadata.jsonl:2", "the line is not valid JSON"),
        ("metadata.jsonl:3", "the line names no file_name"),
    ]
    assert {s.id: s.problem for s in source} == {
        "a": None,
        "gone": "the file that the metadata names is missing",
        "../a": "its file_name leads out of the folder",
        "/etc/hostname": "its file_name leads out of the folder",
        "unnamed": "the caption is missing or empty",
    }


def test_hugging_faces_image_column_is_read(tmp_path, jpegs):
    rows = [
        {"image": {"bytes": data, "path": f"{key}.jpg"}, "text": f"t{key}"}
        for key, data in jpegs.items()
    ]
    rows.append({"image": None, "text": "nothing"})
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "train-0000.parquet", row_group_size=5)
    samples = list(open_source(tmp_path))
    assert samples[0] == Sample("000000000", "t000000000", jpegs["000000000"], None)
    assert samples[-1] == Sample(
        "train-0000-000012", "nothing", None, "there is no image in its row"
    )


def test_a_broken_table_of_images_is_noted_and_the_others_are_read(tmp_path, pairs):
    LAYOUTS["parquet"](tmp_path, pairs)
    table = tmp_path / "00000.parquet"
    table.write_bytes(table.read_bytes()[:-30])
    source = open_source(tmp_path)
    assert source.ids == list(pairs)[6:]
    assert source.notes[0][0] == "00000.parquet" and "cannot be read" in source.notes[0][1]


def test_a_table_beside_a_tar_that_cannot_be_read_is_noted(tmp_path, pairs):
    write_webdataset(tmp_path, pairs)
    (tmp_path / "00000.parquet").write_bytes(b"garbage")
    source = open_source(tmp_path)
    assert len(source) == 12 and source.notes[0][0] == "00000.parquet"


def test_rows_are_sorted_by_key_however_the_download_finished(tmp_path, jpegs):
    keys = ["000000002", "000000000", "000000001"]
    rows = [{**metadata_row(key, f"c{key}"), "jpg": jpegs[key]} for key in keys]
    rows.append({**failed_row("000000005", "failed_to_resize"), "jpg": None})
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "00000.parquet")
    write_stats(tmp_path, "00000")
    samples = list(open_source(tmp_path))
    assert [s.id for s in samples] == [*sorted(keys), "000000005"]
    assert all(s.data == jpegs[s.id] and s.caption == f"c{s.id}" for s in samples[:3])
    assert samples[3].problem == "the image could not be resized when it was downloaded"


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "no image–caption pairs"),
        ({"readme.md": b"x"}, r"found: 1 \.md"),
        ({"x.json": b"[]"}, r"found: 1 \.json"),
        ({"photo.heic": b"x"}, r"found: 1 \.heic"),
        ({"0.tar": b""}, r"0\.tar: the tar is damaged"),
        ({"0.tar": b"\0" * 10240}, "no image–caption pairs"),
        ({"0.tar": b"garbage" * 999}, r"0\.tar: the tar is damaged"),
        ({"0.tar.gz": b"\x1f\x8bgarbage"}, r"0\.tar\.gz: the tar is damaged"),
        ({"0.parquet": b"garbage"}, r"0\.parquet: the table cannot be read"),
        ({"metadata.jsonl": b""}, "no image–caption pairs"),
        ({"metadata.jsonl": b'{"text": "x"}'}, "names no file_name"),
        ({"metadata.csv": b"text\nx\n"}, "names no file_name"),
        ({"metadata.parquet": b"garbage"}, "cannot be read"),
    ],
)
def test_folders_without_pairs_give_one_sentence(tmp_path, files, message):
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        open_source(tmp_path)


def test_a_folder_that_is_not_there_is_named(tmp_path):
    with pytest.raises(UserError, match="nowhere"):
        open_source(tmp_path / "nowhere")
