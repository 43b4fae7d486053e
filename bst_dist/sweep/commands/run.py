"""Train the runs of a sweep until none is left.

    bst sweep run launch/sweeps/smoke.yaml --workers 2

May be stopped or killed at any moment and given again: it goes on from what the run directories say. Given on several
hosts with one file system, or as the tasks of a Slurm array, the commands share the runs among them.
"""

from __future__ import annotations

import argparse
import time
from collections import Counter
from typing import Any

from rich.box import SIMPLE
from rich.console import Console
from rich.live import Live
from rich.table import Table

from bst_dist.sweep.commands.common import add_sweep, open_plan
from bst_dist.sweep.plan import Plan, write_plan
from bst_dist.sweep.runner import Runner, Worker
from bst_dist.sweep.state import State

REFRESH_S = 2.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_sweep(parser)
    parser.add_argument("--workers", type=int, default=1, metavar="N", help="runs to train at a time on this host")


def run(args: argparse.Namespace) -> dict[str, Any]:
    plan, state = open_plan(args)
    write_plan(plan)
    console, started = Console(), time.monotonic()
    with Live(console=console, auto_refresh=False, transient=True) as live:
        shown = 0.0

        def watch(workers: list[Worker]) -> None:
            nonlocal shown
            if console.is_terminal and time.monotonic() - shown > REFRESH_S:
                live.update(running_table(plan, state, workers), refresh=True)
                shown = time.monotonic()

        def say(text: str) -> None:
            console.print(text, markup=False, highlight=False, soft_wrap=True)

        Runner(plan.runs, state, args.workers, say).run(watch)
    counts = Counter(state.standing(run).status for run in plan.runs)
    summary = ", ".join(f"{number} {status}" for status, number in counts.items())
    console.print(f"{plan.sweep.name}: {summary} after {time.monotonic() - started:.0f} s")
    return {"passed": counts["done"] == len(plan.runs), "runs": dict(counts), "directory": str(plan.sweep.root)}


def running_table(plan: Plan, state: State, workers: list[Worker]) -> Table:
    """What is being trained now, and how much is done."""
    done = [run for run in plan.runs if state.standing(run).status == "done"]
    share = sum(run.own_flops for run in done) / sum(run.own_flops for run in plan.runs)
    title = f"{plan.sweep.name}: {len(done)} of {len(plan.runs)} runs done, {share:.0%} of the FLOPs"
    table = Table("run", "step", "loss", "tokens/s", "for", title=title, box=SIMPLE)
    for worker in workers:
        line = state.progress(worker.run.name) or {"step": 0, "loss_nats": float("nan"), "tokens_per_s": 0.0}
        table.add_row(
            worker.run.name, f"{line['step']} / {worker.run.recipe.train.steps}", f"{line['loss_nats']:.4f}",
            f"{line['tokens_per_s']:,.0f}", f"{time.monotonic() - worker.started:.0f} s",
        )  # fmt: skip
    return table
