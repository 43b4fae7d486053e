"""Train a recipe on many hosts.

    bst launch my-recipe.yaml --hostfile hosts --run-dir /shared/runs/first
    bst launch my-recipe.yaml --hostfile hosts --check
    bst launch my-recipe.yaml --hostfile hosts --max-restarts 3
    bst launch my-recipe.yaml --launcher slurm            # inside sbatch
    bst launch my-recipe.yaml --launcher local --max-restarts 3

Start it on a machine that sees the recipe, the corpus and the run directory as the hosts do. This directory and its
Python must have the same path everywhere. All hosts are checked before any rank starts. Then one agent on each host
starts its ranks and watches them. When a rank fails or a host is lost, all ranks are ended; with --max-restarts the run
restarts from its newest checkpoint on the remaining hosts. A run uses at most train.sequences x parallel.sp slots; the
others stay idle and replace lost ones. If the ranks do not divide the sequences of a step, some ranks compute masked
sequences.

A signal (Ctrl-C, SIGTERM, SIGUSR1, a closed terminal) makes all ranks write a checkpoint and stop. A second Ctrl-C ends
them at once and loses what was trained since the last checkpoint. Repeating any other signal changes nothing.

The ranks get LD_LIBRARY_PATH, the variables whose names begin with NCCL_, RCCL_, GLOO_, TORCH, PYTORCH_, TRITON_, DS_,
DEEPSPEED_, CUDA_, CUBLAS_, HIP_, HSA_, MIOPEN_, OMP_, MKL_, UCX_, FI_, PYTHON, AWS_, WANDB_ or MLFLOW_, and those in a
file .deepspeed_env, here or in the home directory. Over ssh they do not get CUDA_VISIBLE_DEVICES, nor
HIP_VISIBLE_DEVICES, ROCR_VISIBLE_DEVICES and GPU_DEVICE_ORDINAL: choose a host's devices with `devices=0,1` after the
slots in the hostfile.

Exit status: 0: all requested steps are done. 2: the arguments or the recipe are wrong, the run diverged, or a host
failed a check. 75: stopped by a signal, with a checkpoint if ranks of the run were running and had the time for it;
also after any other failure if the agents got the signal. 74: a host could not read or write a file. 70: the ranks
hung. 1: a host was lost, or a rank failed with an error. 128 + N: a rank was killed by signal N. After 75, 74, 70 and a
lost host start it again with --resume.
"""

from __future__ import annotations

import argparse
import os
import shlex
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from bst_base.arguments import at_least, seconds
from bst_base.errors import UserError
from bst_base.host import allow_open_files, without_brackets
from bst_base.shipped import RECIPES, find
from bst_base.stopping import Stopped
from bst_dist.cluster.controller import LaunchOptions, agent_command
from bst_dist.cluster.elastic import idle, shares, usable
from bst_dist.cluster.environment import collect_environment, explain_not_passed_on, format_environment
from bst_dist.cluster.hosts import Host, HostError, read_hostfile, slurm_hosts
from bst_dist.cluster.launchers import LAUNCHERS, OVER_SSH, require
from bst_dist.cluster.local import add_grace, correct_stop_signal, default_ranks, outcome_since, program
from bst_dist.cluster.preflight import CHECKS, Needs
from bst_dist.cluster.printing import unhurried_output
from bst_dist.cluster.processes import catch_stop_signals
from bst_dist.cluster.restarts import Restarts
from bst_dist.cluster.space import space_for_checkpoints
from bst_dist.cluster.supervise import Job, Supervisor, say
from bst_dist.config import Recipe, deepspeed_file, spread_of
from bst_dist.faults.status import RESUBMIT
from bst_dist.model.lm import LanguageModel
from bst_dist.model.meta_device import weightless
from bst_dist.parallel.ranks import choose_accelerator
from bst_dist.train import rundir
from bst_dist.train.__main__ import add_arguments as add_program_arguments
from bst_dist.train.__main__ import request
from bst_dist.train.start.request import Request, load, resolve
from data_pipeline.format.manifest import MANIFEST


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_program_arguments(parser)
    parser.add_argument(
        "--hostfile",
        type=Path,
        metavar="FILE",
        help="one line `name slots=RANKS` per host; rank 0 is on the first (default with Slurm: the job's nodes)",
    )
    parser.add_argument(
        "--launcher",
        choices=LAUNCHERS,
        default="pdsh",
        help="how to start an agent on each host; local: on this machine, without ssh (default: pdsh)",
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="print commands and files; contact no host, write nothing"
    )
    parser.add_argument("--check", action="store_true", help="check all hosts and stop; exit status 2 if a check fails")
    parser.add_argument(
        "--accept",
        action="append",
        default=[],
        choices=CHECKS,
        metavar="CHECK",
        help=f"start even if this check fails; may be given several times: {', '.join(CHECKS)}",
    )
    parser.add_argument(
        "--max-restarts",
        type=at_least(0),
        default=0,
        metavar="N",
        help=(
            "restarts allowed after failures, on the remaining hosts, without a new checkpoint in between (default: 0)"
        ),
    )
    add_grace(parser)
    parser.add_argument(
        "--lost-after",
        type=seconds,
        default=30.0,
        metavar="SECONDS",
        help="a host that does not answer for this long is lost (default: 30)",
    )
    parser.add_argument(
        "--port",
        type=at_least(1),
        default=0,
        metavar="PORT",
        help="port of this machine that the agents connect to (default: any free one)",
    )
    parser.add_argument(
        "--address",
        type=without_brackets,
        metavar="ADDRESS",
        help="address of this machine that the agents connect to (default: the first of its addresses that answers)",
    )
    parser.add_argument(
        "--ssh-port",
        type=at_least(1),
        metavar="PORT",
        help="ssh port of the hosts, if it is not 22 or in ~/.ssh/config",
    )
    parser.add_argument(
        "--master-port",
        type=at_least(1),
        default=0,
        metavar="PORT",
        help="rendezvous port of the ranks (MASTER_PORT) on rank 0's host (default: any free one)",
    )


@unhurried_output()
def run(args: argparse.Namespace) -> dict[str, Any]:
    """Check the hosts, run the job with restarts, and return its outcome; `passed` is true for exit status 0."""
    _require_used(args)
    environment, own = collect_environment(os.environ), dict(os.environ)
    for line in explain_not_passed_on(os.environ) if args.launcher in OVER_SSH else ():
        say(line)
    choose_accelerator()  # for this process: the agents get the environment as it was
    asked = request(args)
    recipe = load(asked)
    hosts = _hosts(args, recipe)
    start = resolve(recipe, asked, usable(recipe, sum(host.slots for host in hosts)))
    asked = replace(asked, run_dir=start.run_dir.resolve())
    options = LaunchOptions(
        args.launcher,
        Path.cwd(),
        args.lost_after,
        args.grace,
        args.port,
        args.address,
        args.ssh_port,
        args.master_port,
        own,
    )
    job = Job(asked, start.recipe, environment, _needs(asked, start.recipe), args.accept)
    if args.dry_run:
        return _show(job, hosts, options)
    require(options.launcher)
    allow_open_files()  # a connection of every host
    with catch_stop_signals() as stop_signals:
        supervisor = Supervisor(job, hosts, options, Restarts(asked.run_dir, args.max_restarts), stop_signals)
        if args.check:
            supervisor.check()
            return {"passed": True, "hosts": [host.name for host in hosts]}
        return _train(supervisor, recipe.train.steps)


def _train(supervisor: Supervisor, steps: int) -> dict[str, Any]:
    """Run the job to its end and return its report; `steps`: of the whole run."""
    run_dir, stop_signals, restarts = supervisor.job.asked.run_dir, supervisor.stop_signals, supervisor.restarts
    before = rundir.read_outcome(run_dir)
    try:
        status = supervisor.run().status
    except Stopped as stopped:
        say(str(stopped))
        status = RESUBMIT
    if status:
        say(f"status {status}, restarts: {restarts.total}; results so far: {run_dir}")
    outcome = outcome_since(before, run_dir)
    if status == RESUBMIT:
        outcome = correct_stop_signal(run_dir, outcome, stop_signals.first, steps)
    report = {"passed": status == 0, "exit_status": status, "run_dir": str(run_dir)}
    return {**report, "restarts": restarts.total, **outcome}


def _require_used(args: argparse.Namespace) -> None:
    """Raise UserError for an option that the launcher does not use."""
    if args.ssh_port is not None and args.launcher not in OVER_SSH:
        raise UserError(f"--ssh-port: --launcher {args.launcher} does not use ssh")
    if args.hostfile is not None and args.launcher == "local":
        raise UserError(
            "--hostfile: --launcher local starts the ranks on this machine; `ranks=N` after the recipe sets their "
            "number"
        )


def _hosts(args: argparse.Namespace, recipe: Recipe) -> list[Host]:
    if args.hostfile is not None:
        return read_hostfile(args.hostfile)
    if args.launcher == "slurm":
        return slurm_hosts()
    if args.launcher == "local":
        return [Host("localhost", default_ranks(recipe))]
    raise HostError("which hosts? give --hostfile FILE, --launcher slurm inside an allocation, or --launcher local")


def _needs(asked: Request, recipe: Recipe) -> Needs:
    """Return what every host must have: files, the run directory, disk space, and memory for the model."""
    corpora = [Path(url) / MANIFEST for url in recipe.data.urls() if "://" not in url]
    files = [find(asked.recipe, RECIPES), deepspeed_file(recipe), *corpora]
    with weightless():
        parameters = sum(parameter.numel() for parameter in LanguageModel(recipe.model).parameters())
    space = space_for_checkpoints(asked.run_dir, parameters)
    return Needs([path.resolve() for path in files], asked.run_dir, space, parameters)


def _show(job: Job, hosts: Sequence[Host], options: LaunchOptions) -> dict[str, Any]:
    """Print the commands and the files that they read and write; uses neither the launcher nor the hosts."""
    asked, recipe = job.asked, job.recipe
    called = f"{options.address or 'ADDRESS'}:{options.port or 'PORT'}"
    agent = agent_command(called, "JOB", options)
    lines = {
        "agents": shlex.join(LAUNCHERS[options.launcher](hosts, options.directory, agent)),
        "ranks": shlex.join(program(asked)),
        "environment": format_environment(job.environment),
    }
    world = usable(recipe, sum(host.slots for host in hosts))
    placed = shares(hosts, world, "ADDRESS", 0)
    for host, share in placed.items():
        print(f"{host:<12} ranks {share.first} to {share.first + share.count - 1} of {share.world}")
    if unused := idle(hosts, placed):
        print(f"{'idle':<12} {unused}")
    if imbalance := spread_of(recipe, world).imbalance_message(recipe.parallel.sp):
        print(f"{'masked':<12} {imbalance}")
    for name, text in lines.items():
        print(f"{name:<12} {text}")
    files = [*map(str, job.needs.files)]
    print("\n".join(f"{'reads':<12} {path}" for path in files) + f"\n{'writes':<12} {asked.run_dir}")
    placed_ranks = {host: [share.first, share.count] for host, share in placed.items()}
    return {"passed": True, **lines, "hosts": placed_ranks, "reads": files, "writes": str(asked.run_dir)}
