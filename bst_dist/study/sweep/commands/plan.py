"""Estimate a sweep's cost, fit it into the budget, and fix which runs to train.

    bst sweep plan launch/sweeps/mini.yaml --measure 2
    bst sweep plan launch/sweeps/cluster.yaml --gpu h100-80gb

--measure first times every shape on this machine for this many seconds; --gpu takes the speed that `bst plan` expects
on such devices, including launches of small kernels. Either result is kept for later commands; without both, the cost
is computed from budget.flops_per_s. If the sweep exceeds its budget, whole cells of the grid (one size, depth, seed and
arm, with all architectures) are left out until it fits.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from bst_base.arguments import at_least, seconds
from bst_base.terminal import Sheet, print_table, say
from bst_dist.plan.accelerators import accelerator
from bst_dist.study.sweep.commands.common import add_sweep, open_sweep
from bst_dist.study.sweep.commands.design import show_power
from bst_dist.study.sweep.design import Designer
from bst_dist.study.sweep.plan import Plan, make_plan, read_rates, write_plan, write_rates
from bst_dist.study.sweep.price import cost
from bst_dist.study.sweep.rehearsal import rehearse
from bst_dist.study.sweep.speed import measure, planned


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_sweep(parser)
    speeds = parser.add_mutually_exclusive_group()
    speeds.add_argument("--measure", type=seconds, metavar="SECONDS", help="first time every shape here for this long")
    speeds.add_argument("--gpu", metavar="NAME", help="take the speeds that bst plan expects of these devices")
    parser.add_argument("--gpus-per-node", type=at_least(1), default=8, metavar="G", help="with --gpu (default 8)")
    parser.add_argument(
        "--accelerators", type=Path, metavar="FILE", help="with --gpu: YAML file with your own accelerators"
    )


def run(args: argparse.Namespace) -> dict[str, Any]:
    sweep = open_sweep(args)
    if args.measure or args.gpu:
        designer = Designer(sweep)
        runs = designer.runs(designer.cells())
        write_rates(
            sweep,
            measure(runs, args.measure, _told)
            if args.measure
            else planned(runs, accelerator(args.gpu, args.accelerators), args.gpus_per_node, _told),
        )
    plan = make_plan(sweep)
    rehearse(sweep, plan.runs)
    write_plan(plan)
    prices = prices_of(plan)
    for title, keys in (("by shape", ("size", "depth")), ("by architecture", ("architecture",))):
        rows = []
        for group in dict.fromkeys(price.at(keys) for price in prices):
            own = [price for price in prices if price.at(keys) == group]
            names = [f"{value:.3g}" if isinstance(value, float) else str(value) for value in group]
            rows.append([*names, str(sum(p.runs for p in own)), f"{sum(p.cost for p in own):.3g}"])
        print_table(Sheet((*keys, "runs", plan.unit), rows), f"{sweep.name}, {title}")
    power = show_power(plan)
    for stratum in plan.dropped:
        say(f"dropped to fit the budget: {stratum}")
    limit = "no limit" if plan.limit == float("inf") else f"a budget of {plan.limit:.4g}"
    flops = sum(run.own_flops for run in plan.runs)
    say(f"{len(plan.runs)} runs, {plan.spent:.4g} {plan.unit} of {limit}; {flops:.3g} FLOPs")
    return {
        "runs": len(plan.runs),
        "unit": plan.unit,
        "cost": plan.spent,
        "dropped": plan.dropped,
        "prices": [asdict(price) for price in prices],
        "flops": flops,
        **power,
    }


def _told(key: str, rate: float) -> None:
    say(f"{rate / 1e9:10,.2f} GFLOP/s  {key}")


@dataclass
class Price:
    """The number of runs of an architecture at a size and depth, and their cost in the unit of the budget."""

    architecture: str
    size: float
    depth: int
    runs: int = 0
    cost: float = 0.0

    def at(self, keys: Sequence[str]) -> tuple[Any, ...]:
        """Return the values of the fields `keys`."""
        return tuple(getattr(self, key) for key in keys)


def prices_of(plan: Plan) -> list[Price]:
    """Return the runs and their cost by architecture, size and depth."""
    spent, _, _ = cost(plan.sweep.budget, read_rates(plan.sweep))
    found: dict[tuple[str, float, int], Price] = {}
    for run in plan.runs:
        key = (run.cell.architecture, run.cell.size, run.cell.depth)
        price = found.setdefault(key, Price(*key))
        price.runs += 1
        price.cost += spent(run)
    return list(found.values())
