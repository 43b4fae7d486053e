"""Show where the runs of a sweep stand.

    bst sweep status launch/sweeps/mini.yaml

Failed and diverged runs are listed with their reason: they stay in the table and are never dropped.
"""

from __future__ import annotations

import argparse
from collections import Counter
from typing import Any

from bst_dist.study.report.document import Sheet
from bst_dist.study.report.terminal import open_console, say, table
from bst_dist.study.sweep.commands.common import add_sweep, open_plan

add_arguments = add_sweep
STATUSES = ("done", "running", "waiting", "failed", "diverged")


def run(args: argparse.Namespace) -> dict[str, Any]:
    plan, state = open_plan(args)
    standings = [(run, state.standing(run)) for run in plan.runs]
    rows = []
    for name in dict.fromkeys(run.cell.architecture for run in plan.runs):
        counts = Counter(standing.status for run, standing in standings if run.cell.architecture == name)
        rows.append([name, *(str(counts[status]) for status in STATUSES)])
    open_console().print(table(Sheet(("architecture", *STATUSES), rows), f"{plan.sweep.name}: runs, trunks included"))
    for run, standing in standings:
        if standing.status == "running":
            line = state.progress(run.name)
            say(f"running   {run.name}: step {line['step'] if line else 0} of {run.recipe.train.steps}")
        elif standing.status in ("failed", "diverged"):
            say(f"{standing.status:<9} {run.name}: {standing.reason}")
    done = sum(run.own_flops for run, standing in standings if standing.status == "done")
    total = sum(run.own_flops for run in plan.runs)
    say(f"{done / total:.0%} of {total:.3g} FLOPs are done")
    return {
        "runs": dict(Counter(standing.status for _, standing in standings)),
        "flops_done": done,
        "flops": total,
        "not_finished": {run.name: s.status for run, s in standings if s.status != "done"},
    }
