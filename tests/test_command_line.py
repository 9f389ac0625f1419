"""Every command describes itself, and refuses what it was not meant to be given."""

import pytest

from tools.__main__ import COMMANDS, main


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_describes_its_flags(command, capsys):
    assert main([command, "--help"]) == 0
    shown = capsys.readouterr()
    assert shown.err == "" and f"    {command} - " in shown.out
    assert "FIRE_METADATA" not in shown.out  # which fire's decorators leave on a function


def test_a_flag_that_is_there_twice_is_refused(capsys):
    assert main(["merge", "--vectors", "a", "--vectors=b", "--output", "m"]) == 1
    assert "--vectors is there twice" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["compare", "--specialist", "s"], "unknown flag --specialist, did you mean 'specialists'?"),
        (["merge", "--pretraned", "p", "--vectors", "v"], "unknown flag --pretraned, did you mean 'pretrained'?"),
        (["compare", "--specialists", "s"], "--pretrained, --vectors, --dataset_dir, --split_file, --output missing"),
        (["merge", "--vectors", "v", "--output", "o"], "--pretrained (or --recipe) is missing"),
    ],
)
def test_a_misspelt_flag_is_named_rather_than_the_one_it_leaves_missing(capsys, words, message):
    assert main(words) == 1
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--workers", "abc"], "--workers abc: it must be a whole number"),
        (["--tolerance=nan"], "--tolerance nan: it must be a number"),
        (["--overlays", "yes"], "--overlays yes: it must be True or False"),
    ],
)
def test_a_value_of_another_kind_is_refused(capsys, words, message):
    assert main(["evaluate", "--bundle", "b", "--dataset_dir", "d", "--output", "o", *words]) == 1
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("name", ["901", "a,b", "None", "it's"])
def test_folders_may_have_any_name(tmp_path, monkeypatch, capsys, name):
    monkeypatch.chdir(tmp_path)
    assert main(["phantom", "--output", name, "--cases", "1"]) == 0, capsys.readouterr().err
    assert (tmp_path / name / "dataset.json").is_file()
