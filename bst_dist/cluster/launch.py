"""Train a recipe on many hosts.

    bst launch my-recipe.yaml --hostfile hosts --run-dir /shared/runs/first
    bst launch my-recipe.yaml --hostfile hosts --check
    bst launch my-recipe.yaml --hostfile hosts --max-restarts 3
    bst launch my-recipe.yaml --launcher slurm            # inside sbatch

Start it where the recipe, the corpus and the run directory are to be seen, as on the hosts; this directory and its
Python must be at the same path everywhere. All hosts are looked at before a rank is started. Then one agent on each
starts its ranks and watches them: when a rank fails or a host is lost, all ranks are ended, and with --max-restarts
the run goes on from its newest checkpoint on the hosts that are left.

A signal (Ctrl-C, SIGTERM, SIGUSR1, a closed terminal) makes all ranks write a checkpoint and stop; one more ends them
at once, and what was trained since the last checkpoint is lost.

Variables whose name begins like those of NCCL, gloo, torch, DeepSpeed or OpenMP are handed on to the ranks, and so are
those in a file .deepspeed_env, here or in the home directory.

Exit status: 0 the steps asked for are done; 2 something given is wrong, or a host is unfit; 75 stopped by a signal,
with a checkpoint: start it again with --resume; 70 the ranks hung; otherwise the failed rank's own, 128 + N after
signal N, 1 when a host was lost.
"""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from bst_dist.cluster.controller import agent_command
from bst_dist.cluster.elastic import shares
from bst_dist.cluster.hosts import Host, HostError, read_hostfile, slurm_hosts
from bst_dist.cluster.launchers import LAUNCHERS, command
from bst_dist.cluster.local import add_grace, program
from bst_dist.cluster.preflight import Needs, PreflightError
from bst_dist.cluster.processes import told_to_stop
from bst_dist.cluster.supervise import Means, Supervisor, say
from bst_dist.config import Recipe, deepspeed_file
from bst_dist.faults.output import lasting_output
from bst_dist.model.lm import LanguageModel
from bst_dist.parallel.ranks import choose_accelerator
from bst_dist.train import rundir
from bst_dist.train.__main__ import add_arguments as add_program_arguments
from bst_dist.train.__main__ import request
from bst_dist.train.start import Request, load, resolve
from data_pipeline.format.manifest import MANIFEST

HANDED_ON = ("NCCL_", "GLOO_", "TORCH", "DS_", "DEEPSPEED_", "OMP_", "MKL_", "UCX_", "FI_", "PYTHON")
ENVIRONMENT_FILE = ".deepspeed_env"
CHECKPOINT_BYTES = 16
"""A checkpoint's size for each parameter: weights twice, two moments of Adam, in single precision."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `bst launch`."""
    add_program_arguments(parser)
    parser.add_argument(
        "--hostfile", type=Path, metavar="FILE", help="lines `name slots=RANKS`; rank 0 is on the first"
    )
    parser.add_argument("--launcher", choices=LAUNCHERS, default="pdsh", help="what starts a process on each host")
    parser.add_argument("--dry-run", action="store_true", help="show what would be run and read, and stop")
    parser.add_argument("--check", action="store_true", help="look at all hosts, and stop")
    parser.add_argument("--max-restarts", type=int, default=0, metavar="N", help="go on so many times after a "
                        "failure, on the hosts that are left (default: 0)")  # fmt: skip
    add_grace(parser)
    parser.add_argument("--lost-after", type=float, default=30.0, metavar="SECONDS", help="a host that is not heard of "
                        "for so long is lost (default: 30)")  # fmt: skip


@lasting_output()
def run(args: argparse.Namespace) -> dict[str, Any]:
    """Check, launch, watch, restart; the report is the run's outcome, `passed` false unless all ranks were done."""
    choose_accelerator()
    hosts, asked = _hosts(args), request(args)
    start = resolve(load(asked), asked, sum(host.slots for host in hosts))
    asked = replace(asked, run_dir=start.run_dir.resolve())
    means = Means(args.launcher, Path.cwd(), handed_on(os.environ), args.lost_after, args.grace, args.max_restarts)
    if args.dry_run:
        return _show(asked, start.recipe, hosts, means)
    with told_to_stop() as told:
        supervisor = Supervisor(asked, start.recipe, hosts, means, _needs(asked, start.recipe), told)
        try:
            if args.check:
                supervisor.check()
                return {"passed": True, "hosts": [host.name for host in hosts]}
            status = supervisor.run().status
        except PreflightError:
            if not told:
                raise
            status = 128 + told[0]
    if status:
        say(f"status {status}, restarts: {supervisor.restarts}; what was reached is in {asked.run_dir}")
    outcome = rundir.read_outcome(asked.run_dir) or {}
    report = {"passed": status == 0, "exit_status": status, "run_dir": str(asked.run_dir)}
    return {**report, "restarts": supervisor.restarts, **outcome}


def handed_on(environment: Mapping[str, str]) -> dict[str, str]:
    """The variables that the ranks get from here; the file's come first, as what is set for this one start."""
    found: dict[str, str] = {}
    for directory in (Path.home(), Path.cwd()):
        path = directory / ENVIRONMENT_FILE
        if path.is_file():
            lines = (line.strip() for line in path.read_text(encoding="utf-8").splitlines())
            found |= dict(line.split("=", 1) for line in lines if "=" in line and not line.startswith("#"))
    return found | {name: value for name, value in environment.items() if name.startswith(HANDED_ON)}


def _hosts(args: argparse.Namespace) -> list[Host]:
    if args.hostfile is not None:
        return read_hostfile(args.hostfile)
    if args.launcher == "slurm":
        return slurm_hosts()
    raise HostError("which hosts? give --hostfile FILE, or --launcher slurm inside an allocation")


def _needs(asked: Request, recipe: Recipe) -> Needs:
    """What every host must see and have room for."""
    corpora = [Path(url) / MANIFEST for url in recipe.data.urls() if "://" not in url]
    files = [asked.recipe, deepspeed_file(recipe), *corpora]
    with torch.device("meta"):
        parameters = sum(parameter.numel() for parameter in LanguageModel(recipe.model).parameters())
    # Two checkpoints: one that stands, and one being written.
    return Needs([path.resolve() for path in files], asked.run_dir, 2 * CHECKPOINT_BYTES * parameters)


def _show(asked: Request, recipe: Recipe, hosts: Sequence[Host], means: Means) -> dict[str, Any]:
    """What would be run, and which files it reads and writes."""
    agent = agent_command("ADDRESS:PORT", "JOB", means.lost_after_s, means.grace_s)
    lines = {
        "agents": shlex.join(command(means.launcher, hosts, means.directory, agent)),
        "ranks": shlex.join(program(asked)),
        "environment": " ".join(f"{name}={value}" for name, value in sorted(means.environment.items())),
    }
    placed = shares(hosts, sum(host.slots for host in hosts), "ADDRESS", 0)
    for host, share in placed.items():
        print(f"{host:<12} ranks {share.first} to {share.first + share.count - 1} of {share.world}")
    for name, text in lines.items():
        print(f"{name:<12} {text}")
    files = [*map(str, _needs(asked, recipe).files)]
    print("\n".join(f"{'reads':<12} {path}" for path in files) + f"\n{'writes':<12} {asked.run_dir}", file=sys.stdout)
    placed_ranks = {host: [share.first, share.count] for host, share in placed.items()}
    return {"passed": True, **lines, "hosts": placed_ranks, "reads": files, "writes": str(asked.run_dir)}
