"""Gather the results of a sweep into one table, from its run directories.

    bst sweep collect launch/sweeps/mini.yaml

Writes table.json and table.csv into the sweep's directory, with one row per measurement, whether finished, waiting,
failed or diverged. --documents TOKENS also evaluates every finished run on the first TOKENS of each validation
document. --from DIR first unpacks the results of a `bst sweep pack` folder into the sweep's directory: DIR is what its
run.sh wrote.
"""

from __future__ import annotations

import argparse
from collections import Counter
from pathlib import Path
from typing import Any

from bst_base.arguments import at_least
from bst_base.errors import UserError
from bst_base.terminal import say
from bst_dist.study.pack.results import restore
from bst_dist.study.sweep import table
from bst_dist.study.sweep.collect import collect
from bst_dist.study.sweep.commands.common import TABLE, add_sweep, open_plan


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_sweep(parser)
    parser.add_argument(
        "--documents",
        type=at_least(1),
        default=0,
        metavar="TOKENS",
        help="also score the first TOKENS of each validation document",
    )
    parser.add_argument(
        "--from", type=Path, metavar="DIR", dest="packed", help="results of a packed folder, to unpack first"
    )


def run(args: argparse.Namespace) -> dict[str, Any]:
    plan, study = open_plan(args)
    if args.packed is not None:
        names = {run.name for run in plan.runs}
        found = restore(args.packed, study.state, names.__contains__)
        say(f"{args.packed}: {len(found)} new runs")
        if not any(study.state.directory(name).exists() for name in names):
            raise UserError(
                f"{args.packed}: none of its runs belongs to this sweep: give the settings that it was packed with"
            )
    rows = collect(plan.runs, study.state, plan.sweep.baseline, args.documents)
    path = plan.sweep.root / TABLE
    table.write(rows, path)
    table.write_csv(rows, path.with_suffix(".csv"))
    counts = Counter(row.status for row in rows)
    say(f"{path}: {len(rows)} rows, " + ", ".join(f"{number} {status}" for status, number in counts.items()))
    return {"table": str(path), "rows": dict(counts)}
