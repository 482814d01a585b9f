"""The command line: one entry, one sentence for bad input, one rank for work that is not shared."""

import subprocess
import sys

import numpy as np
import pytest

from infogrowth.annotations import load_annotations, save_annotations
from infogrowth.cli import VERBS, main


@pytest.fixture
def annotations(tmp_path):
    path = tmp_path / "grown.json"
    gains = [0.1, 0.9, 0.5]
    save_annotations(path, [{"image": f"{g}", "caption": "c", "gains": [g, g]} for g in gains])
    return path


def test_bad_input_is_one_sentence_and_status_2(tmp_path, capsys):
    arguments = ["select", "--annotations", str(tmp_path / "no.json"), "--top", "1"]
    assert main([*arguments, "--output", str(tmp_path / "o.json")]) == 2
    printed = capsys.readouterr().err
    assert printed.startswith("error: ") and "no.json" in printed
    assert printed.count("\n") == 1 and "Traceback" not in printed


@pytest.mark.parametrize("option", ["--growth", "--output", "--features"])
def test_a_name_too_long_for_a_file_is_one_sentence(tmp_path, capsys, option):
    np.savez(tmp_path / "f.npz", ids=["a"], captions=["a"], image=np.eye(1, 4), text=np.eye(1, 4))
    given = {"--growth": "g", "--output": "o.json", "--features": "f.npz"}
    given[option] = "n" * 300 + (".json" if option == "--output" else "")
    arguments = [a for name, value in given.items() for a in (name, str(tmp_path / value))]
    assert main(["grow", "--quiet", "--device", "cpu", *arguments]) == 2
    printed = capsys.readouterr().err
    assert printed.startswith("error: ") and "File name too long" in printed
    assert printed.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["explain", "folder"], "(GROWTH ID)"),
        (["compare", "a"], "(A B)"),
        (["sweep"], "(GROWTH)"),
    ],
)
def test_what_is_missing_by_position_is_named_by_position(capsys, arguments, expected):
    assert main(arguments) == 2
    assert expected in capsys.readouterr().err


def test_a_config_file_gives_what_the_flags_do_not(tmp_path, annotations):
    output, config = tmp_path / "o.json", tmp_path / "select.yaml"
    config.write_text(f"annotations: {annotations}\noutput: {output}\ntop: 1\n")
    assert main(["select", "--config", str(config), "--top", "2"]) == 0
    assert {entry["image"] for entry in load_annotations(output)} == {"0.9", "0.5"}


def test_under_the_launcher_one_rank_writes_what_is_not_shared(tmp_path, annotations, monkeypatch):
    output = tmp_path / "o.json"
    arguments = ["select", "--annotations", str(annotations), "--top", "1"]
    monkeypatch.setenv("RANK", "1")
    assert main([*arguments, "--output", str(output)]) == 0
    assert not output.exists()
    monkeypatch.setenv("RANK", "0")
    assert main([*arguments, "--output", str(output)]) == 0
    assert len(load_annotations(output)) == 1


def test_help_names_every_verb():
    printed = subprocess.run(
        [sys.executable, "-m", "infogrowth", "--help"], capture_output=True, text=True, check=True
    )
    assert [verb for verb in VERBS if verb not in printed.stdout] == []
