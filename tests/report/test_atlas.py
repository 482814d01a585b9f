"""`report --atlas`: a parquet that Embedding Atlas opens."""

import io

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from infogrowth.growth.ledger import read_growth
from infogrowth.report.dataset import open_growth
from infogrowth.report.galleries import Thumbnails
from infogrowth.report.projection import write_atlas


@pytest.fixture(scope="module")
def grown(repository, tmp_path_factory):
    """The first pairs of the bundled sample, packed, embedded and grown."""
    import tarfile

    from infogrowth.cli import main

    home = tmp_path_factory.mktemp("atlas")
    with tarfile.open(sorted((repository / "processed_data/sample").glob("*.tar"))[0]) as tar:
        members = [member for member in tar if not member.name.endswith(".json")][:60]
        tar.extractall(home / "images", members, filter="data")
    for command in (
        ["pack", "--image-root", home / "images", "--output-root", home],
        ["embed", "--lmdb", home / "lmdb_train", "--annotations", home / "cc3m_train.json",
         "--output", home / "features", "--workers", 0],
        ["grow", "--features", home / "features", "--growth", home / "growth",
         "--output", home / "grown.json", "--min-align", 0.35],
    ):  # fmt: skip
        assert main([*map(str, command), "--quiet"]) == 0
    return home


def test_rows_hold_images_verdicts_and_neighbors(grown, tmp_path):
    path = tmp_path / "atlas.parquet"
    table = open_growth(grown / "growth")
    write_atlas(path, table, Thumbnails(grown / "lmdb_train"))
    rows = pq.read_table(path).to_pylist()
    decisions = read_growth(grown / "growth").decisions().to_pylist()
    assert [row["id"] for row in rows] == [decision["id"] for decision in decisions]
    assert {"kept", "dropped"} == {row["verdict"] for row in rows}
    for row, decision in zip(rows, decisions, strict=True):
        assert Image.open(io.BytesIO(row["image"]["bytes"])).format == "WEBP"
        assert row["caption"] == decision["caption"]
        assert row["gain"] == pytest.approx((decision["gain_image"] + decision["gain_text"]) / 2)
        near = [rows[number]["id"] for number in row["neighbors"]["ids"]]
        found = len(decision["image_neighbors"])
        assert near == decision["image_neighbors"] + [row["id"]] * (4 - found)  # one length
        assert row["neighbors"]["distances"][:found] == decision["image_distances"]
    # Kept samples: the two components of largest variance, uncorrelated; numpy's own SVD agrees.
    kept = [row for row in rows if row["verdict"] == "kept"]
    points = np.array([[row["projection_x"], row["projection_y"]] for row in kept])
    features = read_growth(grown / "growth").kept_features("image").astype(np.float64)
    singular = np.linalg.svd(features - features.mean(axis=0), compute_uv=False)[:2]
    np.testing.assert_allclose(np.linalg.norm(points, axis=0), singular, rtol=1e-4)
    position = {row["id"]: row["projection_x"] for row in rows}
    for row, decision in zip(rows, decisions, strict=True):
        if row["verdict"] == "dropped" and decision["image_neighbors"]:
            around = [position[name] for name in decision["image_neighbors"]]
            assert row["projection_x"] == pytest.approx(np.mean(around))


def test_the_command_writes_it_beside_the_page_and_says_how_to_look(grown, tmp_path, capsys):
    from infogrowth.cli import main

    path, page = tmp_path / "atlas.parquet", tmp_path / "page.html"
    assert main(["report", str(grown / "growth"), "--atlas", str(path), "-o", str(page)]) == 0
    assert f"embedding-atlas {path} --x projection_x --y projection_y" in capsys.readouterr().err
    assert path.exists()
    assert page.exists()
    for arguments in (["--annotations", str(grown / "grown.json")], [str(grown / "growth")]):
        wrong = path if "--annotations" in arguments else tmp_path / "atlas.html"
        assert main(["report", *arguments, "--atlas", str(wrong), "-o", str(page)]) == 2
