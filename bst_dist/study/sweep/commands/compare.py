"""Does the advantage over the baseline grow or shrink? The answer, by the rule that stands in verdict.py.

    bst sweep compare launch/sweeps/mini.yaml
    bst sweep compare launch/sweeps/mini.yaml --at time_s

Gaps are ln L_baseline - ln L_variant of paired runs, in per cent of the loss: above 0 the variant is better.
"""

from __future__ import annotations

import argparse
import math
from typing import Any

from rich.box import SIMPLE
from rich.table import Table

from bst_dist.study.laws.analysis import compare_report
from bst_dist.study.sweep.commands.common import add_sweep, open_console, open_table, percent, say


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_sweep(parser)
    parser.add_argument("--at", choices=("flops", "time_s"), default="flops", help="what is equal in a comparison")


def run(args: argparse.Namespace) -> dict[str, Any]:
    sweep, rows = open_table(args)
    report = compare_report(rows, sweep.baseline, args.at)
    console = open_console()
    for name, found in report["variants"].items():
        mean = found["mean_gap"]
        say(f"{name} over {sweep.baseline} at equal {args.at}: {percent(mean['value'])} ± "
            f"{mean['standard_error']:.2%} of the loss, {found['pairs']} pairs of runs")  # fmt: skip
        gain, error = (found["log_gain"]["mean"][key] for key in ("value", "standard_error"))
        say(f"  compute-equivalent gain {math.exp(gain):.3f} ± {math.exp(gain) * error:.3f}")
        console.print(change_table(found["changes"]))
        for change in found["changes"]:
            if change["answer"] == "undecided":
                say(f"  undecided over {change['factor']}: {change['more_pairs']} more pairs of runs are needed")
        for line in found["left_out"]:
            say(f"  left out: {line}")
    for name, why in report["missing"].items():
        say(f"{name}: {why}")
    if "undecided" in report:
        say(f"undecided: {report['undecided']}")
    return report


def change_table(changes: list[dict[str, Any]]) -> Table:
    """How the advantage changes, and the verdicts."""
    table = Table("over", "change", "95 % interval", "p", "p equivalent", "verdict", box=SIMPLE)
    for change in changes:
        table.add_row(
            change["factor"], percent(change["change"]), f"{percent(change['low'])} to {percent(change['high'])}",
            f"{change['p_difference']:.3f}", f"{change['p_equivalence']:.3f}", change["answer"],
        )  # fmt: skip
    return table
