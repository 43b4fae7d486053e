"""Gather the results of a sweep into one table, from its run directories.

    bst sweep collect launch/sweeps/mini.yaml

Writes table.json into the sweep's directory: a row a measurement, those that wait, failed or diverged included.
"""

from __future__ import annotations

import argparse
from collections import Counter
from typing import Any

from bst_dist.sweep import table
from bst_dist.sweep.collect import collect
from bst_dist.sweep.commands.common import TABLE, add_sweep, open_plan, say

add_arguments = add_sweep


def run(args: argparse.Namespace) -> dict[str, Any]:
    plan, state = open_plan(args)
    rows = collect(plan.runs, state)
    path = plan.sweep.root / TABLE
    table.write(rows, path)
    counts = Counter(row.status for row in rows)
    say(f"{path}: {len(rows)} rows, " + ", ".join(f"{number} {status}" for status, number in counts.items()))
    return {"table": str(path), "rows": dict(counts)}
