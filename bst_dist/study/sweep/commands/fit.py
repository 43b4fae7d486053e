"""Fit scaling laws to the table of a sweep.

    bst sweep fit launch/sweeps/mini.yaml

Fits three forms with two objectives. Prints intervals from resampling runs, errors on left-out shapes and sizes, the
prediction of the held-out size, the best model for a budget, and one E for architectures that are shown to share it;
local slopes where the data do not identify a law. `bst law fit` does the same for your own table.
"""

from __future__ import annotations

import argparse
from typing import Any

from bst_base.arguments import at_least
from bst_dist.study.laws.scaling import fit_laws
from bst_dist.study.report import laws
from bst_dist.study.report.formatting import plain
from bst_dist.study.report.terminal import show
from bst_dist.study.sweep.commands.common import add_sweep, open_table
from bst_dist.study.sweep.table import observations


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_sweep(parser)
    parser.add_argument(
        "--draws",
        type=at_least(2),
        default=200,
        metavar="N",
        help="number of bootstrap resamples for the intervals (default: %(default)s)",
    )


def run(args: argparse.Namespace) -> dict[str, Any]:
    sweep, rows = open_table(args)
    found = fit_laws(observations(rows), sweep.baseline, sweep.arm, args.draws)
    show(laws.blocks(found, sweep.baseline))
    return plain(found)
