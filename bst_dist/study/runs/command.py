"""Code shared by `bst sweep` and `bst experiment`: their file arguments, and the commands `run` and `status`."""

from __future__ import annotations

import argparse
import shlex
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bst_base.arguments import at_least
from bst_base.errors import UserError
from bst_base.terminal import Sheet, print_table, say
from bst_dist.cluster.hosts import read_hostfile
from bst_dist.study.runs import placement, training
from bst_dist.study.runs.recipes import Job
from bst_dist.study.runs.state import STATUSES, State


@dataclass(frozen=True)
class Study:
    """The runs of a sweep or an experiment, for training them."""

    kind: str
    """"sweep" or "experiment"."""
    name: str
    jobs: Sequence[Job]
    state: State


def add_file(parser: argparse.ArgumentParser, kind: str, folder: str) -> None:
    """Add arguments for the study's file and for settings that override it; `folder` holds the shipped files."""
    parser.add_argument(
        "file", type=Path, metavar=kind.upper(), help=f"the {kind}'s YAML file, or the name of one of {folder}/"
    )
    parser.add_argument("overrides", nargs="*", metavar="section.field=value", help="settings to change")


def add_training(parser: argparse.ArgumentParser) -> None:
    """Add the arguments that say where the runs are trained."""
    where = parser.add_mutually_exclusive_group()
    parser.add_argument(
        "--workers", type=at_least(1), metavar="N", help="runs to train in parallel per host (default: 1)"
    )
    where.add_argument(
        "--hostfile",
        type=Path,
        metavar="FILE",
        help="train on these hosts, as many runs in parallel as their slots allow",
    )
    where.add_argument(
        "--slurm",
        type=at_least(1),
        metavar="N",
        help="submit a Slurm array of N tasks; each trains runs until none is left",
    )
    parser.add_argument(
        "--sbatch",
        action="append",
        default=[],
        metavar="OPTION",
        help="with --slurm: an option for sbatch, as --sbatch=--time=24:00:00; may be given several times",
    )
    parser.add_argument("--dry-run", action="store_true", help="only show the runs or commands that would start")


def check_training(args: argparse.Namespace) -> None:
    """Raise UserError for options that cannot be combined."""
    if args.workers is not None and args.hostfile is not None:
        raise UserError("--workers cannot be combined with --hostfile: slots say how many runs a host trains")


def train(args: argparse.Namespace, study: Study) -> dict[str, Any]:
    """Train the missing runs and return the number of runs by status.

    With --dry-run or --slurm nothing is trained here, so the result has no `passed`.
    """
    words = [study.kind, "run", str(args.file), *args.overrides]
    jobs, state = study.jobs, study.state
    if args.slurm is not None:
        return _submit(args, study, words)
    if args.hostfile is not None:
        ranks = max((job.recipe.ranks or 1) for job in jobs)
        commands = {
            host.name: placement.on_host(host, ranks, Path.cwd(), words) for host in read_hostfile(args.hostfile)
        }
        if args.dry_run:
            say("\n".join(map(shlex.join, commands.values())))
            return {"commands": commands}
        placement.run_on_hosts(commands, say)
        counts = state.counts(jobs)
    elif args.dry_run:
        lines = training.missing(jobs, state)
        lines.append(f"{study.name}: {len(lines)} of {len(jobs)} runs would be trained; nothing was started")
        say("\n".join(lines))
        return {"to_train": len(lines) - 1, "runs": len(jobs)}
    else:
        counts = training.train(study.name, jobs, state, args.workers or 1)
    return {"passed": counts["done"] == len(jobs), "runs": dict(counts), "directory": str(state.root)}


def _submit(args: argparse.Namespace, study: Study, words: list[str]) -> dict[str, Any]:
    """Submit a Slurm array whose tasks train the study."""
    root = study.state.root.resolve()
    words = [*words, "--workers", str(args.workers or 1)]
    script = placement.slurm_script(study.name, root, args.slurm, Path.cwd(), words, args.sbatch)
    say(script if args.dry_run else placement.submit(script, root))
    return {"script": script}


def show_status(study: Study) -> dict[str, Any]:
    """Print the number of runs by status, the progress of running ones, and the reasons of failed ones."""
    statuses = [(job, study.state.status_of(job)) for job in study.jobs]
    rows = []
    for group in dict.fromkeys(job.group for job in study.jobs):
        counts = Counter(run_status.status for job, run_status in statuses if job.group == group)
        rows.append([group, *(str(counts[status]) for status in STATUSES)])
    print_table(Sheet(("runs of", *STATUSES), rows), study.name)
    for job, run_status in statuses:
        if run_status.status == "running":
            line = study.state.progress(job.name)
            say(f"running   {job.name}: step {line['step'] if line else 0} of {job.recipe.train.steps}")
        elif run_status.status in ("failed", "diverged"):
            say(f"{run_status.status:<9} {job.name}: {run_status.reason}")
    if remedy := study.state.remedy(study.jobs):
        say(remedy)
    done = sum(job.work for job, run_status in statuses if run_status.status == "done")
    say(f"{done / sum(job.work for job in study.jobs):.0%} of the work is done")
    return {
        "runs": dict(Counter(run_status.status for _, run_status in statuses)),
        "work_done": done,
        "work": sum(job.work for job in study.jobs),
        "not_finished": {job.name: s.status for job, s in statuses if s.status != "done"},
    }
