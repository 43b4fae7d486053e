"""Train the runs of a sweep until none is left.

    bst sweep run launch/sweeps/smoke.yaml --workers 2

May be stopped or killed at any moment and given again: it goes on from what the run directories say. Given on several
hosts with one file system, or as the tasks of a Slurm array, the commands share the runs among them:

    bst sweep run launch/sweeps/cluster.yaml --hostfile hosts           # lines `name slots=8`, reached by ssh
    bst sweep run launch/sweeps/cluster.yaml --slurm 16 --sbatch=--gres=gpu:8 --sbatch=--time=24:00:00

With --dry-run what would be trained, the commands or the batch script are shown, and nothing is started or written.
"""

from __future__ import annotations

import argparse
import shlex
from collections import Counter
from pathlib import Path
from typing import Any

from bst_base.errors import UserError
from bst_dist.cluster.hosts import read_hostfile
from bst_dist.study.report.terminal import say
from bst_dist.study.runs import placement, training
from bst_dist.study.sweep.commands.common import add_sweep, open_plan
from bst_dist.study.sweep.plan import Plan, write_plan
from bst_dist.study.sweep.rehearsal import rehearse


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
    parser.add_argument("--dry-run", action="store_true", help="only show what would be trained, or the commands")


def run(args: argparse.Namespace) -> dict[str, Any]:
    if args.sbatch and args.slurm is None:
        raise UserError("--sbatch is for --slurm")
    plan, state = open_plan(args)
    words = [str(args.sweep), *args.overrides]
    if not args.dry_run:
        rehearse(plan.sweep, plan.runs)
        write_plan(plan)
    if args.slurm is not None:
        return _submit(args, plan, words)
    if args.hostfile is not None:
        commands = _commands(args, plan, words)
        if args.dry_run:
            for command in commands.values():
                say(shlex.join(command))
            return {"commands": commands}
        placement.run_on_hosts(commands, say)
        counts = Counter(state.standing(run).status for run in plan.runs)
    elif args.dry_run:
        lines = training.missing(plan.runs, state)
        for line in lines:
            say(line)
        say(f"{plan.sweep.name}: {len(lines)} of {len(plan.runs)} runs would be trained; nothing was started")
        return {"to_train": len(lines), "runs": len(plan.runs)}
    else:
        counts = training.train(plan.sweep.name, plan.runs, state, args.workers, lambda run: run.own_flops)
    return {"passed": counts["done"] == len(plan.runs), "runs": dict(counts), "directory": str(plan.sweep.root)}


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
