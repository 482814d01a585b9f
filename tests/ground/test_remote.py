"""Files at addresses: read in a stream; a read that fails is tried again, and counted."""

import http.server
import os
import threading

import numpy as np
import pytest

from infogrowth import remote
from infogrowth.errors import UserError

CONTENT = np.random.default_rng(0).bytes(300_000)


@pytest.fixture
def bucket(upload, tmp_path):
    """The address of three files on an S3 server."""
    for name in ("b/2.bin", "a.bin", "b/1.bin"):
        (tmp_path / "set" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "set" / name).write_bytes(CONTENT)
    return upload(tmp_path / "set")


def test_files_of_a_bucket_are_listed_and_read(bucket):
    assert remote.is_remote(bucket)
    folder = remote.as_path(bucket)
    assert folder.kinds() == {"a.bin": "file", "b": "folder"}
    assert list(map(str, (folder / "b").glob("1*"))) == [f"{bucket}/b/1.bin"]
    assert (folder.is_dir(), folder.is_file(), (folder / "a.bin").is_file()) == (True, False, True)
    assert (folder / "b/1.bin").read_bytes() == CONTENT
    with (folder / "a.bin").open() as file:
        file.seek(-5, os.SEEK_END)
        assert file.read() == CONTENT[-5:]
        file.seek(1000)
        assert file.read(70_000) == CONTENT[1000:71_000]
        assert file.tell() == 71_000
    version = (folder / "a.bin").version()
    assert version.startswith("300000 ")
    assert len(version) > 10
    with pytest.raises(UserError, match="exist"):
        (folder / "c.bin").read_bytes()
    nothing = remote.as_path("s3://bucket/other")
    assert (nothing.kinds(), nothing.is_dir(), nothing.is_file()) == ({}, False, False)


def test_reads_that_fail_are_tried_again_and_counted(monkeypatch):
    monkeypatch.setattr(remote, "_WAITS", (0.0, 0.0, 0.0, 0.0))
    remote.retries.clear()
    failures = {"/flaky.bin": 2, "/dead.bin": 1000}

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_HEAD(self):
            self.send_response(200)
            self.send_header("Content-Length", str(len(CONTENT)))
            self.end_headers()

        def do_GET(self):
            if failures[self.path] > 0:
                failures[self.path] -= 1
                self.send_error(503)
                return
            self.do_HEAD()
            self.wfile.write(CONTENT)

        def log_message(self, *arguments):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    try:
        assert remote.RemotePath(f"{address}/flaky.bin").read_bytes() == CONTENT
        assert remote.retries.total() == 2
        assert "2 reads were tried again" in remote.retry_summary()
        with pytest.raises(UserError, match="cannot read"):
            remote.RemotePath(f"{address}/dead.bin").read_bytes()
        assert remote.retries.total() == 6
    finally:
        server.shutdown()
        remote.retries.clear()


@pytest.mark.parametrize("address", ["nosuch://bucket/x", "dask://x"])
def test_an_address_of_no_known_kind_is_refused(address):
    with pytest.raises(UserError, match=address.partition(":")[0]):
        remote.as_path(address).kinds()


@pytest.mark.parametrize("path", ["folder/file", "/a/b", "C:\\x", "a:b", 7])
def test_paths_are_no_addresses(path):
    assert not remote.is_remote(path)
