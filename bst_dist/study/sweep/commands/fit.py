"""Fit scaling laws to the table of a sweep.

    bst sweep fit launch/sweeps/mini.yaml

Three forms, two objectives; errors by resampling runs; shapes and the largest size left out; the size that was held out
predicted; the best model for a budget; one E for the architectures shown to have the same. Where a law is not
identified, local slopes stand in its place. `bst law fit` does the same for a table of your own.
"""

from __future__ import annotations

import argparse
from typing import Any

from bst_dist.study.laws.scaling import fit_laws
from bst_dist.study.report import laws
from bst_dist.study.report.terminal import show
from bst_dist.study.report.words import plain
from bst_dist.study.sweep.commands.common import add_sweep, open_table
from bst_dist.study.sweep.table import observations


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_sweep(parser)
    parser.add_argument("--draws", type=int, default=200, metavar="N", help="resamples (default: %(default)s)")


def run(args: argparse.Namespace) -> dict[str, Any]:
    sweep, rows = open_table(args)
    found = fit_laws(observations(rows), sweep.baseline, sweep.arm, args.draws)
    show(laws.blocks(found, sweep.baseline))
    return plain(found)
