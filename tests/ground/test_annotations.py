"""The result JSON: both published forms load, numbers are written, broken entries are named."""

import json

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from infogrowth import UserError, gains_array, load_annotations, save_annotations


def write(path, value):
    path.write_text(json.dumps(value))
    return path


def test_gains_as_strings_and_as_numbers_load_alike(tmp_path):
    strings = [{"image": "000000001", "caption": "a fox", "gains": ["0.25", "0.5"]}]
    numbers = [{"image": "000000001", "caption": "a fox", "gains": [0.25, 0.5]}]
    loaded = [load_annotations(write(tmp_path / "a.json", form)) for form in (strings, numbers)]
    assert loaded[0] == loaded[1] == numbers


def test_numbers_are_written_unless_strings_are_asked_for(tmp_path):
    annotations = [{"image": "x", "caption": "naïve café 狐", "gains": [0.1, 2e-9]}]
    save_annotations(tmp_path / "numbers.json", annotations)
    save_annotations(tmp_path / "strings.json", annotations, legacy_strings=True)
    assert json.loads((tmp_path / "numbers.json").read_text())[0]["gains"] == [0.1, 2e-9]
    assert json.loads((tmp_path / "strings.json").read_text())[0]["gains"] == ["0.1", "2e-09"]
    assert load_annotations(tmp_path / "strings.json") == annotations


numbers = st.floats(allow_nan=False, allow_infinity=False) | st.integers(-9, 9)
entries = st.fixed_dictionaries(
    {
        "image": st.text(st.characters(exclude_categories=["Cs"]), min_size=1),
        "caption": st.text(st.characters(exclude_categories=["Cs"]))
        | st.lists(st.text(st.characters(exclude_categories=["Cs"])), min_size=1),
    },
    optional={
        "gains": st.tuples(numbers, numbers).map(list),
        "url": st.text(st.characters(exclude_categories=["Cs"])),
        "n": numbers,
    },
)


@settings(
    max_examples=200, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck)
)
@given(st.lists(entries, max_size=4))
def test_the_bytes_are_those_of_the_json_module(tmp_path, annotations):
    save_annotations(tmp_path / "a.json", annotations)
    expected = json.dumps(annotations, ensure_ascii=False) + "\n"
    assert (tmp_path / "a.json").read_bytes() == expected.encode()


def test_numbers_that_json_does_not_know_are_not_written(tmp_path):
    with pytest.raises(ValueError, match="JSON"):
        save_annotations(
            tmp_path / "a.json", [{"image": "x", "caption": "c", "gains": [np.inf, 1.0]}]
        )
    assert not any(tmp_path.iterdir())


def test_extra_keys_and_caption_lists_are_kept(tmp_path):
    entry = {"image": "x", "caption": ["one", "two"], "gains": [1.0, 1.0], "url": "u", "n": 3}
    save_annotations(tmp_path / "a.json", [entry])
    assert load_annotations(tmp_path / "a.json") == [entry]


def test_golden_annotations_hold_their_gains(golden):
    expected = np.load(golden / "sampling_n200.npz")["gains_raw"]
    annotations = load_annotations(golden / "sampling_annotations.json")
    np.testing.assert_array_equal(gains_array(annotations), expected)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"image": "x"}', "list"),
        ("[{", "JSON"),
        ('["x"]', "sample 0"),
        ('[{"caption": "c"}]', "image id"),
        ('[{"image": true, "caption": "c"}]', "image id"),
        ('[{"image": "x"}]', "'x'.*caption"),
        ('[{"image": "x", "caption": []}]', "'x'.*caption"),
        ('[{"image": "x", "caption": [1]}]', "'x'.*caption"),
        ('[{"image": "x", "caption": "c", "gains": [1]}]', "two numbers"),
        ('[{"image": "x", "caption": "c", "gains": ["a", "b"]}]', "two numbers"),
        ('[{"image": "x", "caption": "c", "gains": [NaN, 1]}]', "finite"),
    ],
)
def test_a_broken_file_is_one_sentence_that_names_the_place(tmp_path, content, message):
    path = tmp_path / "broken.json"
    path.write_text(content)
    with pytest.raises(UserError, match=message) as error:
        load_annotations(path)
    assert "broken.json" in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("gains", "message"),
    [
        ("[1" + "0" * 400 + ", 1]", "finite"),
        ("[1" + "0" * 5000 + ", 1]", "finite"),
        ("[1e999, 1]", "finite"),
        ('"12"', "two numbers"),
        ('{"1": 0, "2": 0}', "two numbers"),
        ("[0.5, true]", "two numbers"),
        ("[-5, 1]", "negative"),
        ('["-1", "1"]', "negative"),
        ("null", "two numbers"),
        ('[1, 1], "score": NaN', "JSON compliant"),
        ('[1, 1], "scores": {"a": [1, -Infinity]}', "JSON compliant"),
        ('[1, 1], "views": 1' + "0" * 5000, "JSON compliant"),
    ],
)
def test_what_is_no_gain_or_no_json_number_is_refused(tmp_path, gains, message):
    path = tmp_path / "broken.json"
    path.write_text(f'[{{"image": "x", "caption": "c", "gains": {gains}}}]')
    with pytest.raises(UserError, match=message) as error:
        load_annotations(path)
    assert r"sample 0 of" in str(error.value) and "('x')" in str(error.value)
    assert "\n" not in str(error.value) and len(str(error.value)) < 400


def test_gains_may_be_below_zero_by_a_rounding_error(tmp_path):
    entry = {"image": "x", "caption": "c", "gains": [-1.2e-7, 1.0], "views": 10**400}
    assert load_annotations(write(tmp_path / "a.json", [entry])) == [entry]


def test_missing_gains_are_named():
    with pytest.raises(UserError, match=r"'b'.* gains"):
        gains_array([{"image": "a", "caption": "c", "gains": [1, 1]}, {"image": "b"}])
