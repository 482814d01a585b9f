"""Feature folders and tables for the tests of the commands, made of the golden selection."""

import json
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from infogrowth.cli import main

SEEDS = 100  # the golden rows before this one are the seeds


def write_folder(
    folder: Path,
    ids: Sequence[Any],
    captions: Sequence[Any],
    image: np.ndarray | None,
    text: np.ndarray | None,
    shard_rows: int = 400,
) -> Path:
    """A clip-retrieval folder as other people write it (no features.json, no markers)."""
    for number, start in enumerate(range(0, len(ids), shard_rows)):
        rows = slice(start, start + shard_rows)
        for name, features in (("img_emb", image), ("text_emb", text)):
            if features is not None:
                (folder / name).mkdir(parents=True, exist_ok=True)
                np.save(folder / name / f"{name}_{number:02d}.npy", features[rows])
        (folder / "metadata").mkdir(parents=True, exist_ok=True)
        table = pa.table({"image_path": list(ids[rows]), "caption": list(captions[rows])})
        pq.write_table(table, folder / "metadata" / f"metadata_{number:02d}.parquet")
    return folder


@dataclass
class Selection:
    """The golden selection: 100 seeds, then 1,500 samples, and a recaption table."""

    arrays: Any
    expected: dict[str, Any]
    home: Path

    def folder(self, name: str, rows: range, shard_rows: int = 400) -> Path:
        """The samples ``rows`` as a features folder."""
        chosen = slice(rows.start, rows.stop)
        return write_folder(
            self.home / name,
            self.expected["ids"][chosen],
            self.expected["captions"][chosen],
            self.arrays["image_feat"][chosen],
            self.arrays["text_feat"][chosen],
            shard_rows,
        )

    def recaptions(self, name: str = "recaptions", count: int | None = None) -> Path:
        """The first ``count`` recaptions as a folder."""
        return write_folder(
            self.home / name,
            self.expected["recap_ids"][:count],
            self.expected["recap_captions"][:count],
            None,
            self.arrays["recap_text_feat"][:count],
        )

    def check_golden(self, output: Path) -> None:
        """The file is the golden result: ids, captions, and gains of exact search."""
        annotations = json.loads(output.read_text(encoding="utf-8"))
        assert [a["image"] for a in annotations] == self.expected["kept_ids"]
        assert [a["caption"] for a in annotations] == self.expected["final_captions"]
        gains = np.array([a["gains"] for a in annotations])
        np.testing.assert_allclose(gains, self.arrays["gains_exact"], rtol=0, atol=1e-6)


@pytest.fixture(scope="session")
def golden_files(golden: Path) -> tuple[Any, dict[str, Any]]:
    arrays = np.load(golden / "selection_seed0.npz")
    expected = json.loads((golden / "selection_seed0.json").read_text(encoding="utf-8"))
    return {name: arrays[name] for name in arrays.files}, expected


@pytest.fixture
def selection(golden_files: tuple[Any, dict[str, Any]], tmp_path: Path) -> Selection:
    return Selection(*golden_files, tmp_path)


@pytest.fixture
def infogrowth(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str]]:
    """Runs a command in this process: ``(exit status, what it printed to stdout and stderr)``."""

    def run(*arguments: Any) -> tuple[int, str]:
        capsys.readouterr()
        try:
            status = main([str(argument) for argument in arguments])
        except SystemExit as ended:  # argparse's own refusals
            status = int(ended.code or 0)
        captured = capsys.readouterr()
        return status, captured.out + captured.err

    return run


@pytest.fixture
def feature_folder(tmp_path: Path) -> Callable[..., Path]:
    """Writes a small features folder: ``feature_folder("name", rows=6, …)``."""

    def write(name: str, rows: int = 6, seed: int = 0, **parts: Any) -> Path:
        random = np.random.default_rng(seed)
        image = random.normal(size=(rows, 8)).astype(np.float32)
        content = {
            "ids": [f"s{row}" for row in range(rows)],
            "captions": [f"caption {row}" for row in range(rows)],
            "image": image,
            "text": image + 0.1 * random.normal(size=(rows, 8)).astype(np.float32),
            **parts,
        }
        return write_folder(tmp_path / name, **content)

    return write


@pytest.fixture(scope="module")
def forked() -> Iterator[Callable[..., dict[str, Any]]]:
    """Runs a command in a forked child, which may be killed at a step (see forked_runs.py); returns
    what it answers."""
    server = Path(__file__).with_name("forked_runs.py")
    start = (
        "import runpy, infogrowth.encoders.blip, infogrowth.encoders.embedding\n"
        f"runpy.run_path({str(server)!r}, run_name='__main__')"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", start], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdin and process.stdout

    def run(arguments: Sequence[object], **request: Any) -> dict[str, Any]:
        line = json.dumps({"args": list(map(str, arguments)), **request})
        process.stdin.write(line + "\n")
        process.stdin.flush()
        return json.loads(process.stdout.readline())

    yield run
    process.stdin.close()
    process.wait()
