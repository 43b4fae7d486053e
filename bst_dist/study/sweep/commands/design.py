"""Show the runs of a sweep, their shapes and the power of the comparison, before anything is spent.

    bst sweep design launch/sweeps/mini.yaml

Prints shapes of equal size, with exact parameters and training FLOPs per token, and the power of the verdict's rule in
simulated studies. The whole analysis first runs on simulated losses: a grid that cannot separate its factors, or gives
no verdict or no law, is rejected with the reason.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from bst_base.terminal import Sheet, print_table, say
from bst_dist.study.laws.power import Power
from bst_dist.study.laws.verdict import MARGIN, UNITS
from bst_dist.study.report.formatting import number, percent, plain
from bst_dist.study.sweep.commands.common import add_sweep, open_plan
from bst_dist.study.sweep.plan import Plan
from bst_dist.study.sweep.price import shape_key
from bst_dist.study.sweep.rehearsal import rehearse

add_arguments = add_sweep
KEYS = {"power_at_margin": "at_margin", "minimum_detectable_change": "smallest_seen", "false_positive_rate": "false"}
"""Fields of Power whose keys in the machine-readable report are older than their names."""


def run(args: argparse.Namespace) -> dict[str, Any]:
    plan, _ = open_plan(args)
    rehearse(plan.sweep, plan.runs)
    shapes = shapes_of(plan)
    show_shapes(plan, shapes)
    power = show_power(plan)
    for stratum in plan.dropped:
        say(f"dropped to fit the budget: {stratum}")
    return {
        "runs": len(plan.runs),
        "measurements": len(plan.measured),
        "dropped": plan.dropped,
        "shapes": [asdict(shape) for shape in shapes],
        **power,
    }


def show_shapes(plan: Plan, shapes: Sequence[Shape]) -> None:
    """Print the model shapes of a plan."""
    base = plan.sweep.baseline
    title = f"{plan.sweep.name}: {len(plan.runs)} runs, {len(plan.measured)} of them measurements"
    names = (
        "architecture",
        "arm",
        "size",
        "depth",
        "width",
        "heads",
        "ffn / width",
        "under study",
        "parameters",
        "N = FLOPs/6",
        f"N over {base}'s",
    )
    of_base = {(s.arm, s.size, s.depth): s.parameters for s in shapes if s.architecture == base}
    rows = [
        [
            s.architecture,
            s.arm,
            f"{s.size:.3g}",
            str(s.depth),
            str(s.width),
            str(s.heads),
            f"{s.ffn / s.width:.2f}",
            s.places,
            f"{s.parameters_total:,}",
            f"{s.parameters:,.0f}",
            f"{s.parameters / of_base[s.arm, s.size, s.depth] - 1:+.2%}",
        ]
        for s in shapes
    ]
    print_table(Sheet(names, rows), title)


@dataclass(frozen=True)
class Shape:
    """One model shape of a plan. The field names are those of the machine-readable report."""

    architecture: str
    arm: str
    size: float
    depth: int
    width: int
    ffn: int
    heads: int
    places: str
    """How many layers use the architecture's mixer: "2 of 4"."""
    parameters: float
    """N, training FLOPs per token / 6."""
    parameters_total: int
    parameters_non_embedding: int
    flops_per_token: dict[str, float]


def shapes_of(plan: Plan) -> list[Shape]:
    """Return the distinct shapes of a plan."""
    found = {}
    for run in plan.runs:
        model, cell, counts = run.recipe.model, run.cell, run.counts
        found[shape_key(cell)] = Shape(
            cell.architecture,
            cell.arm,
            cell.size,
            model.depth,
            model.width,
            model.ffn,
            model.heads,
            f"{model.mixers().count(model.mixer)} of {model.depth}",
            counts.parameters,
            counts.total,
            counts.non_embedding,
            counts.flops_per_token,
        )
    return list(found.values())


def show_power(plan: Plan) -> dict[str, Any]:
    """Print the power of the rule for each variant and the pairs needed to detect the margin; return both."""
    noise, every = plan.sweep.noise, plan.power()
    needed = plan.pairs_needed(every)
    title = (
        f"power of the rule for each variant in arm {plan.sweep.arm}, from {every[0].pairs} pairs of runs, with a "
        f"standard deviation of {noise.seed:.2%} of the loss between seeds (noise.seed)"
    )
    rows = [
        [
            UNITS[p.factor].per,
            percent(p.standard_error, sign=False),
            f"{p.power_at_margin:.0%}",
            _detectable(p),
            f"{p.equivalent:.0%}",
            number(needed[p.factor], ",") or "no number",
        ]
        for p in every
    ]
    names = (
        "change of the advantage per",
        "standard error",
        f"power at {MARGIN:.1%}",
        "change with 80 % power",
        "probability of 'equivalent' without a change",
        f"pairs for 80 % at {MARGIN:.1%}",
    )
    print_table(Sheet(names, rows), title)
    say(f"probability of any false verdict where nothing changes: {every[0].false_positive_rate:.1%}")
    for p in every:
        if not math.isfinite(p.minimum_detectable_change):
            say(f"no change over {UNITS[p.factor].name} could be detected: add seeds, or compare fewer variants")
    return {"power": [_report(p) for p in every], "pairs_needed": needed}


def _report(p: Power) -> dict[str, Any]:
    return {KEYS.get(name, name): value for name, value in plain(p).items()}


def _detectable(p: Power) -> str:
    return percent(p.minimum_detectable_change, sign=False) if math.isfinite(p.minimum_detectable_change) else "nothing"
