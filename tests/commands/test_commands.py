import runpy
import sys

import pytest
from helpers import write_csv_data

from retinanet import commands


@pytest.fixture(autouse=True)
def own_argv(monkeypatch):
    """The dispatcher names the command in `sys.argv[0]`."""
    monkeypatch.setattr(sys, "argv", ["retinanet"])


def test_without_a_command_they_are_listed(capsys):
    with pytest.raises(SystemExit) as status:
        runpy.run_module("retinanet", run_name="__main__")  # python -m retinanet
    assert status.value.code == 0
    text = capsys.readouterr().out
    assert all(f"  {name} " in text for name in commands.COMMANDS)


def test_an_unknown_command_is_a_usage_error(capsys):
    with pytest.raises(SystemExit) as status:
        commands.main(["evaluate"])
    assert status.value.code == 2
    assert "invalid choice: 'evaluate'" in capsys.readouterr().err


@pytest.mark.parametrize("command", commands.COMMANDS)
def test_help_of_a_command_names_it_and_shows_defaults(command, capsys):
    with pytest.raises(SystemExit) as status:
        commands.main([command, "--help"])
    assert status.value.code == 0
    text = capsys.readouterr().out
    assert text.startswith(f"usage: retinanet {command} ")
    assert "(default: " in text and "None" not in text


def test_a_command_runs_with_its_flags_and_gives_its_status(tmp_path, capsys):
    data, classes = write_csv_data(tmp_path)
    argv = ["check", "--dataset", "csv", "--csv_train", data, "--csv_classes", classes]
    assert commands.main(argv) == 0
    assert "training can start" in capsys.readouterr().out
    (tmp_path / "a.png").unlink()
    assert commands.main(argv) == 1
    assert "training would not start" in capsys.readouterr().out
