"""Fit scaling laws to the table of a sweep.

    bst sweep fit launch/sweeps/mini.yaml

Both forms, both objectives; errors by resampling runs; shapes and the largest size left out; one E for all
architectures, and whether the data speak against it. Where a law is not identified, local slopes stand in its place.
"""

from __future__ import annotations

import argparse
from typing import Any

from rich.box import SIMPLE
from rich.table import Table

from bst_dist.study.laws.analysis import fit_report
from bst_dist.study.sweep.commands.common import add_sweep, open_console, open_table, say

CAPTION = "errors in predicting shapes left out, and the largest size from smaller ones"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_sweep(parser)
    parser.add_argument("--draws", type=int, default=200, metavar="N", help="resamples (default: %(default)s)")


def run(args: argparse.Namespace) -> dict[str, Any]:
    sweep, rows = open_table(args)
    report = fit_report(rows, sweep.baseline, args.draws)
    console = open_console()
    for name, laws in report["architectures"].items():
        console.print(law_table(name, laws))
        for key, law in laws.items():
            if isinstance(law, dict) and "not_fitted" in law:
                say(f"  {key.replace('_', ' ')}: {law['not_fitted']}")
        for reason in laws.get("not_identified", []):
            say(f"  not identified: {reason}")
        for axis, slope in laws["slopes"].items():
            if isinstance(slope, dict):
                say(f"  d ln L / d ln {axis}: {slope['value']:.4f} ± {slope['standard_error']:.4f}")
    for name, reach in report["reach"].items():
        verb = "sees as far as" if reach["equal"] else "sees another distance than"
        say(
            f"{name} {verb} {sweep.baseline}: late in a sequence its advantage differs "
            f"by {reach['difference']:+.2%} ± {reach['standard_error']:.2%} (p = {reach['p_value']:.3f})"
        )
    shared = report["shared_E"]
    if "not_fitted" in shared:
        say(f"one E for all architectures: {shared['not_fitted']}")
    if "p_value" in shared:
        say(
            f"one E for those that see equally far: p = {shared['p_value']:.2f} of the data speaking so much against it"
        )
    return report


def law_table(name: str, laws: dict[str, Any]) -> Table:
    """The laws of one architecture, a fit a row."""
    unknowns = ("E", "A", "alpha", "B", "beta", "kappa")
    table = Table("fit", *unknowns, "shape out", "largest", title=name, box=SIMPLE, caption=CAPTION)
    for key, law in laws.items():
        if not key.startswith(("chinchilla_", "depth_")):
            continue
        if "not_fitted" in law:
            continue
        left_out, largest = law.get("left_out_shape_errors"), law.get("largest_size_error")
        values = left_out.values() if isinstance(left_out, dict) and "not_fitted" not in left_out else []
        table.add_row(
            key.replace("_", " "), *(f"{law[u]:.3g}" for u in unknowns),
            f"{sum(values) / len(values):.2%}" if values else "",
            f"{largest:.2%}" if isinstance(largest, float) else "",
        )  # fmt: skip
    if "intervals" in laws:
        found = laws["intervals"]
        row = [f"± {found[u]['standard_error']:.2g}" if u in found else "" for u in unknowns]
        table.add_row(f"± {laws['chosen']}", *row)
    return table
