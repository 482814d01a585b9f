"""Files appear whole or not at all."""

import resource
import signal

import pytest

from infogrowth.errors import UserError
from infogrowth.files import atomic_write, atomic_write_json, read_json, remove_leftovers


def test_an_interrupted_write_leaves_the_old_file_and_no_leftover(tmp_path):
    path = tmp_path / "a.json"
    atomic_write_json(path, [1])
    with pytest.raises(RuntimeError), atomic_write(path, "w") as file:
        file.write("[2, ")
        raise RuntimeError("killed here")
    assert read_json(path) == [1]
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]


def test_leftovers_of_one_file_are_removed_where_others_work_too(tmp_path):
    for name in ("a.json.tmp-123-abcd", "b.json.tmp-9-ef", "a.json"):
        (tmp_path / name).write_text("half")
    assert remove_leftovers(tmp_path, "a.json") == 1
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.json", "b.json.tmp-9-ef"]


def test_a_disk_that_is_full_keeps_the_old_file_and_says_so(tmp_path):
    path = tmp_path / "a.bin"
    path.write_bytes(b"old")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(UserError, match=r"cannot write .*a\.bin"), atomic_write(path) as file:
            file.write(b"x" * 100_000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert path.read_bytes() == b"old" and len(list(tmp_path.iterdir())) == 1


def test_leftovers_of_a_killed_run_are_removed(tmp_path):
    (tmp_path / "a.json.tmp-123-abcd").write_text("half")
    (tmp_path / "a.json").write_text("[]")
    assert remove_leftovers(tmp_path) == 1
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"[1,\n 2", "line 2"), (b"\xff\xfe\x00", "utf-8"), (b"[" * 100_000, "nested")],
)
def test_a_broken_json_file_is_named_with_the_place(tmp_path, content, message):
    path = tmp_path / "b.json"
    path.write_bytes(content)
    with pytest.raises(UserError, match=message) as error:
        read_json(path, "the seed file")
    assert str(error.value).startswith("the seed file")


def test_a_byte_order_mark_is_no_error(tmp_path):
    (tmp_path / "b.json").write_bytes(b"\xef\xbb\xbf[1]")
    assert read_json(tmp_path / "b.json") == [1]
