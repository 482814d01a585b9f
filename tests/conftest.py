"""Shared fixtures: where the golden files and the bundled sample are."""

from collections.abc import Callable, Iterator
from pathlib import Path

import infogrowth.threads  # noqa: F401 - before any test loads torch

import pytest


@pytest.fixture(scope="session")
def golden() -> Path:
    """Numerical fixtures computed with the paper's own code (see golden/README.md)."""
    return Path(__file__).parent / "golden"


@pytest.fixture(scope="session")
def repository() -> Path:
    """The top folder of the checkout."""
    return Path(__file__).parents[1]


@pytest.fixture(scope="session")
def s3_server() -> Iterator[str]:
    """An S3 server on loopback (moto's); its address."""
    server = pytest.importorskip("moto.server").ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def upload(s3_server: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Path], str]]:
    """Puts a folder into a bucket of the S3 server; returns its address."""
    settings = {
        "AWS_ENDPOINT_URL": s3_server,
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    import s3fs

    s3fs.S3FileSystem.clear_instance_cache()
    files = s3fs.S3FileSystem()
    files.mkdir("bucket")

    def put(folder: Path) -> str:
        for path in folder.rglob("*"):
            if path.is_file():
                files.pipe(f"bucket/{folder.name}/{path.relative_to(folder)}", path.read_bytes())
        return f"s3://bucket/{folder.name}"

    yield put
    files.rm("bucket", recursive=True)
    s3fs.S3FileSystem.clear_instance_cache()
