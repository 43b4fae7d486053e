"""Options that need another option are refused without it, and never ignored, in all commands."""

from __future__ import annotations

import argparse

import pytest

from bst_dist import cli
from bst_dist.usage import needed_by


def _parts(name: str) -> list[tuple[argparse.Action, str]]:
    """Return the options of a command that need another option, with the name of that option."""
    return [(action, other) for action in cli.parser_of(name)._actions if (other := needed_by(action))]


DEPENDENT = [(name, action.option_strings[-1]) for name in cli.COMMANDS for action, _ in _parts(name)]


def _command_line(name: str, option: str) -> list[str]:
    """Return a command line with the required arguments (names that do not exist) and the option with a value."""
    parser = cli.parser_of(name)
    words = name.split()
    for action in parser._actions:
        needed = action.required and action.option_strings
        if option in action.option_strings or needed:
            words.append(action.option_strings[-1])
            words += [] if action.nargs == 0 else ["7"]
        elif not action.option_strings and action.nargs not in ("*", "?"):
            words.append("nowhere")
    return words


def test_known_dependent_options_are_found():
    assert {("sweep run", "--sbatch"), ("experiment run", "--sbatch"), ("plan", "--host-gb"), ("train", "--node")} <= {
        *DEPENDENT
    }


@pytest.mark.parametrize(("name", "option"), DEPENDENT)
def test_a_dependent_option_is_refused_without_its_main_option(name, option, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cli.main(_command_line(name, option)) == 2
    said = capsys.readouterr()
    assert f"{option} means nothing without --" in said.err
    assert said.out == "" and not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_required_options_exist_in_the_same_command(name):
    options = {text for action in cli.parser_of(name)._actions for text in action.option_strings}
    for action, other in _parts(name):
        assert other in options - set(action.option_strings), action.option_strings


@pytest.mark.parametrize("kind", ["sweep", "experiment"])
@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--workers", "2", "--hostfile", "hosts"], "--workers cannot be combined with --hostfile"),
        (["--hostfile", "hosts", "--sbatch=-p x"], "--sbatch means nothing without --slurm"),
    ],
)
def test_contradictory_places_to_train_are_refused(kind, words, said, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cli.main([kind, "run", "nowhere.yaml", *words]) == 2
    assert said in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
