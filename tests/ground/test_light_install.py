"""A light install: what it runs, and the sentence on what it leaves out."""

import re
import subprocess
import sys
import tomllib
from importlib import metadata

import pytest

from infogrowth.cli import main
from infogrowth.errors import sentence

# Runs commands one after the other with some packages hidden, as if they were not installed.
HIDING = """
import shlex, sys
hidden = set(sys.argv[1].split(","))
class Hide:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in hidden:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Hide())
from infogrowth.cli import main
for line in sys.argv[2:]:
    status = main(shlex.split(line))
    print("status", status)
"""


@pytest.fixture(scope="module")
def project(repository):
    return tomllib.loads((repository / "pyproject.toml").read_text())["project"]


def names(requirements):
    return {re.match(r"[\w.-]+", line)[0].lower() for line in requirements}


def test_base_and_extras_together_are_the_full_list(project, repository):
    full = names((repository / "requirements.txt").read_text().split())
    extras = project["optional-dependencies"]
    named = {e: names(extras[e]) for e in ("embed", "train", "report", "webdataset", "remote")}
    together = names(project["dependencies"]).union(*named.values()) - {"infogrowth"}
    assert together - {"aiohttp"} == full  # s3fs brings aiohttp


def test_growing_on_embeddings_needs_no_extra(project, feature_files, tmp_path):
    extras = project["optional-dependencies"]
    left_out = set().union(*(names(packages) for packages in extras.values()))
    hidden = left_out - names(project["dependencies"]) - {"infogrowth"}
    growth, result = tmp_path / "growth", tmp_path / "grown.json"
    commands = [
        f"grow --features {feature_files} --min-align 0.2 --growth {growth} --output {result}",
        f"score --features {feature_files} --output {tmp_path / 'scores'}",
        f"select --growth {growth} --scores {tmp_path / 'scores'} --where 'negclip > -9' "
        f"--output {tmp_path / 'chosen.parquet'}",
        f"select --annotations {tmp_path / 'chosen.parquet'} --top 3 --output {tmp_path}/top.json",
        f"sweep {growth} --tops 3",
        f"explain {growth} s1",
        f"select --growth {growth} --where true --output {tmp_path}/shards/ --images {tmp_path}",
        f"grow --features s3://a/b --growth {growth} --output {result}",
        f"report {growth}",
    ]
    run = subprocess.run(
        [sys.executable, "-c", HIDING, ",".join(hidden), *commands],
        capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert run.stdout.count("status 0") == 6, run.stderr
    assert run.stdout.count("status 2") == 3
    for package in ("webdataset", "fsspec", "jinja2"):
        assert package in run.stderr
    assert "Traceback" not in run.stderr


@pytest.fixture
def feature_files(tmp_path):
    import numpy as np

    random = np.random.default_rng(0)
    image = random.normal(size=(20, 8)).astype(np.float32)
    text = image + 0.2 * random.normal(size=(20, 8)).astype(np.float32)
    ids, captions = [f"s{n}" for n in range(20)], [f"caption {n}" for n in range(20)]
    np.savez(tmp_path / "features.npz", ids=ids, captions=captions, image=image, text=text)
    return tmp_path / "features.npz"


@pytest.mark.parametrize(
    ("module", "extra"),
    [
        ("timm", "embed"), ("transformers.models", "embed"), ("lmdb", "embed"),
        ("fairscale", "train"), ("jinja2", "report"), ("webdataset", "webdataset"),
        ("s3fs", "remote"),
    ],
)  # fmt: skip
def test_a_missing_package_names_its_extra(project, monkeypatch, module, extra):
    requires = [
        f'{package}; extra == "{name}"'
        for name, packages in project["optional-dependencies"].items()
        for package in packages
    ]
    monkeypatch.setattr(metadata, "requires", lambda name: requires)
    printed = sentence(ModuleNotFoundError("…", name=module))
    assert f"'infogrowth[{extra}]'" in printed
    assert module.partition(".")[0] in printed


def test_a_missing_module_of_the_project_is_no_matter_of_installing(monkeypatch, capsys):
    assert sentence(ModuleNotFoundError("…", name="infogrowth.nothing")) is None
    assert "pip install pillow" in sentence(ModuleNotFoundError("…", name="PIL.Image"))

    def broken(config):
        import infogrowth.nothing  # noqa: F401

    monkeypatch.setattr("infogrowth.commands.sweep.run", broken)
    with pytest.raises(ModuleNotFoundError):
        main(["sweep", "growth"])
