"""Train the runs of a sweep until none is left.

    bst sweep run launch/sweeps/smoke.yaml --workers 2

May be stopped or killed at any moment and given again: it goes on from what the run directories say. Given on several
hosts with one file system, or as the tasks of a Slurm array, the commands share the runs among them:

    bst sweep run launch/sweeps/cluster.yaml --hostfile hosts           # lines `name slots=8`, reached by ssh
    bst sweep run launch/sweeps/cluster.yaml --slurm 16 --sbatch=--gres=gpu:8 --sbatch=--time=24:00:00

With --dry-run the commands, or the batch script, are shown and nothing is started.
"""

from __future__ import annotations

import argparse
import shlex
import time
from collections import Counter
from pathlib import Path
from typing import Any

from rich.box import SIMPLE
from rich.console import Console
from rich.live import Live
from rich.table import Table

from bst_dist.cluster.hosts import read_hostfile
from bst_dist.study.runs import placement
from bst_dist.study.runs.runner import Runner, Worker
from bst_dist.study.runs.state import State
from bst_dist.study.sweep.commands.common import add_sweep, open_plan, say
from bst_dist.study.sweep.plan import Plan, write_plan

REFRESH_S = 2.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_sweep(parser)
    parser.add_argument("--workers", type=int, default=1, metavar="N", help="runs to train at a time on this host")
    where = parser.add_mutually_exclusive_group()
    where.add_argument(
        "--hostfile", type=Path, metavar="FILE", help="train on these hosts, a run for each of its slots"
    )
    where.add_argument(
        "--slurm", type=int, metavar="N", help="submit an array of N tasks, --workers runs at a time each"
    )
    parser.add_argument("--sbatch", action="append", default=[], metavar="OPTION", help="with --slurm: for sbatch")
    parser.add_argument("--dry-run", action="store_true", help="with --hostfile or --slurm: only show what would start")


def run(args: argparse.Namespace) -> dict[str, Any]:
    plan, state = open_plan(args)
    write_plan(plan)
    started = time.monotonic()
    words = [str(args.sweep), *args.overrides]
    if args.slurm is not None:
        return _submit(args, plan, words)
    if args.hostfile is not None:
        commands = _commands(args, plan, words)
        if args.dry_run:
            for command in commands.values():
                say(shlex.join(command))
            return {"commands": commands}
        placement.run_on_hosts(commands, say)
    else:
        _here(args, plan, state)
    counts = Counter(state.standing(run).status for run in plan.runs)
    summary = ", ".join(f"{number} {status}" for status, number in counts.items())
    say(f"{plan.sweep.name}: {summary} after {time.monotonic() - started:.0f} s")
    return {"passed": counts["done"] == len(plan.runs), "runs": dict(counts), "directory": str(plan.sweep.root)}


def _here(args: argparse.Namespace, plan: Plan, state: State) -> None:
    """Train on this host until nothing is left to start."""
    console, shown = Console(), 0.0
    with Live(console=console, auto_refresh=False, transient=True) as live:

        def watch(workers: list[Worker]) -> None:
            nonlocal shown
            if console.is_terminal and time.monotonic() - shown > REFRESH_S:
                live.update(running_table(plan, state, workers), refresh=True)
                shown = time.monotonic()

        def tell(text: str) -> None:
            console.print(text, markup=False, highlight=False, soft_wrap=True)

        Runner(plan.runs, state, args.workers, tell).run(watch)


def _commands(args: argparse.Namespace, plan: Plan, words: list[str]) -> dict[str, list[str]]:
    """What is run on each host of the hostfile."""
    ranks = max((run.recipe.ranks or 1) for run in plan.runs)
    hosts = read_hostfile(args.hostfile)
    return {host.name: placement.on_host(host, ranks, Path.cwd(), words) for host in hosts}


def _submit(args: argparse.Namespace, plan: Plan, words: list[str]) -> dict[str, Any]:
    """Give Slurm an array whose tasks train the sweep."""
    words = [*words, "--workers", str(args.workers)]
    root = plan.sweep.root.resolve()
    script = placement.slurm_script(plan.sweep.name, root, args.slurm, Path.cwd(), words, args.sbatch)
    say(script if args.dry_run else placement.submit(script, root))
    return {"script": script}


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
