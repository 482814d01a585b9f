"""Everything seen is packed, skipped or ignored; and situations from public bug reports."""

import io
import json
import os
import tarfile
import tempfile
import unicodedata
from collections import Counter
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from drawn_images import drawn, encoded, jpeg
from hypothesis import given, settings
from hypothesis import strategies as st
from layouts import add_member

from infogrowth.cli import main
from infogrowth.data.sources import open_splits
from infogrowth.errors import UserError

ONE, TWO = jpeg(1), jpeg(2)


def write(folder: Path, files: dict[str, bytes | str]) -> None:
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())


def write_tar(path: Path, members: list[tuple[str, bytes | str]], mode: str = "w") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, mode) as tar:
        for name, content in members:
            add_member(tar, name, content if isinstance(content, bytes) else content.encode())


def read(folder: Path, split: str = "train") -> dict:
    """Captions of the good samples by id."""
    source = open_splits(folder)[split]
    return {sample.id: sample.caption for sample in source if not sample.problem}


def problems(folder: Path) -> dict:
    return {s.id: s.problem for source in open_splits(folder).values() for s in source if s.problem}


# --- what is seen is packed, skipped or ignored ---------------------------------------------------

STEMS = st.sampled_from(["a", "b", "c.1", "22.05", "d/a", "d/e/b", "10_cat/x", "train", "é"])
EXTENSIONS = st.sampled_from(
    [".jpg", ".PNG", ".txt", ".TXT", ".json", ".caption", ".jpg.txt", ".svg", ".cls", "", ".heic"]
)
CONTENTS = st.sampled_from([b"", b"words", ONE, b'{"caption": "words"}', b"{", b"caf\xe9"])
TREES = st.dictionaries(st.builds("".join, st.tuples(STEMS, EXTENSIONS)), CONTENTS, min_size=1)


@settings(max_examples=60, deadline=None)
@given(TREES, st.booleans())
def test_files_seen_are_packed_or_skipped_or_ignored(tree, tarred):
    """Counted without knowing the rules: by where each file's own bytes come out again."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        names = [n for n in tree if not any(other.startswith(f"{n}/") for other in tree)]
        if tarred:
            write_tar(folder / "0.tar", [(name, tree[name]) for name in names])
        else:
            write(folder, {name: tree[name] for name in names})
        try:
            sources = open_splits(folder)
        except UserError as error:  # then all of it is ignored, by kind
            assert "holds no image" in str(error)
            return
        seen: Counter = Counter()
        for source in sources.values():
            for container in source.containers:
                used = {n for n in container._images if n >= 0} | set(container._captions)
                seen["sample"] += len(used)
                packed = sum(source.read(n).problem is None for n in range(len(source)))
                assert packed + sum(s.problem is not None for s in source) == len(source)
            seen["ignored"] += source.ignored.total()
        assert seen.total() == len(names), (dict(seen), names)


# --- situations -----------------------------------------------------------------------------------

PAIR = [("a.jpg", ONE), ("a.txt", "one"), ("b.jpg", TWO), ("b.json", '{"caption": ["x", "y"]}')]


@pytest.mark.parametrize("name", ["0.tar", "0.TAR", "0.tgz", "deep/er/0.tar.bz2", "0.tar.xz"])
def test_tars_of_every_compression_at_any_depth(tmp_path, name):
    mode = {"gz": "w:gz", "z2": "w:bz2", "xz": "w:xz"}.get(name[-2:], "w")
    write_tar(tmp_path / name, PAIR, mode)
    assert read(tmp_path) == {"a": "one", "b": ["x", "y"]}


def test_zstandard(tmp_path):
    write_tar(tmp_path / "0", PAIR)
    with pa.CompressedOutputStream(str(tmp_path / "0.tar.zst"), "zstd") as file:
        file.write((tmp_path / "0").read_bytes())
    (tmp_path / "0").unlink()
    assert read(tmp_path) == {"a": "one", "b": ["x", "y"]}


def test_a_key_that_occurs_again_never_mixes_old_and_new(tmp_path):
    write_tar(tmp_path / "0.tar", [("1.jpg", ONE), ("1.txt", "old"), ("2.jpg", TWO),
                                   ("1.jpg", TWO), ("1.txt", "new")])  # fmt: skip
    source = open_splits(tmp_path)["train"]
    assert [(s.id, s.caption, s.data) for s in source][:2] == [
        ("1", "old", ONE),
        ("1", "new", TWO),
    ]
    write_tar(tmp_path / "0.tar", [("1.jpg", ONE), ("2.jpg", TWO), ("1.jpg", TWO),
                                   ("1.txt", "new")])  # fmt: skip
    first, second, _ = open_splits(tmp_path)["train"]
    assert first.problem and (second.caption, second.data) == ("new", TWO)


def test_keys_with_dots_and_webdatasets_longer_extensions(tmp_path):
    members = [
        (f"22.0{n}.{e}", ONE if e == "jpg" else f"{n}") for n in "12" for e in ("jpg", "txt")
    ]
    members += [
        ("x.image.jpg", ONE),
        ("x.caption.txt", "x"),
        ("22.03.jpg", ONE),
        ("22.04.txt", "n"),
    ]
    write_tar(tmp_path / "0.tar", members)
    assert read(tmp_path) == {"22.01": "1", "22.02": "2", "x": "x"}


def test_images_of_one_name_in_different_folders_are_told_apart(tmp_path):
    write_tar(tmp_path / "0.tar", PAIR[:2])
    write_tar(tmp_path / "1.tar", PAIR[:2])
    write(tmp_path, {"p/a.jpg": TWO, "p/a.txt": "two", "q/a.jpg": TWO, "q/a.txt": "three"})
    found = {"a": "one", "1/a": "one", "p/a": "two", "q/a": "three"}
    assert read(tmp_path) == found


def test_each_image_of_a_name_may_have_its_own_caption(tmp_path):
    png = encoded(drawn(3), "PNG")
    write(tmp_path, {"p.jpg": ONE, "p.png": png, "p.jpg.txt": "a jpeg", "p.png.txt": "a png"})
    assert read(tmp_path) == {"p": "a jpeg", "p-png": "a png"}


@pytest.mark.parametrize(
    ("folder", "others"),
    [("train/", "test/"), ("cc3m_train/", "cc3m_test/"), ("data/train/", "data/Evaluation/"),
     ("train2017/", "test2017/")],
)  # fmt: skip
def test_a_test_set_never_goes_into_training(tmp_path, folder, others, capsys):
    write(tmp_path / "in", {f"{folder}a.jpg": ONE, f"{folder}a.txt": "one",
                            f"{others}b.jpg": TWO, f"{others}b.txt": "two"})  # fmt: skip
    assert read(tmp_path / "in") == {"a": "one"}
    assert read(tmp_path / "in", "test") == {"b": "two"}
    assert main(["pack", "--image_root", str(tmp_path / "in"), "--output_root",
                 str(tmp_path / "out"), "--quiet"]) == 0  # fmt: skip
    assert json.loads((tmp_path / "out" / "cc3m_test.json").read_text())[0]["caption"] == "two"
    assert "lmdb_test" in capsys.readouterr().out


def test_records_and_tables_tell_splits_too(tmp_path):
    write(tmp_path, {"images/0.jpg": ONE, "images/1.jpg": TWO, "images/2.jpg": TWO,
                     "train.csv": "image,caption\nimages/0.jpg,a\n",
                     "test.csv": "image,caption\nimages/1.jpg,b\n"})  # fmt: skip
    assert read(tmp_path) == {"images/0": "a"}
    assert read(tmp_path, "test") == {"images/1": "b"}
    rows = [{"image": {"bytes": data, "path": None}, "text": split, "split": split}
            for data, split in ((ONE, "train"), (TWO, "test"))]  # fmt: skip
    (tmp_path / "other").mkdir()
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "other" / "0.parquet")
    assert list(read(tmp_path / "other").values()) == ["train"]


CSV = {
    "semicolons": "file_name;text\n0.jpg;one, two\n",
    "tabs": "file_name\ttext\n0.jpg\tone, two\n",
    "quotes": 'file_name,text\n0.jpg,"one, two"\n',
    "mark": '\ufefffile_name,text\r\n0.jpg,"one, two"\r\n',
    "capitals": 'File_Name,TEXT\n0.jpg,"one, two"\n',
    "no header": '0.jpg,"one, two"\n',
    "unclosed quote": '"file_name","text"\n0.jpg,"one, two"\n1.jpg,"lost\n2.jpg,fine\n',
    "backslash": 'file_name,text\n.\\0.jpg,"one, two"\n',
    "without extension": 'file_name,text\n0,"one, two"\n',
    "number of pandas": 'file_name,text\n0.0,"one, two"\n',
    "long": "file_name,text\n1.jpg," + "x" * 200_000 + '\n0.jpg,"one, two"\n',
}


@pytest.mark.parametrize("case", CSV)
@pytest.mark.parametrize("encoding", ["utf-8", "utf-16"])
def test_tables_as_spreadsheets_write_them(tmp_path, case, encoding):
    write(tmp_path, {f"{n}.jpg": ONE for n in range(3)})
    name = "metadata.tsv" if case == "tabs" else "metadata.csv"
    (tmp_path / name).write_bytes(CSV[case].encode(encoding))
    assert read(tmp_path)["0"] == "one, two"


def test_a_bad_line_costs_itself_alone(tmp_path):
    write(tmp_path, {"0.jpg": ONE, "1.jpg": TWO, "2.jpg": TWO})
    lines = b"file_name,text\n0.jpg,one, two\n1.jpg,ein K\xe4fer\n2.jpg,K\xc3\xa4fer\n"
    (tmp_path / "metadata.csv").write_bytes(lines)
    assert read(tmp_path) == {"1": "ein Käfer", "2": "Käfer"}
    assert "more fields" in problems(tmp_path)["0"]


def test_several_records_of_one_image_are_its_captions(tmp_path):
    write(tmp_path, {"0.jpg": ONE, "captions.jsonl": '{"image": "0.jpg", "caption": "a"}\n'
                     '{"image": "0.jpg", "caption": ["b", "a"]}\n'})  # fmt: skip
    assert read(tmp_path) == {"0": ["a", "b"]}


def test_names_are_compared_in_one_form_of_unicode(tmp_path):
    split, whole = unicodedata.normalize("NFD", "é"), unicodedata.normalize("NFC", "é")
    write(tmp_path, {f"{split}.jpg": ONE, f"{whole}.txt": "one"})
    with open(os.fsencode(tmp_path) + b"/caf\xe9.jpg", "wb") as file:
        file.write(TWO)
    with open(os.fsencode(tmp_path) + b"/caf\xe9.txt", "wb") as file:
        file.write(b"two")
    assert read(tmp_path) == {whole: "one", "café": "two"}


def test_ids_of_tables_are_text_and_names_that_repeat_are_told_apart(tmp_path):
    rows = [{"id": 802.0, "image": ONE, "caption": b"one"}, {"id": 802.0, "image": TWO,
             "caption": b"two"}]  # fmt: skip
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "t.PARQUET")
    assert read(tmp_path) == {"802": "one", "t/802": "two"}


def test_a_format_that_is_not_read_is_called_that(tmp_path):
    write(tmp_path, {"a.heic": b"x", "a.txt": "one", "b.jpg": ONE, "b.txt": "two", "c.svg": b"x"})
    assert problems(tmp_path) == {
        "a": "there is no image of this name, only a file in a format that is not read: .heic"
    }
    assert open_splits(tmp_path)["train"].ignored == {".svg": 1}


def test_links_pipes_and_what_systems_leave_behind(tmp_path):
    write(tmp_path, {"a/1.jpg": ONE, "a/1.txt": "one", "._1.jpg": b"x", "__MACOSX/1.jpg": b"x",
                     ".git/x": b"x"})  # fmt: skip
    os.symlink(tmp_path, tmp_path / "a" / "loop")
    os.symlink("nowhere", tmp_path / "gone.jpg")
    os.mkfifo(tmp_path / "pipe.jpg")
    assert read(tmp_path) == {"a/1": "one"}
    assert "No such file" in problems(tmp_path)["gone"] or "missing" in problems(tmp_path)["gone"]
    ignored = open_splits(tmp_path)["train"].ignored
    assert ignored.total() == 5  # three hidden, the loop, the pipe


def test_an_image_in_a_table_may_lie_beside_it(tmp_path):
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    rows = [{"image": {"bytes": None, "path": "images/0.jpg"}, "text": "one"}]
    schema = pa.schema([("image", kind), ("text", pa.string())])
    write(tmp_path, {"images/0.jpg": ONE})
    pq.write_table(pa.Table.from_pylist(rows, schema), tmp_path / "0.parquet")
    samples = {s.caption: s.data for s in open_splits(tmp_path)["train"]}
    assert samples["one"] == ONE


def test_the_summary_tells_what_was_ignored_and_repaired(tmp_path, capsys):
    write(tmp_path / "in", {"a.jpg": ONE, "a.txt": b"caf\xe9", "b.jpg": b"", "b.txt": "b",
                            "c.svg": b"x", "notes.md": b"x"})  # fmt: skip
    assert main(["pack", "--image_root", str(tmp_path / "in"), "--output_root",
                 str(tmp_path / "out"), "--quiet"]) == 0  # fmt: skip
    out = capsys.readouterr().out
    assert "2 samples, 1 packed, 1 skipped" in out
    assert "ignored: 1 .svg, 1 .md" in out and "Windows-1252" in out
    assert io.StringIO(out).readline().endswith("skipped\n")
