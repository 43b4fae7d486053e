"""The `bst` command line: list of commands, help, and errors for mistyped commands."""

from __future__ import annotations

import argparse
import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

from bst_dist import cli
from bst_dist.usage import HelpFormatter, nearest


def test_every_command_is_in_the_overview_or_its_groups(capsys):
    assert cli.main([]) == 0
    out = capsys.readouterr().out
    for name in cli.COMMANDS:
        group, _, member = name.partition(" ")
        line = next(line for line in out.splitlines() if line.startswith(f"  {group} "))
        assert len(line) <= 120
        assert not member or member in out[out.index(line) :].partition("\n\n")[0]
    assert {name.partition(" ")[0] for name in cli.COMMANDS if " " in name} == cli.GROUPS.keys()


@pytest.mark.parametrize("group", cli.GROUPS)
def test_a_group_lists_its_commands(group, capsys):
    assert cli.main([group]) == 0
    lines = capsys.readouterr().out.splitlines()
    members = [name.partition(" ")[2] for name in cli.COMMANDS if name.startswith(f"{group} ")]
    assert [line.split()[0] for line in lines[4:]] == members


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        (["trian", "recipe.yaml"], "train"),
        (["dta"], "data"),
        (["data", "prepair", "x.yaml"], "data prepare"),
        (["prepare", "x.yaml"], "data prepare"),
        (["evaluate", "runs/demo"], None),
    ],
)
def test_a_mistyped_command_suggests_the_nearest(typed, meant, capsys):
    assert cli.main(typed) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert (f"did you mean `bst {meant}`?" in said.err) == (meant is not None)
    assert nearest(typed, cli.COMMANDS, cli.GROUPS) == meant


def test_version_option_shows_bst_dist_and_deepspeed(capsys):
    assert cli.main(["--version"]) == 0
    out = capsys.readouterr().out
    assert "bst_dist" in out and "deepspeed" in out


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_help_explains_every_argument_and_default(name):
    """Every argument is explained, every default is shown, and examples are indented."""
    parser = cli.parser_of(name)
    text = parser.format_help()
    assert "SUPPRESS" not in text and "default: None" not in text
    for action in parser._actions:
        assert action.help, f"bst {name}: {action.option_strings or action.dest} is not explained"
        if action.option_strings and action.default not in (None, False, "", [], (), argparse.SUPPRESS):
            assert "default" in parser._get_formatter()._get_help_string(action), action.dest
    doc = importlib.import_module(cli.COMMANDS[name][0]).__doc__
    assert doc.splitlines()[0].endswith((".", "?", "xz -9."))
    for line in doc.splitlines()[1:]:
        assert not line.lstrip().startswith(f"bst {name}") or line.startswith("    "), line


@pytest.mark.parametrize(
    "words",
    [
        "plot run --out",
        "compare a b --plot",
        "eval run --plot",
        "ablate run --out",
        "data stats corpus --png",
        "law fit table.csv --n n --tokens d --loss l --plot",
    ],
)
def test_an_unsupported_picture_suffix_is_refused_before_any_work(words, capsys, monkeypatch):
    name = next(name for name in cli.COMMANDS if words.startswith(f"{name} "))
    monkeypatch.setattr(importlib.import_module(cli.COMMANDS[name][0]), "run", lambda _: pytest.fail("worked"))
    with pytest.raises(SystemExit, match="2"):
        cli.main([*words.split(), "x.foo"])
    assert "x.foo: the suffix must be one of .png, .pdf, .svg" in capsys.readouterr().err


@pytest.mark.parametrize("words", [["data", "sources"], ["--version"], []])
def test_a_full_output_is_reported_but_not_a_closed_one(words):
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "bst_dist", *words], stdout=full, stderr=subprocess.PIPE, text=True
        )
    assert done.returncode == 74
    assert done.stderr == "bst: cannot write to the standard output or a file: No space left on device\n"
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run([sys.executable, "-m", "bst_dist", *words], stdout=write, stderr=subprocess.PIPE, text=True)
    os.close(write)
    assert done.stderr == "" and done.returncode in (1, 141)  # 1 is rich's own exit status


def test_defaults_are_shown_as_a_user_types_them():
    parser = argparse.ArgumentParser(formatter_class=HelpFormatter)
    parser.add_argument("--lengths", nargs="+", default=[1, 2], help="tokens")
    parser.add_argument("--share", default="5%", help="so much")
    parser.add_argument("--told", default=3, help="by itself (default: three)")
    parser.add_argument("--unset", help="nothing")
    text = parser.format_help()
    for said in ("tokens (default: 1 2)\n", "so much (default: 5%)\n", "itself (default: three)\n", "nothing\n"):
        assert said in text
