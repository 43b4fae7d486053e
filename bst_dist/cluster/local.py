"""Train a recipe on this machine's ranks.

    bst train launch/recipes/demo.yaml
    bst train launch/recipes/demo.yaml train.steps=200 optimizer.learning_rate=3e-4 --run-dir runs/shorter
    bst train launch/recipes/demo.yaml --resume

The recipe is checked first, against the corpus, the DeepSpeed file, the run directory and the number of ranks; then
DeepSpeed's launcher starts one process a rank. On a cluster: deepspeed --hostfile HOSTS --module bst_dist.train RECIPE

Exit status: 0 the steps asked for are done; 2 something given is wrong; otherwise a rank's own status, or 1.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import psutil
import torch

from bst_dist.config import Recipe
from bst_dist.train import rundir
from bst_dist.train.__main__ import add_arguments as add_program_arguments
from bst_dist.train.__main__ import request
from bst_dist.train.ranks import choose_accelerator, free_port
from bst_dist.train.start import load, resolve

GRACE_S = 30.0
"""How long ranks may take to end by themselves; the launcher's own limit."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `bst train`."""
    add_program_arguments(parser)
    parser.add_argument("--ranks", type=int, metavar="N", help="processes to start (default: the recipe's, or one for "
                        "each accelerator, or one)")  # fmt: skip


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Check, launch, wait; the report is the run's outcome, with `passed` false when the launch failed."""
    choose_accelerator()
    asked = request(args)
    recipe = load(asked)
    world = args.ranks or default_ranks(recipe)
    start = resolve(recipe, asked, world)
    (start.run_dir / rundir.OUTCOME).unlink(missing_ok=True)
    status = launch(command(args, world), environment(world))
    outcome = rundir.read_outcome(start.run_dir)
    # The launcher says 0 when its own helper was killed (its status is negative then), so the ranks must have said so.
    if status == 0 and outcome is None:
        status = 1
    if status:
        print(f"bst train: failed with status {status}; what was reached is in {start.run_dir}", file=sys.stderr)
    return {"passed": status == 0, "status": status, "run_dir": str(start.run_dir), "ranks": world, **(outcome or {})}


def default_ranks(recipe: Recipe) -> int:
    """Ranks for this machine when the command line names none."""
    if recipe.ranks:
        return recipe.ranks
    return torch.accelerator.device_count() if torch.accelerator.is_available() else 1


def command(args: argparse.Namespace, world: int) -> list[str]:
    """The launcher's command line for `world` ranks on this machine."""
    # No hostfile, not even the one DeepSpeed looks for by itself: these ranks are all on this machine.
    launcher = [sys.executable, "-m", "deepspeed.launcher.runner", "--hostfile", os.devnull, "--log_level", "critical"]
    launcher += ["--num_gpus", str(world), "--master_port", str(free_port()), "--module", "bst_dist.train"]
    program = [str(args.recipe), *args.overrides]
    program += ["--run-dir", str(args.run_dir)] if args.run_dir else []
    program += ["--resume"] if args.resume else []
    program += ["--until", str(args.until)] if args.until else []
    return launcher + program


def environment(world: int) -> dict[str, str]:
    """The ranks' environment: on the CPU they share its cores."""
    threads = str(max(1, len(os.sched_getaffinity(0)) // world))
    on_cpu = {} if torch.accelerator.is_available() else {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", threads)}
    return {**os.environ, **on_cpu}


def launch(command: list[str], env: dict[str, str]) -> int:
    """Run the launcher to its end; returns its status, or another than 0 when it left ranks behind.

    The launcher and all its ranks are one process group: when this process is told to stop, or the launcher is gone
    before its ranks, the whole group is ended.
    """
    process = subprocess.Popen(command, env=env, start_new_session=True)
    with _told_to_stop() as told:
        while process.poll() is None and not told:
            time.sleep(0.1)
        status = process.poll()
        left_behind = _alive(process.pid)
        _end(process.pid)
        process.wait()
    if told:
        return 128 + told[0]
    return status or int(left_behind)


@contextmanager
def _told_to_stop() -> Iterator[list[int]]:
    """The signals SIGINT and SIGTERM that arrive while the block runs, in place of what they would do."""
    told: list[int] = []
    before = {number: signal.signal(number, lambda n, _: told.append(n)) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield told
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _end(group: int) -> None:
    """Ask a process group to end; after the grace, make it. Returns when it is gone."""
    deadline = time.monotonic() + GRACE_S
    if _alive(group):
        os.killpg(group, signal.SIGTERM)
    while _alive(group):
        if time.monotonic() > deadline:
            os.killpg(group, signal.SIGKILL)
        time.sleep(0.1)


def _alive(group: int) -> bool:
    """Whether any process of the group still runs; the dead that wait to be collected do not count."""
    for process in psutil.process_iter(["status"]):
        try:
            if os.getpgid(process.pid) == group and process.info["status"] != psutil.STATUS_ZOMBIE:
                return True
        except ProcessLookupError:
            continue
    return False
