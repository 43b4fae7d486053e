"""Show what a sweep would run, and what it could see, before anything is spent.

    bst sweep design launch/sweeps/mini.yaml

Shapes of equal size, exact parameters and training FLOPs a token, the smallest change of an advantage that would be
seen. A grid that cannot tell its factors apart is refused, with the columns that move together.
"""

from __future__ import annotations

import argparse
from typing import Any

from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from bst_dist.study.laws.verdict import MARGIN
from bst_dist.study.sweep.commands.common import add_sweep, open_console, open_plan
from bst_dist.study.sweep.plan import Plan
from bst_dist.study.sweep.power import Power, shape_key

add_arguments = add_sweep


def run(args: argparse.Namespace) -> dict[str, Any]:
    plan, _ = open_plan(args)
    console, shapes = open_console(), shapes_of(plan)
    title = f"{plan.sweep.name}: {len(plan.runs)} runs, {len(plan.measured)} of them measurements"
    names = ("architecture", "size", "depth", "width", "heads", "under study", "parameters", "N = FLOPs/6", "off by")
    table = Table(*names, title=title, box=SIMPLE)
    for shape in shapes:
        table.add_row(
            shape["architecture"], f"{shape['size']:.3g}", str(shape["depth"]), str(shape["width"]),
            str(shape["heads"]), shape["places"], f"{shape['parameters_total']:,}", f"{shape['parameters']:,.0f}",
            f"{shape['parameters'] / shape['size'] - 1:+.1%}",
        )  # fmt: skip
    console.print(table)
    show_power(console, plan.power)
    for block in plan.dropped:
        console.print(f"not paid for by the budget: {block}", markup=False, highlight=False)
    return {"runs": len(plan.runs), "measurements": len(plan.measured), "dropped": plan.dropped, "shapes": shapes,
            **power_report(plan.power)}  # fmt: skip


def shapes_of(plan: Plan) -> list[dict[str, Any]]:
    """Every distinct shape of a plan, once."""
    found = {}
    for run in plan.runs:
        model, mixers = run.recipe.model, run.recipe.model.mixers()
        found[shape_key(run.cell)] = {
            "architecture": run.cell.architecture, "arm": run.cell.arm, "size": run.cell.size,
            "depth": model.depth, "width": model.width,
            "heads": model.heads, "places": f"{mixers.count(model.mixer)} of {model.depth}",
            "parameters": run.counts.parameters, "parameters_total": run.counts.total,
            "parameters_non_embedding": run.counts.non_embedding, "flops_per_token": run.counts.flops_per_token,
        }  # fmt: skip
    return list(found.values())


def show_power(console: Console, power: Power) -> None:
    """What the grid would see."""
    title = f"predicted for each variant from {power.pairs} pairs of runs; margin {MARGIN:.2%}"
    table = Table("the advantage ...", "standard error", "seen with power 0.8", title=title, box=SIMPLE)
    table.add_row("on average", f"{power.mean:.2%}", "")
    for name, (error, seen) in power.changes.items():
        table.add_row(f"... as it changes over {name}", f"{error:.2%}", f"{seen:.2%}" if seen < 1 else "nothing")
    console.print(table)


def power_report(power: Power) -> dict[str, Any]:
    """The same for machines."""
    changes = {n: {"standard_error": e, "smallest_seen": s} for n, (e, s) in power.changes.items()}
    return {"pairs": power.pairs, "predicted_mean_gap_standard_error": power.mean, "predicted_changes": changes}
