"""The LMDB of images: the key rule, the growing writer, the lazy reader in many processes."""

import multiprocessing
import os
import pickle
import resource
import subprocess
import sys
import textwrap
import threading

import lmdb
import pytest

from infogrowth.data.image_stores import LmdbImages, LmdbWriter, is_lmdb
from infogrowth.data.text import image_key
from infogrowth.errors import BadSample, UserError


@pytest.fixture
def packed(tmp_path, jpegs):
    path = tmp_path / "images.lmdb"
    with LmdbWriter(path) as writer:
        assert all(writer.put(f"{key}.jpg", data) for key, data in jpegs.items())
    return path


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("000123.jpg", "000123"),
        ("cc3m_train/000123.jpg", "000123"),
        ("000123", "000123"),
        ("a/b/PHOTO.JPEG", "PHOTO"),
        ("x.png", "x"),
        ("x.webp", "x"),
        ("noto/1f34e", "noto/1f34e"),
        ("version 1.2", "version 1.2"),
        ("x.jpg.png", "x.jpg"),
        (".jpg", ".jpg"),
        ("folder/.jpg", "folder/.jpg"),
        ("héllo.jpg", "héllo"),
    ],
)
def test_the_key_is_the_file_name_without_its_image_extension(name, key):
    assert image_key(name) == key


def test_keys_are_stored_without_extension_and_values_as_they_came(packed, jpegs):
    with lmdb.open(str(packed), readonly=True, lock=False) as env, env.begin() as transaction:
        assert dict(transaction.cursor()) == {k.encode(): v for k, v in jpegs.items()}


@pytest.mark.parametrize("asked", ["000000003", "000000003.jpg", "cc3m_train/000000003.png"])
def test_an_image_is_found_with_or_without_extension(packed, jpegs, asked):
    images = LmdbImages(packed)
    assert images.read(asked) == jpegs["000000003"]


@pytest.mark.parametrize("asked", ["7", "7.jpg", "train/7.jpg", "7.png"])
def test_the_papers_lmdbs_with_extensions_in_their_keys_are_read_too(tmp_path, asked):
    with lmdb.open(str(tmp_path / "paper")) as env, env.begin(write=True) as transaction:
        transaction.put(b"7.jpg", b"seven")
    assert LmdbImages(tmp_path / "paper").read(asked) == b"seven"


def test_keys_with_folders_are_found_with_an_extension_too(tmp_path):
    with LmdbWriter(tmp_path / "x") as writer:
        writer.put("cat/001", b"cat")
        writer.put("dog/001", b"dog")
    images = LmdbImages(tmp_path / "x")
    assert (images.read("dog/001.jpg"), images.read("cat/001")) == (b"dog", b"cat")


def test_a_missing_image_is_named_with_its_lmdb(packed):
    images = LmdbImages(packed)
    with pytest.raises(BadSample, match="missing"):
        images.find("nobody")
    with pytest.raises(UserError, match=r"nobody\.jpg.*images\.lmdb"):
        images.read("nobody.jpg")


@pytest.mark.parametrize("name", ["", "x" * 600, "\ud83d"])
def test_ids_that_no_lmdb_can_hold_are_refused_by_name(packed, name):
    with LmdbWriter(packed) as writer, pytest.raises(BadSample, match="id"):
        writer.put(name, b"data")


def test_keys_come_in_order_and_are_counted(packed, jpegs):
    images = LmdbImages(packed)
    assert list(images.keys()) == sorted(jpegs)
    assert len(list(images.keys())) == 12


def test_what_is_stored_is_never_replaced(packed, jpegs):
    with LmdbWriter(packed) as writer:
        assert not writer.put("000000001", b"other")
        assert writer.put("new", b"first")
        assert not writer.put("new.jpg", b"second")
        assert writer.get("new") == b"first"
        assert len(writer) == 13
    images = LmdbImages(packed)
    assert images.read("new") == b"first"
    assert images.read("000000001") == jpegs["000000001"]


def test_the_map_grows_without_losing_an_image(tmp_path):
    blobs = {f"{n:05d}": bytes([n % 251]) * (997 * (n % 7 + 1)) for n in range(400)}
    with LmdbWriter(tmp_path / "x", map_size=1 << 16) as writer:
        for name, data in blobs.items():
            writer.put(name, data)
            if int(name) % 50 == 0:
                writer.commit()
    images = LmdbImages(tmp_path / "x")
    assert {key: images.read(key) for key in images.keys()} == blobs  # noqa: SIM118


def test_an_exception_keeps_what_was_committed_and_drops_the_rest(tmp_path):
    with pytest.raises(RuntimeError), LmdbWriter(tmp_path / "x") as writer:
        writer.put("a", b"1")
        writer.commit()
        writer.put("b", b"2")
        raise RuntimeError
    assert list(LmdbImages(tmp_path / "x").keys()) == ["a"]


def test_opening_is_lazy_and_one_environment_serves_all_readers_of_a_path(
    packed, jpegs, monkeypatch
):
    first, second = LmdbImages(packed), LmdbImages(str(packed) + "/")
    opened = []
    lmdb_open = lmdb.open
    monkeypatch.setattr(lmdb, "open", lambda *a, **k: opened.append(a) or lmdb_open(*a, **k))
    assert first.read("000000001") == second.read("000000001") == jpegs["000000001"]
    assert len(opened) == 1


def test_a_path_can_be_read_written_and_read_again_in_one_process(packed):
    images = LmdbImages(packed)
    assert len(list(images.keys())) == 12
    with LmdbWriter(packed) as writer:
        writer.put("later", b"x")
    assert images.read("later") == b"x"


def test_a_reader_that_is_in_use_can_be_pickled(packed, jpegs):
    images = LmdbImages(packed)
    images.read("000000001")
    copy = pickle.loads(pickle.dumps(images))
    assert copy.read("000000002") == jpegs["000000002"]


def _read_in_child(images, names, results):
    results.put([images.read(name) for name in names] + [os.getpid()])


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_child_processes_open_their_own_environment(packed, jpegs, method):
    images = LmdbImages(packed)
    images.read("000000000")  # open in the parent: the child must not use this handle
    context = multiprocessing.get_context(method)
    results = context.Queue()
    names = sorted(jpegs)
    children = [
        context.Process(target=_read_in_child, args=(images, names, results)) for _ in range(2)
    ]
    for child in children:
        child.start()
    answers = [results.get(timeout=60) for _ in children]
    for child in children:
        child.join()
    assert all(answer[:-1] == [jpegs[name] for name in names] for answer in answers)
    assert len({answer[-1] for answer in answers} | {os.getpid()}) == 3
    assert images.read("000000005") == jpegs["000000005"]


def test_threads_share_a_reader(packed, jpegs):
    images, found = LmdbImages(packed), []
    threads = [
        threading.Thread(target=lambda: found.extend(images.read(k) for k in sorted(jpegs)))
        for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 96 and set(found) == set(jpegs.values())


def test_a_path_without_an_lmdb_is_reported_before_it_is_opened(tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        LmdbImages(tmp_path / "nothing")
    (tmp_path / "data.mdb").write_bytes(b"not an lmdb, but long enough to be one" * 9)
    with pytest.raises(UserError, match="LMDB"):
        LmdbImages(tmp_path)
    assert not is_lmdb(tmp_path)


def test_a_damaged_lmdb_gives_one_sentence(packed):
    file = packed / "data.mdb"
    file.write_bytes(file.read_bytes()[:24] + b"\xff" * 5000)
    with pytest.raises(UserError, match=r"images\.lmdb"):
        LmdbImages(packed).read("000000001")


def test_a_writer_does_not_write_into_a_file(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="write the LMDB"):
        LmdbWriter(tmp_path / "file")


def test_a_full_disk_is_one_sentence_and_keeps_what_was_committed(tmp_path):
    """A limit on the file's size stands in for the full disk: the write fails the same way."""
    program = """
        import sys
        from infogrowth.data.image_stores import LmdbWriter
        from infogrowth.errors import BadSample, UserError
        try:
            with LmdbWriter(sys.argv[1]) as writer:
                writer.put("kept", b"k" * 1000)
                writer.commit()
                for n in range(40):
                    writer.put(f"{n}", b"x" * 100_000)
                writer.commit()
        except UserError as error:
            sys.exit(f"refused: {error}")
    """
    run = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program), str(tmp_path / "x")],
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20)),
        capture_output=True,
        text=True,
    )
    assert run.stderr.startswith("refused: the LMDB") and "written" in run.stderr, run.stderr
    assert list(LmdbImages(tmp_path / "x").keys()) == ["kept"]
