"""Arguments and inputs shared by the `bst sweep` commands."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from bst_base.shipped import SWEEPS
from bst_dist.study.runs.command import Study, add_file
from bst_dist.study.runs.state import State
from bst_dist.study.sweep.config import SweepConfig, load_sweep
from bst_dist.study.sweep.plan import Plan, make_plan
from bst_dist.study.sweep.table import Row, TableError, read

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
    """Load the sweep and the table that `bst sweep collect` wrote.

    Raises TableError for the table of another sweep: one without the arm of the verdict or without the baseline.
    """
    sweep = open_sweep(args)
    path = sweep.root / TABLE
    rows = read(path)
    _require(path, "arms", sweep.arm, [row.arm for row in rows])
    _require(path, "architectures", sweep.baseline, [row.architecture for row in rows])
    return sweep, rows


def _require(path: Path, what: str, wanted: str, found: Sequence[str]) -> None:
    if wanted not in found:
        names = ", ".join(dict.fromkeys(found)) or "none"
        raise TableError(
            f"{path}: {wanted} is not among its {what} ({names}): give the settings that it was "
            "collected with, or run `bst sweep collect` again"
        )
