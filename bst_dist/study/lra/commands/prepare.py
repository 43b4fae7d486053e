"""Prepare a task of the Long Range Arena: draw its examples, or read the published files.

    bst lra prepare listops
    bst lra prepare listops train=20000 max_depth=6 min_length=100 max_length=400 --to corpora/lra/listops-400
    bst lra prepare pathfinder size=128 --to corpora/lra/pathfinder-x
    bst lra prepare text source=downloads/aclImdb
    bst lra prepare retrieval source=downloads/lra_release/tsv_data
    bst lra prepare image source=downloads/cifar-10-batches-py
    bst lra prepare listops source=downloads/lra_release/listops-1000
    bst lra prepare pathfinder source=downloads/lra_release/pathfinder32

ListOps and Pathfinder are drawn, by their published definitions and in the published numbers; the same settings always
give the same examples. With `source` they are read from the benchmark's released files instead. The others are always
read from files that you have downloaded. `bst lra prepare TASK --settings` lists a task's settings.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from rich.console import Console

from bst_base.arguments import at_least
from bst_base.settings import ConfigError, fields, parse, split_override
from bst_base.terminal import Sheet, print_table
from bst_dist.study.lra.prepare import SETTINGS, TaskConfig, prepare
from bst_dist.study.lra.tasks import TASKS
from data_pipeline.commands.progress import stages
from data_pipeline.prepare.parallel import open_workers


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("task", metavar="TASK", help=", ".join(SETTINGS))
    parser.add_argument("overrides", nargs="*", metavar="setting=value", help="settings that differ from the defaults")
    parser.add_argument("--to", type=Path, metavar="DIR", help="where the examples go (default: corpora/lra/TASK)")
    parser.add_argument("--workers", type=at_least(1), metavar="N", help="processes that draw (default: all CPUs)")
    parser.add_argument("--settings", action="store_true", help="list the task's settings, and do nothing")


def run(args: argparse.Namespace) -> dict[str, Any] | None:
    """Prepare; the report is the manifest."""
    console = Console()
    if args.task not in SETTINGS:
        raise ConfigError(f"unknown task {args.task!r}; the tasks are {', '.join(SETTINGS)}")
    if args.settings:
        _list_settings(console, args.task)
        return None
    config = settings(args.task, args.overrides)
    directory = args.to or Path("corpora/lra") / args.task
    with open_workers(args.workers) as workers, stages(console) as told:
        if workers is None:
            return None
        manifest = prepare(config, directory, workers, told)
    _show(directory, manifest)
    return {"directory": str(directory), **manifest}


def settings(task: str, overrides: list[str]) -> TaskConfig:
    """The settings of a task, with overrides ``setting=value``; raises ConfigError."""
    data: dict[str, Any] = {}
    for override in overrides:
        key, value = split_override(override, "setting=value")
        data[key] = value
    return parse(SETTINGS[task][-1 if "source" in data else 0], data, where=f"bst lra prepare {task}")


def _list_settings(console: Console, task: str) -> None:
    for place, cls in enumerate(SETTINGS[task]):
        if place:
            console.print("", "with released files instead of drawn examples:", sep="\n")
        for name, _, default, meaning in fields(cls):
            if name != "task":
                console.print(f"{name} = {default}", f"  {meaning}", sep="\n", markup=False, highlight=False)


def _show(directory: Path, manifest: dict[str, Any]) -> None:
    rows = []
    for split, part in manifest["splits"].items():
        count, largest = part["examples"], max(part["class_counts"])
        mean = f"{part['symbols'] / (count * TASKS[manifest['task']].sequences):,.0f}"
        rows.append([split, f"{count:,}", mean, f"{part['longest']:,}", f"{largest / count:.1%}"])
    columns = ("split", "examples", "mean length", "longest", "largest class")
    print_table(Sheet(columns, rows), f"{directory}: {manifest['task']}")
