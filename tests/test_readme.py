"""The README keeps its word: paths and flags exist, and each command is one that is run."""

import importlib.util
import re
import shlex
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image

from infogrowth.annotations import load_annotations
from infogrowth.cli import VERBS
from infogrowth.commands.run import Config as RunConfig
from infogrowth.commands.run import read_stages
from infogrowth.config import load_config

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
COMMANDS = re.findall(r"^    (python3? .+|make .+)$", README, flags=re.MULTILINE)
PROGRAMS = {
    "train/pretrain_gain.py": ("train.pretrain_gain", "PretrainConfig"),
    "train/train_retrieval.py": ("train.train_retrieval", "RetrievalConfig"),
}


def demo_commands() -> list[str]:
    spec = importlib.util.spec_from_file_location("demo", ROOT / "scripts/demo.py")
    demo = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(demo)
    return demo.COMMANDS.replace("\n    ", " ").strip().splitlines()


def test_every_path_that_the_readme_links_exists():
    linked = re.findall(r"\]\(([^)#]+)\)", README)
    assert "docs/report.png" in linked
    assert [path for path in linked if "://" not in path and not (ROOT / path).exists()] == []


def test_every_program_and_config_that_the_readme_names_exists():
    named = set(
        re.findall(r"\b(?:scripts|train|benchmarks|infogrowth)/[\w/.]+\.(?:py|yaml)", README)
    )
    assert len(named) >= 5
    assert [path for path in named if not (ROOT / path).exists()] == []


def test_the_growing_commands_are_those_that_the_demo_runs():
    """`make demo` runs them; here they are held to be the same, word for word."""
    block = README.split("## Grow your own dataset")[1].split("Or one command a stage")[0]
    written = re.findall(r"^    (python .+)$", block, flags=re.MULTILINE)
    assert written == demo_commands()


def test_one_command_a_stage_is_the_same_as_the_demos_yaml():
    block = README.split("Or one command a stage")[1].split("## ")[0]
    written = {}
    for command in re.findall(r"^    python (.+)$", block, flags=re.MULTILINE):
        command = command.replace("scripts/cc3m_lmdb_writer.py", "-m infogrowth pack")
        _, _, verb, *arguments = shlex.split(command)
        module = import_module(f"infogrowth.commands.{verb}")
        written[verb] = check(module.Config, arguments)
    stages = read_stages(RunConfig(pipeline=str(ROOT / "scripts/configs/demo.yaml")))
    assert written == {stage.name: stage.config for stage in stages}


def test_every_verb_is_explained():
    assert [verb for verb in VERBS if f"| `{verb}` |" not in README] == []


@pytest.mark.parametrize("command", COMMANDS)
def test_every_flag_that_the_readme_names_is_a_flag(command):
    words = shlex.split(command.replace("$TEST_CKPT", "checkpoint.pth").partition("#")[0])
    program = next((w for w in words if w in PROGRAMS), None)
    if program:
        module, name = PROGRAMS[program]
        config_class, arguments = (
            getattr(import_module(module), name),
            words[words.index(program) + 1 :],
        )
    elif "infogrowth" in words:
        verb = words[words.index("infogrowth") + 1]
        command_module = import_module(f"infogrowth.commands.{verb}")
        config_class, arguments = command_module.Config, words[words.index(verb) + 1 :]
        check(config_class, arguments)
        return
    elif words[0] == "make":
        assert re.search(rf"^{words[1]}:", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
        return
    else:
        assert words[1] == "scripts/cc3m_lmdb_writer.py"  # run for real below
        return
    check(config_class, arguments)


def check(config_class: type, arguments: list[str]) -> Any:
    """Parse as the command line does, the config file included; an unknown flag or key raises."""
    import argparse

    from infogrowth.config import add_flags

    parser = add_flags(argparse.ArgumentParser(exit_on_error=False), config_class)
    args = parser.parse_args(arguments)
    if getattr(args, "config", None):
        args.config = str(ROOT / args.config)
    return load_config(config_class, getattr(args, "config", None), vars(args))


def test_the_cc3m_config_points_to_the_papers_file():
    config = yaml.safe_load((ROOT / "train/configs/pretrain_cc3m_gain.yaml").read_text())
    assert config["annotations"] == "processed_data/InfoGrowth_400k_samples.json"
    assert config["sampler"] == "two_phase"


def test_the_writers_command_works_as_written(tmp_path):
    command = "python scripts/cc3m_lmdb_writer.py --image_root your_path"
    assert command in COMMANDS
    for split, names in {"cc3m_train": ["b", "a"], "cc3m_val": ["c"]}.items():
        (tmp_path / "your_path" / split).mkdir(parents=True)
        for name in names:
            Image.new("RGB", (40, 30), "teal").save(tmp_path / f"your_path/{split}/{name}.jpg")
            (tmp_path / f"your_path/{split}/{name}.txt").write_text(f"a teal {name}")
    (tmp_path / "scripts").symlink_to(ROOT / "scripts")
    subprocess.run([sys.executable, *command.split()[1:]], cwd=tmp_path, check=True)
    packed = load_annotations(tmp_path / "your_path/cc3m_train.json")
    assert packed == [
        {"image": "a", "caption": "a teal a"},
        {"image": "b", "caption": "a teal b"},
    ]
    assert (tmp_path / "your_path/lmdb_val/data.mdb").exists()


def test_every_section_that_the_code_cites_stands_in_the_contract():
    contract = (ROOT / "docs/contract.md").read_text()
    cited = {
        section
        for path in (ROOT / "infogrowth").rglob("*.py")
        for section in re.findall(r"spec §(\d+)", path.read_text())
    }
    assert cited
    assert [s for s in cited if not re.search(rf"^## {s}\. ", contract, re.MULTILINE)] == []


def test_every_test_that_the_table_of_departures_names_exists():
    table = (ROOT / "docs/contract.md").read_text().split("## 10. ")[1]
    named = re.findall(r"`([\w/]+/test_\w+\.py)`", table)
    assert len(named) >= 10
    assert [name for name in named if not (ROOT / "tests" / name).exists()] == []
