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
