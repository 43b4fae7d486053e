"""The `bst` command line: list of commands, help, and errors for mistyped commands."""

from __future__ import annotations

import argparse
import errno
import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from bst_base.errors import UserError
from bst_base.outputs import write_afterwards
from bst_dist import cli
from bst_dist.usage import HelpFormatter, nearest_command


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
    assert nearest_command(typed, cli.COMMANDS, cli.GROUPS) == meant


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


@pytest.mark.parametrize(
    "words", [["data", "sources"], ["--version"], [], ["--help"], ["eval", "--help"], ["plan", "--help"]]
)
def test_a_full_output_is_reported_but_not_a_closed_one(words):
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "bst_dist", *words], stdout=full, stderr=subprocess.PIPE, text=True
        )
    assert done.returncode == 74
    assert done.stderr == "bst: cannot write to the standard output: No space left on device\n"
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run([sys.executable, "-m", "bst_dist", *words], stdout=write, stderr=subprocess.PIPE, text=True)
    os.close(write)
    assert done.stderr == "" and done.returncode == 141


def measuring(monkeypatch, work):
    """Make `bst baselines` a command that calls `work` with its arguments and measures one number."""

    def run(args):
        work(args)
        return {"measured": 1}

    monkeypatch.setattr(importlib.import_module(cli.COMMANDS["baselines"][0]), "run", run)


def no_space(*_):
    raise OSError(errno.ENOSPC, "No space left on device", "figure.png")


@pytest.mark.parametrize("error", ["a full disk", "a fault"])
def test_a_figure_that_cannot_be_drawn_loses_neither_the_report_nor_other_files(error, tmp_path, capsys, monkeypatch):
    drawn = []

    def work(args):
        write_afterwards(args, no_space if error == "a full disk" else lambda: 1 / 0)
        write_afterwards(args, lambda: drawn.append("the second figure"))

    measuring(monkeypatch, work)
    words = ["baselines", "corpus", "--json", str(tmp_path / "deep/report.json")]
    if error == "a full disk":
        assert cli.main(words) == 74
        assert "figure.png: No space left on device" in capsys.readouterr().err
        assert drawn == ["the second figure"]
    else:
        with pytest.raises(ZeroDivisionError):
            cli.main(words)
    assert json.loads((tmp_path / "deep/report.json").read_text())["measured"] == 1


def test_a_report_that_cannot_be_written_loses_no_figure(tmp_path, capsys, monkeypatch):
    drawn = []
    measuring(monkeypatch, lambda args: write_afterwards(args, lambda: drawn.append("figure")))
    monkeypatch.setattr(cli, "write_report", no_space)
    assert cli.main(["baselines", "corpus", "--json", str(tmp_path / "report.json")]) == 74
    assert drawn == ["figure"]


@pytest.mark.parametrize(("error", "expected"), [(UserError("a shard is missing"), 2), (KeyboardInterrupt(), 130)])
def test_a_command_that_fails_later_keeps_the_figures_of_finished_parts(error, expected, monkeypatch):
    drawn = []

    def work(args):
        write_afterwards(args, lambda: drawn.append("the first corpus"))
        raise error

    measuring(monkeypatch, work)
    assert cli.main(["baselines", "corpus"]) == expected
    assert drawn == ["the first corpus"]


@pytest.mark.parametrize("reader", ["a full disk", "a closed pipe", "an encoding without ±"])
def test_an_output_that_cannot_be_written_does_not_lose_the_report(reader, tmp_path):
    report = tmp_path / "report.json"
    program = (
        "import sys, data_pipeline.commands.sources; from bst_base.terminal import say; from bst_dist import cli\n"
        "def run(args): say('2.3 ± 0.1 ' * 2000); return {'measured': 1}\n"
        "data_pipeline.commands.sources.run = run; sys.exit(cli.main(['data', 'sources', '--json', sys.argv[1]]))"
    )
    closed, pipe = os.pipe()
    os.close(closed)
    with Path("/dev/full").open("w") as full, os.fdopen(pipe, "w"):
        stdout, status = {"a full disk": (full, 74), "a closed pipe": (pipe, 141)}.get(reader, (subprocess.PIPE, 0))
        done = subprocess.run(
            [sys.executable, "-c", program, str(report)],
            stdout=stdout,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONIOENCODING": "ascii" if status == 0 else "utf-8"},
        )
    assert done.returncode == status, done.stderr
    assert json.loads(report.read_text())["measured"] == 1


@pytest.mark.parametrize("words", ["eval run --lengths 16 --plot", "ablate run --out", "compare a b --json"])
def test_an_output_that_cannot_be_written_is_refused_before_any_work(words, tmp_path, capsys, monkeypatch):
    name = words.split()[0]
    monkeypatch.setattr(importlib.import_module(cli.COMMANDS[name][0]), "run", lambda _: pytest.fail("worked"))
    (tmp_path / "file").write_text("")
    (tmp_path / "folder.png").mkdir()
    for path, why in (("file/x.png", "is not a directory"), ("folder.png", "is not a regular file")):
        with pytest.raises(SystemExit, match="2"):
            cli.main([*words.split(), str(tmp_path / path)])
        assert why in capsys.readouterr().err


def test_defaults_are_shown_as_a_user_types_them():
    parser = argparse.ArgumentParser(formatter_class=HelpFormatter)
    parser.add_argument("--lengths", nargs="+", default=[1, 2], help="tokens")
    parser.add_argument("--share", default="5%", help="so much")
    parser.add_argument("--told", default=3, help="by itself (default: three)")
    parser.add_argument("--unset", help="nothing")
    text = parser.format_help()
    for said in ("tokens (default: 1 2)\n", "so much (default: 5%)\n", "itself (default: three)\n", "nothing\n"):
        assert said in text
