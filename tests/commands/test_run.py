"""`run`: the stages of one YAML give what the single commands give, and can be taken up again."""

import json
import re
import tarfile

import pytest
import yaml

from infogrowth.commands.run import Config, read_stages

PAIRS = 24


@pytest.fixture
def drawings(repository, tmp_path):
    """The first pairs of the bundled sample, as a flat folder."""
    folder = tmp_path / "drawings"
    with tarfile.open(sorted((repository / "processed_data/sample").glob("*.tar"))[0]) as tar:
        members = [member for member in tar if not member.name.endswith(".json")]
        tar.extractall(folder, members[: 2 * PAIRS], filter="data")
    return folder


def pipeline(path, **content):
    path.write_text(yaml.safe_dump(content))
    return path


def test_a_pipeline_gives_what_its_commands_give_and_goes_on(drawings, infogrowth, tmp_path):
    out, single = tmp_path / "out", tmp_path / "single"
    file = pipeline(
        tmp_path / "all.yaml",
        output=str(out),
        min_align=0.2,
        pack={"image_root": str(drawings)},
        embed={"shard_size": 10, "workers": 0},
        grow=None,
        select={"top": 5},
        report=None,
    )
    assert infogrowth("run", file, "--until", "embed")[0] == 0
    assert not (out / "growth").exists()
    status, printed = infogrowth("run", file)
    assert status == 0
    assert "python -m infogrowth grow --features" in printed
    assert (out / "report.html").stat().st_size > 10_000
    for arguments in (
        ["pack", "--image-root", drawings, "--output-root", single],
        ["embed", "--lmdb", single / "lmdb_train", "--annotations", single / "cc3m_train.json",
         "--output", single / "features", "--shard-size", 10, "--workers", 0],
        ["grow", "--features", single / "features", "--growth", single / "growth",
         "--output", single / "grown.json", "--min-align", 0.2],
        ["select", "--growth", single / "growth", "--top", 5, "--output", single / "selected.json"],
    ):  # fmt: skip
        assert infogrowth(*arguments)[0] == 0
    for name in (
        "cc3m_train.json",
        "grown.json",
        "selected.json",
        "features/img_emb/img_emb_0.npy",
    ):
        assert (out / name).read_bytes() == (single / name).read_bytes(), name
    before = {path: path.read_bytes() for path in out.rglob("*.json")}
    status, printed = infogrowth("run", file)
    assert status == 0
    assert "nothing new" in printed
    assert {path: path.read_bytes() for path in out.rglob("*.json")} == before
    assert infogrowth("run", file, "--only", "select")[0] == 0


def test_an_interrupted_stage_is_named_and_later_ones_do_not_run(infogrowth, tmp_path, selection):
    features = selection.folder("features", range(1600))
    file = pipeline(
        tmp_path / "run.yaml",
        output=str(tmp_path / "out"),
        grow={"features": str(features)},
        select={"where": "aestetic > 5"},
        report=None,
    )
    status, printed = infogrowth("run", file)
    assert status == 2
    assert re.search("select.*'aestetic", printed)
    assert json.loads((tmp_path / "out/grown.json").read_text())
    assert not (tmp_path / "out/report.html").exists()


def test_stages_read_what_earlier_stages_wrote(tmp_path):
    file = pipeline(
        tmp_path / "run.yaml",
        output="o",
        seed_ids="s.json",
        device="cpu",
        embed={"source": "shards"},
        recaption=None,
        grow={"k": 7},
        select={"top": 3, "output": ["a.json", "b.parquet"]},
    )
    stages = {stage.name: stage for stage in read_stages(Config(str(file)))}
    assert list(stages) == ["embed", "recaption", "grow", "select"]
    assert stages["embed"].config.lmdb is None
    assert stages["recaption"].config.features == "o/features"
    grow = stages["grow"].config
    assert (grow.features, grow.recaptions, grow.k) == ("o/features", "o/recaptions", 7)
    assert (grow.seed_ids, grow.device) == ("s.json", "cpu")
    assert stages["select"].command() == (
        "python -m infogrowth select --output a.json b.parquet --growth o/growth --top 3"
    )


@pytest.mark.parametrize(
    ("content", "arguments", "word"),
    [
        ({"output": "o", "grwo": {}}, [], "did you mean 'grow'"),
        ({"output": "o", "grow": {"min_aling": 1}}, [], "did you mean 'min_align'"),
        ({"output": "o", "grow": {"k": "many"}}, [], "key 'k' of stage grow"),
        ({"output": "o", "pack": {}}, [], "image_root is missing"),
        ({"output": "o", "select": {"top": 1, "bernoulli": True}}, [], "stage select of"),
        ({"output": "o", "grow": 3}, [], "key: value"),
        ({"grow": {}}, [], "output"),
        ({"output": "o"}, [], "no stage"),
        ({"output": "o", "grow": {}}, ["--until", "grew"], "did you mean 'grow'"),
        ({"output": "o", "grow": {}}, ["--only", "select"], "no stage 'select'"),
        ({"output": "o", "grow": {}}, [], "o/features"),
    ],
)
def test_what_is_no_pipeline_is_refused(infogrowth, tmp_path, content, arguments, word):
    status, printed = infogrowth("run", pipeline(tmp_path / "run.yaml", **content), *arguments)
    assert status == 2
    assert word in printed
