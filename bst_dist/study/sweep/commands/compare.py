"""Which architecture is ahead, and does its advantage grow or shrink? The verdict by the rule of laws/verdict.py.

    bst sweep compare launch/sweeps/mini.yaml
    bst sweep compare launch/sweeps/mini.yaml --at time_s

The advantage is ln L_baseline - ln L_variant of paired runs, in per cent of the loss; above 0 the variant is better.
"""

from __future__ import annotations

import argparse
from typing import Any

from bst_dist.study.laws.advantage import compare
from bst_dist.study.report import advantage
from bst_dist.study.report.terminal import show
from bst_dist.study.report.words import plain
from bst_dist.study.sweep.commands.common import add_sweep, open_table
from bst_dist.study.sweep.table import observations


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_sweep(parser)
    parser.add_argument(
        "--at", choices=("flops", "time_s"), default="flops", help="quantity at which models are compared"
    )


def run(args: argparse.Namespace) -> dict[str, Any]:
    sweep, rows = open_table(args)
    found = compare(observations(rows), sweep.baseline, sweep.arm, args.at)
    show([*advantage.answer(found), *advantage.tables(found), *advantage.held_out(found)])
    return plain(found)
