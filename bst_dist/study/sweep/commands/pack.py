"""Pack a sweep into one folder, to train on a machine that has torch but neither a network nor this program.

    bst sweep pack launch/sweeps/gpu.yaml --minutes 20
    cd packs/gpu && ./run.sh --minutes 9 --out results
    bst sweep collect launch/sweeps/gpu.yaml --from packs/gpu/results

The folder holds the code, the corpora and, as wheels, what training needs besides torch and numpy. Runs are ordered by
value: each next stratum of the grid is the one that narrows the two changes of the verdict most for its time, so any
amount of time is used well. run.sh trains for the given minutes, several runs side by side on each GPU; when started
again, it continues. It leaves a table, the metrics and a log in at most eight files of at most 16 MB. From `--minutes`,
the total time, this command predicts how far the sweep will get.
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import Any

from bst_base.errors import UserError
from bst_base.terminal import say
from bst_dist.study.pack.folder import make, size_of
from bst_dist.study.pack.wheels import HERE
from bst_dist.study.sweep.commands.common import add_sweep, open_plan
from bst_dist.study.sweep.rehearsal import rehearse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_sweep(parser)
    parser.add_argument(
        "--minutes",
        type=float,
        default=20.0,
        metavar="N",
        help="total training time on that machine (default: %(default)s)",
    )
    parser.add_argument("--output", type=Path, metavar="DIR", help="folder to write (default: packs/<name>)")
    parser.add_argument("--python", nargs="+", default=[HERE], metavar="X.Y", help="Python versions of that machine")
    parser.add_argument("--most-mb", type=float, default=60.0, metavar="MB", help="maximum size of the folder")


def run(args: argparse.Namespace) -> dict[str, Any]:
    for python in args.python:
        if not re.fullmatch(r"3\.\d+", python):
            raise UserError(f"--python {python}: give it as 3.12")
    plan, _ = open_plan(args)
    rehearse(plan.sweep, plan.runs)
    folder = args.output or Path("packs") / plan.sweep.name
    pack = make(plan.sweep, plan.runs, folder, args.minutes, args.python, int(args.most_mb * 1e6))
    strata = list(dict.fromkeys(run["known"]["stratum"] for run in pack.runs[: pack.expected] if run["known"]))
    say(
        f"{folder}: {size_of(folder) / 1e6:.1f} MB; {len(pack.runs)} runs, of which {pack.expected} are expected in "
        f"{args.minutes:g} minutes at {plan.sweep.budget.flops_per_s:.3g} FLOP/s, in this order:"
    )
    for stratum in strata:
        say(f"  {stratum}")
    say("on the other machine: ./run.sh --minutes 9 --out results, as often as there is time")
    return {
        "folder": str(folder),
        "bytes": size_of(folder),
        "runs": len(pack.runs),
        "expected": pack.expected,
        "strata": strata,
    }
