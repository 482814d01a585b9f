"""Configuration: YAML and flags meet in one checked dataclass."""

import argparse
from dataclasses import asdict, dataclass
from typing import Literal

import pytest

from infogrowth.config import add_flags, load_config, option
from infogrowth.errors import UserError


@dataclass(frozen=True)
class Example:
    features: str = option(help="where the features are")
    min_align: float | Literal["auto"] = option("auto", help="threshold")
    rate: float = option(3e-4)
    k: int = option(4)
    resume: bool = option(True)
    seeds: str | None = option(None)
    index: Literal["auto", "exact"] = option("auto")
    shards: list[int] = option([1, 2])
    output: str = option("out", short="-o")
    plot: str | None = option(None, extensions=".html .png", excludes="seeds")
    marks: list[float] = option([], min=0, max=1, needs="plot")
    workers: int | None = option(None, "processes, or auto", min=0)
    top: int | None = option(None, "the best so many")


def from_yaml(tmp_path, text):
    path = tmp_path / "config.yaml"
    path.write_text(text)
    return load_config(Example, path)


def from_flags(*arguments):
    parser = add_flags(argparse.ArgumentParser(), Example)
    args = parser.parse_args(arguments)
    return load_config(Example, args.config, vars(args))


def test_scientific_notation_that_yaml_reads_as_text_becomes_a_number(tmp_path):
    assert from_yaml(tmp_path, "features: f\nrate: 3e-4").rate == 3e-4


def test_a_flag_wins_over_the_file(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text("features: file\nk: 7\nmin_align: 0.4\nresume: true")
    config = from_flags("--config", str(path), "--k", "9", "--no-resume")
    assert (config.features, config.k, config.min_align, config.resume) == ("file", 9, 0.4, False)


def test_both_spellings_of_a_flag_and_short_flags_work():
    assert from_flags("--features", "f", "--min_align", "0.3").min_align == 0.3
    assert from_flags("--features", "f", "--min-align", "auto", "-o", "x").output == "x"


def test_lists_and_optionals():
    config = from_flags("--features", "f", "--shards", "3", "4", "--seeds", "none")
    assert config.shards == [3, 4] and config.seeds is None
    assert asdict(config)["shards"] == [3, 4]
    assert from_flags("--features", "f", "--workers", "auto").workers is None
    with pytest.raises(UserError, match="auto"):
        from_flags("--features", "f", "--workers", "x")
    with pytest.raises(UserError, match="whole number"):
        from_flags("--features", "f", "--top", "auto")
    assert from_flags("--features", "f", "--plot", "A.PNG", "--marks", "0", "1").marks == [0, 1]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("features: f\nmin_algin: 0.4", "did you mean 'min_align'"),
        ("features: f\nk: 4.5", "key 'k' in .*whole number.*4.5"),
        ("features: f\nk: .inf", "whole number"),
        ("features: f\nrate: fast", "number.*'fast'"),
        ("features: f\nresume: 1", "true or false"),
        ("features: f\nindex: exakt", "did you mean 'exact'"),
        ("features: f\nmin_align: atuo", "a number"),
        ("features: f\nshards: [1, x]", "whole number"),
        ("features: f\nk:", "whole number"),
        ("features: f\nk: 1\nk: 2", "given twice"),
        ("features: [", "not valid YAML"),
        ("? [a]\n: 1", "single value .*line 1"),
        (
            "features: 2020-13-45",
            "'2020-13-45' .*line 1",
        ),
        ("k: !!int abc", "'abc' is no int"),
        ("k: !!int ''", "'' is no int"),
        ("rate: !!float x", "'x' is no float"),
        ("resume: !!bool x", "'x' is no bool"),
        ("features: !!timestamp x", "'x' is no timestamp"),
        ("features: " + "[" * 3000, "nested"),
        ("just text", "key: value"),
        ("k: 4", "features"),
        ("features: true", "text"),
        ("plot: a.pdf", r"a\.pdf must end in \.html or \.png"),
        ("features: f\nplot: a.png\nseeds: s", "either --plot or --seeds, not both"),
        ("features: f\nmarks: [0.5]", "--marks goes with --plot"),
        ("plot: a.html\nmarks: [0.5, 1.5]", "at most 1, not 1.5"),
        ("plot: a.html\nmarks: [.nan]", "at least 0"),
        ("workers: -1", "at least 0"),
    ],
)
def test_a_bad_config_is_one_sentence(tmp_path, text, message):
    with pytest.raises(UserError, match=message) as error:
        from_yaml(tmp_path, text)
    assert "\n" not in str(error.value)


def test_a_missing_config_file_is_named(tmp_path):
    with pytest.raises(UserError, match=r"nowhere\.yaml"):
        load_config(Example, tmp_path / "nowhere.yaml")
