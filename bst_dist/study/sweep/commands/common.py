"""Arguments and inputs shared by the `bst sweep` commands."""

from __future__ import annotations

import argparse

from bst_base.shipped import SWEEPS
from bst_dist.study.runs.command import Study, add_file
from bst_dist.study.runs.state import State
from bst_dist.study.sweep.config import SweepConfig, load_sweep
from bst_dist.study.sweep.plan import Plan, make_plan
from bst_dist.study.sweep.table import Row, read

TABLE = "table.json"


def add_sweep(parser: argparse.ArgumentParser) -> None:
    """Add the arguments for the sweep's file and for settings that override it."""
    add_file(parser, "sweep", SWEEPS)


def open_sweep(args: argparse.Namespace) -> SweepConfig:
    """Load the sweep that the arguments name."""
    return load_sweep(args.file, args.overrides)


def open_plan(args: argparse.Namespace) -> tuple[Plan, Study]:
    """Make the plan of the sweep that the arguments name, and the study that trains its runs."""
    sweep = open_sweep(args)
    plan = make_plan(sweep)
    return plan, Study("sweep", sweep.name, plan.runs, State(sweep.root, sweep.retries))


def open_table(args: argparse.Namespace) -> tuple[SweepConfig, list[Row]]:
    """Load the sweep and the table that `bst sweep collect` wrote."""
    sweep = open_sweep(args)
    return sweep, read(sweep.root / TABLE)
