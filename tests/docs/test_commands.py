"""Every command line of the documentation is accepted by the real parsers, recipes and files, and most are run.

Checks README.md, all Markdown in docs/, ds_configs/ and launch/, and the help of every command. It finds command lines
in code blocks and inside the text.
"""

from __future__ import annotations

import argparse
import ast
import heapq
import os
import re
import shlex
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from bst_base.errors import UserError
from bst_base.settings import load
from bst_dist import cli
from bst_dist.config import deepspeed_file, load_recipe
from bst_dist.study.experiment.config import load_experiment
from bst_dist.study.lra.commands.prepare import SETTINGS, settings
from bst_dist.study.sweep.config import load_sweep
from bst_dist.train.__main__ import add_arguments as add_program_arguments
from data_pipeline.prepare.config import PrepareConfig

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted(
    [ROOT / "README.md", *(path for part in ("docs", "ds_configs", "launch") for path in (ROOT / part).rglob("*.md"))]
)
PAGES.remove(ROOT / "docs" / "first-hour.md")  # has its own files, and mistakes: test_first_hour.py
PROGRAMS = ("bst", "make", "deepspeed")
# Placeholders for the reader's own files, and their replacements in this test.
RECIPE = "launch/recipes/demo.yaml"
STAND_INS = {
    "N": "2",
    "I": "1",
    "L": "128",
    "K": "2",
    "STEP": "1",
    "SECONDS": "3",
    "ADDRESS:PORT": "node-00:29500",
    "PATH": "x.json",
    "COMMAND": "train",
    "GROUP": "data",
    "KIND": "folder",
    "TASK": "listops",
    "RUN": "runs/demo",
    "RUN/reports/eval.json": "runs/demo/reports/eval.json",
    "FILE": "hosts",
    "$c": "stdlib",
    "SWEEP": "launch/sweeps/mini.yaml",
    "CONFIG": "launch/data/stdlib.yaml",
}
RECIPES = ("RECIPE", "recipe.yaml", "my-recipe.yaml", "/shared/my-recipe.yaml")


@dataclass(frozen=True)
class Line:
    """One command line of a page."""

    page: str
    number: int
    words: tuple[str, ...]
    in_text: bool
    """Whether it is inside the text; then required arguments may be missing."""

    def __str__(self) -> str:
        return f"{self.page}:{self.number}: {shlex.join(self.words)}"


def lines_of(page: str, text: str) -> Iterator[Line]:
    """Yield all command lines of a page, without mere names of commands in its text."""
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
    """Yield the commands of our programs in a shell line, each as words from the program's name on."""
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
            yield tuple(part)


def split(words: list[str]) -> Iterator[list[str]]:
    """Split words at `&&`, `||`, `|`, `;` and redirections."""
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


def filled(line: Line, recipe: str) -> list[str]:
    """Return the words after the program's name, with placeholders replaced."""
    stand_ins = STAND_INS | dict.fromkeys(RECIPES, recipe)
    return [stand_ins.get(word, word.replace("$c", stand_ins["$c"])) for word in line.words[1:]]


def documented() -> list[Line]:
    """Return the command lines of all pages, and of the help of every command."""
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
    program, words = line.words[0], filled(line, RECIPE)
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
    """Return the parsed arguments; None if a command in the text lacks required ones. Fail if they are refused."""

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
    """Check that the overrides fit the recipe, sweep or other file that the command reads."""
    overrides = getattr(args, "overrides", None) or getattr(args, "override", None) or []
    if hasattr(args, "recipe"):
        of_run = str(args.recipe).startswith("runs/") and args.resume  # the recipe of a run of the reader's
        recipe = load_recipe(RECIPE if of_run else args.recipe, overrides)
        assert deepspeed_file(recipe).exists(), f"{line}: there is no {recipe.deepspeed}"
    elif hasattr(args, "file"):
        (load_sweep if "sweep" in line.words else load_experiment)(args.file, overrides)
    elif hasattr(args, "config"):
        load(PrepareConfig, args.config, overrides)
    elif hasattr(args, "task") and args.task in SETTINGS:
        settings(args.task, overrides)
    else:
        load_recipe(RECIPE, overrides)  # for a run of the reader's


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


def test_wrong_command_lines_are_detected():
    """Tests this test: wrong command lines must not pass."""
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


# Commands that are not run here, and the reason.
LEFT_OUT = {
    r"make ": "installs, or takes minutes: CI does it",
    r"deepspeed ": "needs the hosts of a cluster: tests/train/test_launch.py",
    r"bst launch .*--launcher slurm": "needs an allocation of Slurm: tests/cluster/test_slurm.py",
    r"bst train .*--(nodes|ranks [48])": "needs more hosts or cores: tests/cluster, tests/checkpoint/test_elastic.py",
    r"bst bench ": "measures, for minutes to hours",
    r"bst train runs/demo": "continues a run that others read: tests/train/start/test_bad_input.py, test_changes.py",
    r"bst ckpt (push|pull) ": "needs an object store: tests/checkpoint/test_object_copy.py",
    r"bst train .*branch.run": "leaves from a checkpoint of a real run: tests/train/start/test_branch.py",
    r"bst train .*initial_weights": "of the demo's own last step: tests/train/start/test_initial_weights.py",
    r"bst data prepare (/|.*/data/(books|latex|linux|mathematics)|.*output=/)": "fetches packages, writes elsewhere",
    r"bst data push ": "needs an object store: tests/data_pipeline/store/test_push.py",
    r"bst data prepare .*continues=": "of a source that has grown: tests/data_pipeline/prepare/test_growth.py",
    r"bst data prepare .*path/to/": "of the reader's own: tests/data_pipeline/prepare/test_prepare.py",
    r"bst verify .*--": "minutes on many ranks: tests/verify",
    r"bst sweep (run|status|collect|fit|compare|report|coordinates|plan.*--measure)": "trains a sweep: tests/study",
    r"bst sweep pack ": "packs a corpus of its own: tests/study/pack",
    r"bst law fit ": "resamples for minutes, or reads a table of your own: tests/study/test_law_fit.py",
    r"bst sweep .*/(cluster|text).yaml": "counts hundreds of shapes: tests/study/sweep",
    r"bst plan .*--(nodes 1,8,64|slices|longest)": "plans many clusters, sizes or lengths: tests/plan",
    r"bst plan .*--from-run": "needs a run on such devices: tests/plan/test_measured.py",
    r"bst experiment (run|report|status)": "trains an experiment: tests/study/experiment",
    r"bst (lra |train .*/lra/)": "draws and trains a task in full: tests/study/lra",
    r"bst doctor": "tests/tools/doctor",
    r"bst generate .*(--interactive|--prompts -)": "reads what is typed: tests/study/evaluation/test_generate.py",
    r"bst train .*log.writers": "reaches for services: tests/report/test_writers.py",
    r"bst (eval|export) .*--averaged": "of a run with train.average: tests/train/test_average.py",
    r"bst (export .*--push|import me/)": "reaches for the hub: tests/hub/test_repository.py",
    r"bst train .*slice_tokens": "slices longer than the sequences here: tests/train/test_slices.py",
    r"bst eval .*--(harness|lengths .*65536)": "needs tasks of the reader, much text: tests/study/evaluation",
}


def runnable() -> list[Line]:
    """Return the complete commands that are not in LEFT_OUT, each once."""
    whole: dict[str, Line] = {}
    for line in documented():
        if not line.in_text:
            whole.setdefault(" ".join(filled(line, "my-recipe.yaml")), line)
    found = [line for line in whole.values() if "--help" not in line.words]
    return [line for line in found if not any(re.match(pattern, " ".join(line.words)) for pattern in LEFT_OUT)]


@pytest.mark.parametrize("pattern", LEFT_OUT)
def test_every_exclusion_matches_a_documented_command(pattern):
    assert any(re.match(pattern, " ".join(line.words)) for line in documented())


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """A directory with small copies of the project's recipes, a corpus, runs, and other files that commands name."""
    here = tmp_path_factory.mktemp("project")
    for part in ("launch", "ds_configs"):
        shutil.copytree(ROOT / part, here / part)
    demo = shrunk(yaml.safe_load((here / RECIPE).read_text()))
    (here / RECIPE).write_text(yaml.safe_dump(demo))
    for section in ("train", "evaluation"):  # for the 16 ranks of the hosts below
        demo[section]["sequences"] = 64
    (here / "my-recipe.yaml").write_text(yaml.safe_dump(demo | {"name": "own"}))
    (here / "texts").mkdir()
    for module in sorted(Path(heapq.__file__).parent.glob("[a-d]*.py"))[:25]:
        (here / "texts" / module.name).write_text(module.read_text()[:8000])
    (here / "texts" / "json").write_text("import json\n")
    prepare = {
        "source": {"kind": "folder", "path": "texts", "pattern": "*"},
        "output": "corpora/stdlib",
        "tokenizer": {"vocab_size": 400},
        "workers": 1,
        "validation_fraction": 0.3,
    }
    (here / "launch/data/stdlib.yaml").write_text(yaml.safe_dump(prepare))
    synthetic = yaml.safe_load((here / "launch/data/synthetic.yaml").read_text())
    synthetic["source"] |= {"documents": 40}
    (here / "launch/data/synthetic.yaml").write_text(yaml.safe_dump(synthetic | {"workers": 1}))
    (here / "hosts").write_text("node-01 slots=8\nnode-02 slots=8\n")
    (here / "prompts.jsonl").write_text('"def f(x):"\n')
    (here / "pdsh").touch(mode=0o755)
    known = yaml.safe_load((ROOT / "bst_dist/plan/accelerators.yaml").read_text())
    (here / "devices.yaml").write_text(yaml.safe_dump({"ours": next(iter(known.values()))}))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(here)
        assert cli.main(["data", "prepare", "launch/data/stdlib.yaml"]) == 0
        larger = ["output=corpora/stdlib-512", "tokenizer.vocab_size=512"]
        assert cli.main(["data", "prepare", "launch/data/stdlib.yaml", *larger]) == 0
        assert cli.main(["data", "prepare", "launch/data/synthetic.yaml"]) == 0
        assert cli.main(["train", RECIPE]) == 0
        assert (
            cli.main(["train", "launch/recipes/diagnostics/base.yaml", "train.steps=1", "schedule.warmup_steps=0"]) == 0
        )
        assert cli.main(["export", "runs/demo", "demo-model"]) == 0
    for corpus in ("corpora/large", "data/stdlib"):
        shutil.copytree(here / "corpora/stdlib", here / corpus)
    for name in ("other", "bst", "sliding", "longer", "demo-uninterrupted"):
        shutil.copytree(here / "runs/demo", here / "runs" / name)
    return here


def shrunk(settings: dict[str, Any]) -> dict[str, Any]:
    """Return a recipe with the same kind of model that trains in seconds."""
    model, train = settings["model"], settings["train"]
    model |= {"width": 16, "heads": 2, "ffn": 32, "block": 16, "ssm": {"state": 4, "chunk": 16}}
    train |= {"sequence_length": 64, "sequences": 1, "micro_sequences": 1, "precision": "fp32"}
    sections = {
        "evaluation": {"every": 80, "sequences": 1},
        "checkpoint": {"every": 80},
        "schedule": {},
        "data": {"corpus": "corpora/stdlib"},
        "ranks": 1,
        "watchdog": {},
    }
    return {**settings, **sections}


@pytest.mark.ranks
@pytest.mark.parametrize("line", runnable(), ids=str)
def test_a_documented_command_runs(line, project, monkeypatch, tmp_path):
    monkeypatch.chdir(project)
    monkeypatch.setenv("PATH", f"{project}:{os.environ['PATH']}")
    words = [re.sub("^/(shared|data)/", rf"{project}/\1/", word) for word in filled(line, "my-recipe.yaml")]
    if words[0] == "launch":
        words.append("--dry-run")
    if words[0] == "train" and words[1:] != [RECIPE, "--resume"]:
        words += ["train.steps=4", "schedule.warmup_steps=0", "--run-dir", str(tmp_path / "run")]
    for option, least in (("--lengths", 16), ("--needle", 128)):  # the corpus and the block are small
        if option in words and words[0] == "eval":
            lengths = words[words.index(option) + 1]
            words[words.index(lengths)] = ",".join(str(max(least, int(length) // 16)) for length in lengths.split(","))
    outputs = {"exported", "out", "runs/imported", *(["demo-model"] if words[0] == "export" else [])}
    for output in outputs:  # must not exist, but another example has written it
        if output in words:
            shutil.rmtree(project / output, ignore_errors=True)
    assert cli.main(words) == 0
