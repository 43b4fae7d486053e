"""What the commands about a sweep have in common."""

from __future__ import annotations

import argparse
from pathlib import Path

from bst_dist.study.runs.state import State
from bst_dist.study.sweep.config import SweepConfig, load_sweep
from bst_dist.study.sweep.plan import Plan, make_plan
from bst_dist.study.sweep.table import Row, read

TABLE = "table.json"


def add_sweep(parser: argparse.ArgumentParser) -> None:
    """The sweep's file and settings that differ from it."""
    parser.add_argument(
        "sweep", type=Path, metavar="SWEEP", help="the sweep's YAML file, or the name of one of launch/sweeps/"
    )
    parser.add_argument("overrides", nargs="*", metavar="section.field=value", help="settings that differ from it")


def open_sweep(args: argparse.Namespace) -> SweepConfig:
    """The sweep that the arguments name."""
    return load_sweep(args.sweep, args.overrides)


def open_plan(args: argparse.Namespace) -> tuple[Plan, State]:
    """Its plan, and where its runs stand."""
    sweep = open_sweep(args)
    return make_plan(sweep), State(sweep.root, sweep.retries)


def open_table(args: argparse.Namespace) -> tuple[SweepConfig, list[Row]]:
    """The sweep with the table that `collect` wrote."""
    sweep = open_sweep(args)
    return sweep, read(sweep.root / TABLE)
