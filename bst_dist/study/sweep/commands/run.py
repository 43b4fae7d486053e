"""Train the runs of a sweep until none is left.

    bst sweep run launch/sweeps/smoke.yaml --workers 2

You can stop or kill the command at any time and start it again: it continues from the run directories. Several such
commands on a shared file system, on several hosts or as tasks of a Slurm array, share the runs:

    bst sweep run launch/sweeps/cluster.yaml --hostfile hosts           # lines `name slots=8`, reached by ssh
    bst sweep run launch/sweeps/cluster.yaml --slurm 64 --sbatch=--gres=gpu:1 --sbatch=--time=24:00:00

--dry-run prints the runs, the commands or the batch script; nothing is started or written.
"""

from __future__ import annotations

import argparse
from typing import Any

from bst_dist.study.runs.command import add_training, check_training, train
from bst_dist.study.sweep.commands.common import add_sweep, open_plan
from bst_dist.study.sweep.plan import write_plan
from bst_dist.study.sweep.rehearsal import rehearse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_sweep(parser)
    add_training(parser)


def run(args: argparse.Namespace) -> dict[str, Any]:
    check_training(args)
    plan, study = open_plan(args)
    if not args.dry_run:
        rehearse(plan.sweep, plan.runs)
        write_plan(plan)
    return train(args, study)
