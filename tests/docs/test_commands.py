"""Every command line of the documentation is one that the real parsers, recipes and files accept.

Looked at are README.md, all Markdown of docs/, ds_configs/ and launch/, and the help of every command. Command lines
are those of code blocks, and those inside the text.
"""

from __future__ import annotations

import argparse
import ast
import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from bst_dist import cli
from bst_dist.config import deepspeed_file, load_recipe
from bst_dist.experiment.config import load_experiment
from bst_dist.lra.commands.prepare import SETTINGS, settings
from bst_dist.sweep.config import load_sweep
from bst_dist.train.__main__ import add_arguments as add_program_arguments
from data_pipeline.config import load
from data_pipeline.errors import UserError
from data_pipeline.prepare import PrepareConfig

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted(
    [ROOT / "README.md", *(path for part in ("docs", "ds_configs", "launch") for path in (ROOT / part).rglob("*.md"))]
)
PROGRAMS = ("bst", "make", "deepspeed")
# What stands for something of the reader's own, and what it is taken for here.
RECIPE = "launch/recipes/demo.yaml"
STAND_INS = {
    "N": "2", "I": "1", "L": "128", "K": "2", "STEP": "1", "SECONDS": "3", "ADDRESS:PORT": "node-00:29500",
    "PATH": "x.json", "COMMAND": "train", "GROUP": "data", "$c": "stdlib",
    **dict.fromkeys(("RECIPE", "recipe.yaml", "my-recipe.yaml", "/shared/my-recipe.yaml"), RECIPE),
    "SWEEP": "launch/sweeps/mini.yaml", "CONFIG": "launch/data/stdlib.yaml",
}  # fmt: skip


@dataclass(frozen=True)
class Line:
    """One command line of a page."""

    page: str
    number: int
    words: tuple[str, ...]
    in_text: bool
    """Then it may leave out what must be given."""

    def __str__(self) -> str:
        return f"{self.page}:{self.number}: {shlex.join(self.words)}"


def lines_of(page: str, text: str) -> Iterator[Line]:
    """All command lines of a page, without the names of commands that stand in its text alone."""
    fenced, joined, begin = False, "", 0
    for number, line in enumerate(text.splitlines(), 1):
        if line.strip().startswith("```"):
            fenced = not fenced
        elif fenced or joined or line.startswith("    "):
            begin = begin if joined else number
            joined += line.strip()
            if joined.endswith("\\"):
                joined = joined[:-1] + " "
                continue
            yield from (Line(page, begin, words, False) for words in commands_of(joined))
            joined = ""
        else:
            for span in re.findall(r"`([^`]+)`", line):
                yield from (Line(page, number, words, True) for words in commands_of(span))


def commands_of(text: str) -> Iterator[tuple[str, ...]]:
    """The commands of a shell line, from the name of a program of ours on, each with its stand-ins filled in."""
    text = text.removeprefix("$ ")
    if not re.search(rf"(^|\s)({'|'.join(PROGRAMS)}) ", text):
        return
    try:
        words = shlex.split(text, comments=True)
    except ValueError:  # prose with an apostrophe
        return
    for part in split(words):
        while part and ("=" in part[0] or part[0] in ("do", "exec", ".")):
            part = part[1:]
        if part[:1] == ["mpirun"] and "bst" in part:
            part = part[part.index("bst") :]
        elided = any("…" in word or word == "..." for word in part)
        output = any(word.endswith(":") for word in part[1:3])  # "bst launch: not started"
        if len(part) > 1 and part[0] in PROGRAMS and not elided and not output:
            yield tuple(filled(word) for word in part)


def split(words: list[str]) -> Iterator[list[str]]:
    """At `&&`, `;` and redirections."""
    part: list[str] = []
    for word in words:
        if word in ("&&", "||", "|", ">", ";"):
            yield part
            part = []
        elif word.endswith(";"):
            yield [*part, word[:-1]]
            part = []
        else:
            part.append(word)
    yield part


def filled(word: str) -> str:
    """A word with what stands for something of the reader's own replaced."""
    word = word.replace("$c", STAND_INS["$c"])
    return STAND_INS.get(word, word)


def documented() -> list[Line]:
    """Of all pages, and of the help of every command."""
    texts = {str(page.relative_to(ROOT)): page.read_text() for page in PAGES}
    for name, (module, _) in cli.COMMANDS.items():
        source = (ROOT / (module.replace(".", "/") + ".py")).read_text()
        texts[f"bst {name} --help"] = ast.get_docstring(ast.parse(source)) or ""
    return [line for page, text in texts.items() for line in lines_of(page, text)]


@pytest.fixture(autouse=True)
def in_the_project(monkeypatch):
    monkeypatch.chdir(ROOT)


@pytest.mark.parametrize("line", documented(), ids=str)
def test_a_documented_command_is_accepted(line):
    program, *words = line.words
    {"bst": accept_bst, "make": accept_make, "deepspeed": accept_deepspeed}[program](line, words)
    for word in words:
        path = word.rpartition("=")[2]
        if path.startswith(("launch/", "ds_configs/", "docs/", "tests/", "bst_dist/")):
            assert (ROOT / path).exists(), f"{line}: there is no {path}"


def accept_bst(line: Line, words: list[str]) -> None:
    name = next((name for name in (" ".join(words[:2]), words[0]) if name in cli.COMMANDS), None)
    if name is None:
        assert (words[0] in cli.GROUPS and len(words) == 1) or words == ["--version"], f"{line}: no such command"
        return
    rest = words[len(name.split()) :]
    args = parsed(cli.parser_of(name), rest, line) if rest != ["--help"] else None
    if args is not None:
        accept_settings(args, line)


def parsed(parser: argparse.ArgumentParser, words: list[str], line: Line) -> argparse.Namespace | None:
    """The arguments; None when text leaves out what must be given; fails when they are refused."""

    def refuse(message: str) -> None:
        raise argparse.ArgumentTypeError(message)

    parser.error = refuse  # type: ignore[method-assign, assignment]
    try:
        return parser.parse_intermixed_args(words)
    except argparse.ArgumentTypeError as error:
        if line.in_text and re.search("are required|expected .* argument", str(error)):
            return None
        pytest.fail(f"{line}: {error}")


def accept_settings(args: argparse.Namespace, line: Line) -> None:
    """The overrides fit the recipe, the sweep or whatever it is that the command reads."""
    overrides = getattr(args, "overrides", None) or getattr(args, "override", None) or []
    if hasattr(args, "recipe"):
        recipe = load_recipe(args.recipe, overrides)
        assert deepspeed_file(recipe).exists(), f"{line}: there is no {recipe.deepspeed}"
    elif hasattr(args, "sweep"):
        load_sweep(args.sweep, overrides)
    elif hasattr(args, "experiment"):
        load_experiment(args.experiment, overrides)
    elif hasattr(args, "config"):
        load(PrepareConfig, args.config, overrides)
    elif hasattr(args, "task") and args.task in SETTINGS:
        settings(args.task, overrides)
    else:
        load_recipe(RECIPE, overrides)  # of a run that the reader has


def accept_make(line: Line, words: list[str]) -> None:
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    variables = re.findall(r"^(\w+) *\?=", (ROOT / "Makefile").read_text(), re.MULTILINE)
    for word in words:
        assert word in targets or word.partition("=")[0] in variables, f"{line}: make has no {word}"


def accept_deepspeed(line: Line, words: list[str]) -> None:
    from deepspeed.launcher.runner import parse_args

    if line.in_text and "bst_dist.train" not in words:
        return
    args = parse_args(words)
    assert (args.module, args.user_script) == (True, "bst_dist.train"), str(line)
    parser = argparse.ArgumentParser()
    add_program_arguments(parser)
    given = parsed(parser, args.user_args, line)
    if given is not None:
        accept_settings(given, line)


def test_slips_are_found():
    """The test itself: what is wrong must not pass."""
    page = """
```
$ bst train launch/recipes/demo.yaml --resumed
bst trian launch/recipes/demo.yaml   # doesn't exist
bst train launch/recipes/demo.yaml train.stepz=3
bst train launch/recipes/none.yaml && bst train launch/recipes/demo.yaml deepspeed=ds_configs/none.json
bst data prepare launch/data/stdlib.yaml \\
    tokenizer.vocabulary=4
make cake
deepspeed --hostfile hosts --module bst_dist.train launch/recipes/demo.yaml --fast
bst launch: not started: node-02
```
Inside text: `bst evaluate runs/demo`, and `bst train --nodes N --nod I`, but not `bst train` or `bst train --nodes N`.
"""
    lines = list(lines_of("page", page))
    assert [line.number for line in lines] == [3, 4, 5, 6, 6, 7, 9, 10, 13, 13, 13, 13]
    for line in lines[:-2]:
        with pytest.raises((AssertionError, UserError, pytest.fail.Exception, SystemExit)):
            test_a_documented_command_is_accepted(line)
    for line in lines[-2:]:
        test_a_documented_command_is_accepted(line)
