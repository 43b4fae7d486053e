"""Which architecture is ahead, and does its advantage grow or shrink with depth and compute?

    bst sweep compare launch/sweeps/mini.yaml
    bst sweep compare launch/sweeps/mini.yaml --at time_s

The advantage is ln L_baseline - ln L_variant of paired runs, in per cent of the loss; above 0 the variant is better.
The verdict follows the rule that docs/sweeps.md explains (bst_dist/study/laws/verdict.py).
"""

from __future__ import annotations

import argparse
from typing import Any

from bst_dist.study.laws.advantage import compare
from bst_dist.study.laws.audit import audit
from bst_dist.study.report import advantage
from bst_dist.study.report.document import Paragraph
from bst_dist.study.report.formatting import plain
from bst_dist.study.report.terminal import show
from bst_dist.study.sweep.caveats import caveats, counted
from bst_dist.study.sweep.commands.common import add_sweep, open_table
from bst_dist.study.sweep.table import observations


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_sweep(parser)
    parser.add_argument(
        "--at", choices=("flops", "time_s"), default="flops", help="quantity at which models are compared"
    )


def run(args: argparse.Namespace) -> dict[str, Any]:
    sweep, rows = open_table(args)
    observed = observations(rows)
    found = compare(observed, sweep.baseline, sweep.arm, args.at)
    limits = [Paragraph(f"{counted(rows)}."), *caveats(rows, audit(observed))]
    show([*advantage.answer(found), *limits, *advantage.tables(found), *advantage.held_out(found)])
    return {**plain(found), "caveats": [limit.text for limit in limits]}
