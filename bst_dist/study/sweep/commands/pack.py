"""Put a sweep into one folder that a machine with torch, without network and without this program, can train.

    bst sweep pack launch/sweeps/gpu.yaml --minutes 20
    cd packs/gpu && ./run.sh --minutes 9 --out results
    bst sweep collect launch/sweeps/gpu.yaml --from packs/gpu/results

In the folder are the code, the corpora and, as wheels, what training needs beside torch and numpy. The runs stand in
the order of their value: each next block of the grid is the one that narrows the two changes of the verdict most for
its time, so whatever time there is is used well. run.sh trains for the minutes that it is given, several runs side by
side on each GPU, continues when it is given again, and leaves a table, the metrics and a log in at most eight files of
at most 16 MB. `--minutes` says how long that will be in all, from which the command says how far it will come.
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
    parser.add_argument("--minutes", type=float, default=20.0, metavar="N",
                        help="that the machine will train, in all (default: %(default)s)")  # fmt: skip
    parser.add_argument("--output", type=Path, metavar="DIR", help="the folder (default: packs/<name>)")
    parser.add_argument("--python", nargs="+", default=[HERE], metavar="X.Y", help="Pythons of the machine")
    parser.add_argument("--most-mb", type=float, default=60.0, metavar="MB", help="largest size of the folder")


def run(args: argparse.Namespace) -> dict[str, Any]:
    for python in args.python:
        if not re.fullmatch(r"3\.\d+", python):
            raise UserError(f"--python {python}: give it as 3.12")
    plan, _ = open_plan(args)
    rehearse(plan.sweep, plan.runs)
    folder = args.output or Path("packs") / plan.sweep.name
    pack = make(plan.sweep, plan.runs, folder, args.minutes, args.python, int(args.most_mb * 1e6))
    blocks = list(dict.fromkeys(run["known"]["block"] for run in pack.runs[: pack.expected] if run["known"]))
    say(f"{folder}: {size_of(folder) / 1e6:.1f} MB; {len(pack.runs)} runs, of which {pack.expected} are expected in "
        f"{args.minutes:g} minutes at {plan.sweep.budget.flops_per_s:.3g} FLOP/s, in this order:")  # fmt: skip
    for block in blocks:
        say(f"  {block}")
    say("on the other machine: ./run.sh --minutes 9 --out results, as often as there is time")
    return {"folder": str(folder), "bytes": size_of(folder), "runs": len(pack.runs), "expected": pack.expected,
            "blocks": blocks}  # fmt: skip
