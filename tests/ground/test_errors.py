"""Other people's exceptions become one sentence that names the file."""

import json

import pytest

from infogrowth.errors import UserError, exit_status, refusing, shorten


def test_a_message_of_many_lines_becomes_one_short_line():
    assert shorten(ValueError("first\n   second\tthird")) == "first second third"
    assert len(shorten(ValueError("x" * 5000), limit=120)) == 120
    assert shorten(KeyboardInterrupt()) == "KeyboardInterrupt"  # never an empty reason


def test_an_error_of_the_system_is_its_text_without_number_and_path(tmp_path):
    with pytest.raises(IsADirectoryError) as caught:
        tmp_path.read_text()
    assert shorten(caught.value) == "Is a directory"


def test_a_parser_s_error_names_the_file(tmp_path):
    path = tmp_path / "a.json"
    path.write_text("{")
    with pytest.raises(UserError, match=r"a\.json.*double quotes"), refusing(path, "the file"):
        try:
            json.loads(path.read_text())
        except ValueError as error:
            raise OSError(error) from error  # OSError is always passed on
    with (
        pytest.raises(UserError, match=r"a\.json.*double quotes"),
        refusing(path, "the file", ValueError),
    ):
        json.loads(path.read_text())


def test_a_missing_file_and_deep_nesting_have_their_own_sentences(tmp_path):
    with (
        pytest.raises(UserError, match="exist"),
        refusing(tmp_path / "none", "the file"),
    ):
        (tmp_path / "none").read_text()
    with (
        pytest.raises(UserError, match="nested"),
        refusing(tmp_path / "deep", "the file"),
    ):
        json.loads("[" * 100_000)


def test_errors_that_nobody_named_and_user_errors_pass_through(tmp_path):
    with pytest.raises(ZeroDivisionError), refusing(tmp_path, "the file", ValueError):
        _ = 1 / 0
    with pytest.raises(UserError, match="mine"), refusing(tmp_path, "the file"):
        raise UserError("mine")


def test_an_error_that_ends_a_command_has_its_status_and_its_words(capsys):
    assert exit_status(UserError("the file x is damaged")) == 2
    assert capsys.readouterr().err == "error: the file x is damaged\n"
    assert exit_status(PermissionError(13, "Permission denied", "/x")) == 2
    assert capsys.readouterr().err == "error: cannot use /x: Permission denied\n"
    assert (exit_status(KeyboardInterrupt()), exit_status(SystemExit(3))) == (130, 3)
    capsys.readouterr()
    try:
        {}["missing"]
    except KeyError as error:
        assert exit_status(error) == 1
    assert "Traceback" in capsys.readouterr().err
