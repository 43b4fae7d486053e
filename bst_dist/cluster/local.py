"""Train a recipe on this machine's ranks.

    bst train launch/recipes/demo.yaml
    bst train launch/recipes/demo.yaml train.steps=200 optimizer.learning_rate=3e-4 --run-dir runs/shorter
    bst train launch/recipes/demo.yaml --resume
    bst train runs/demo --resume
    bst train my-recipe.yaml --check
    bst train my-recipe.yaml --ranks 8 --nodes 4 --node 2 --master node-00:29500

First the recipe is checked against the corpus, the DeepSpeed file, the run directory and the number of ranks; --check
stops there. Then one process is started per rank. Give a run's directory in place of the recipe to continue that run
with the same settings. For several hosts use `bst launch`; where no host can start a process on another, as in
Kubernetes, run this command on each with its own --node.

A signal (Ctrl-C, SIGTERM, SIGUSR1, a closed terminal) makes all ranks write a checkpoint and stop. A second Ctrl-C ends
them at once and loses what was trained since the last checkpoint. Repeating any other signal changes nothing, unless a
file system of the run hangs so that no checkpoint can be written: then it ends the ranks.

Exit status: 0: all requested steps are done. 2: the arguments or the recipe are wrong, or the run diverged. 75: stopped
by a signal, with a checkpoint if --grace was long enough. 74: a host could not read or write a file, or a file system
hangs. 70: the ranks hung. After 75, 74 and 70 start it again with --resume. Otherwise the failed rank's own status, 128
+ N after signal N.
"""

from __future__ import annotations

import argparse
import math
import os
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from bst_base.arguments import at_least, seconds
from bst_base.errors import UserError
from bst_base.host import free_port, without_brackets
from bst_base.memory import available_memory
from bst_dist.checkpoint.retention import readable
from bst_dist.cluster.printing import unhurried_output
from bst_dist.cluster.processes import HostRanks, LocalRanks, catch_stop_signals
from bst_dist.cluster.verdict import STOP, Ended
from bst_dist.config import Recipe
from bst_dist.model.meta_device import weightless
from bst_dist.parallel.ranks import choose_accelerator, require_accelerator
from bst_dist.train import rundir
from bst_dist.train.__main__ import add_arguments as add_program_arguments
from bst_dist.train.__main__ import request
from bst_dist.train.start.host_memory import shortage
from bst_dist.train.start.request import Request, Start, load, resolve


def add_grace(parser: argparse.ArgumentParser) -> None:
    """Add the option --grace: how long a stop may take. A scheduler that sends the signal has such a limit too."""
    parser.add_argument(
        "--grace",
        type=seconds,
        default=math.inf,
        metavar="SECONDS",
        help=(
            "after a signal, kill the ranks if their checkpoint takes longer than this (default: no limit; a second "
            "Ctrl-C ends them at once)"
        ),
    )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_program_arguments(parser)
    parser.add_argument(
        "--ranks",
        type=at_least(1),
        metavar="N",
        help=(
            "processes to start on this machine (default: the recipe's `ranks`; if that is null, one per accelerator, "
            "or one on a CPU)"
        ),
    )
    parser.add_argument(
        "--nodes",
        type=at_least(1),
        default=1,
        metavar="N",
        help="number of hosts that run this command, each with its own --node (default: 1)",
    )
    parser.add_argument(
        "--node",
        type=at_least(0),
        default=0,
        metavar="I",
        help="with --nodes: which of them this is, from 0 (default: 0)",
    )
    parser.add_argument(
        "--master",
        metavar="ADDRESS:PORT",
        help="with --nodes: address of node 0 and a free port there; an IPv6 address in brackets",
    )
    parser.add_argument("--check", action="store_true", help="only check the recipe: start no rank, write nothing")
    add_grace(parser)


@unhurried_output()
def run(args: argparse.Namespace) -> dict[str, Any]:
    """Check the recipe, run its ranks, and return the run's outcome; `passed` is true for exit status 0."""
    require_accelerator()
    choose_accelerator()
    asked = request(args)
    recipe = load(asked)
    share = share_of(args, recipe)
    start = resolve(recipe, asked, share.world)
    if args.check:
        return check(start, share)
    before = rundir.read_outcome(start.run_dir)
    ended = launch(program(asked), share, args.grace)
    if why := ended.explain({}):
        print(f"bst train: {why}; results so far: {start.run_dir}", file=sys.stderr)
    outcome = outcome_since(before, start.run_dir)
    if share.first == 0:
        outcome = correct_stop_signal(start.run_dir, outcome, ended.stop_signal, recipe.train.steps)
    report = {"passed": ended.status == 0, "exit_status": ended.status, "run_dir": str(start.run_dir)}
    return {**report, "ranks": share.world, **outcome}


def outcome_since(before: Mapping[str, Any] | None, run_dir: Path) -> dict[str, Any]:
    """Return the outcome that the ranks have written; `before`: that of the previous start, as it was before this one.

    Empty if the ranks were killed, or refused to begin, which leaves the file unchanged.
    """
    outcome = rundir.read_outcome(run_dir)
    return {} if outcome is None or outcome == before else outcome


def correct_stop_signal(run_dir: Path, outcome: dict[str, Any], stop_signal: int | None, steps: int) -> dict[str, Any]:
    """Correct the signal in the outcome of a stopped start, and print its last line.

    `stop_signal`: the signal that the launching process received. The ranks only received SIGTERM from it,
    and left the last line to it. None: the ranks received a signal from elsewhere, and the outcome is already correct.
    """
    if "stopped" not in outcome:
        return outcome
    if stop_signal:
        outcome = outcome | {"stopped": signal.Signals(stop_signal).name}
        rundir.finish(run_dir, outcome)
    print(rundir.closing(outcome, steps), flush=True)
    return outcome


def check(start: Start, share: HostRanks) -> dict[str, Any]:
    """Print what would be trained.

    The model is built without memory for its weights, so that its layers check their settings too.
    """
    recipe = start.recipe
    with weightless():
        parameters = sum(parameter.numel() for parameter in start.objective.model().parameters())
    train = recipe.train
    tokens = train.sequences * train.sequence_length
    lines = {
        "run": f"{start.run_dir}, from step {_first_step(start)} to {start.until}",
        "model": f"{parameters / 1e6:,.2f} M parameters",
        "ranks": f"{share.world} (dp {share.world // recipe.parallel.sp} x sp {recipe.parallel.sp}), "
        f"ZeRO-{start.completed['zero_optimization']['stage']}, {train.precision}",
        "step": f"{tokens:,} tokens, micro-batches per rank: {start.spread.micro_batches}",
        "total": f"{train.steps:,} steps, {train.tokens:,} tokens",
    }
    if imbalance := start.spread.imbalance_message(recipe.parallel.sp):
        lines["masked"] = imbalance
    if message := shortage(parameters, share.count, available_memory()):
        lines["memory"] = message
    if start.changed:
        lines["change"] = f"{'; '.join(start.changed)} (before, from here on)"
    print("\n".join(f"{name:<6} {text}" for name, text in lines.items()))
    print("the recipe can be trained; nothing was started")
    return {"passed": True, "run_dir": str(start.run_dir), "ranks": share.world, "parameters": parameters}


def _first_step(start: Start) -> int:
    """Return the step that the run would continue from; no run continues from a weights-only checkpoint."""
    for one in readable(start.run_dir):
        if one.full:
            return one.step
    return start.recipe.branch.step if start.recipe.branch else 0


def share_of(args: argparse.Namespace, recipe: Recipe) -> HostRanks:
    """Return this machine's share of the ranks; raises UserError when --node, --nodes and --master do not fit."""
    count = args.ranks or default_ranks(recipe)
    if args.nodes == 1 and args.node == 0 and args.master is None:
        return HostRanks(0, count, count, "127.0.0.1", free_port())
    address, _, port = (args.master or "").rpartition(":")
    if not address or not port.isdigit() or not 0 <= args.node < args.nodes:
        raise UserError(
            f"--node {args.node} of --nodes {args.nodes}: nodes count from 0, and --master ADDRESS:PORT "
            "says where node 0 is"
        )
    return HostRanks(args.node * count, count, args.nodes * count, without_brackets(address), int(port))


def default_ranks(recipe: Recipe) -> int:
    """Return the number of ranks on this machine when the command line does not set it."""
    if recipe.ranks:
        return recipe.ranks
    return torch.accelerator.device_count() if torch.accelerator.is_available() else 1


def program(asked: Request) -> list[str]:
    """Return the command line of a rank."""
    command = [sys.executable, "-m", "bst_dist.train", str(asked.recipe), *asked.overrides]
    command += ["--run-dir", str(asked.run_dir)] if asked.run_dir else []
    command += ["--resume"] if asked.resume else []
    command += ["--from-zero"] if asked.from_zero else []
    command += ["--replan-schedule"] if asked.replan else []
    return command + (["--until", str(asked.until)] if asked.until else [])


def launch(
    command: Sequence[str], share: HostRanks, grace_s: float = math.inf, notice: str = f"bst train: {STOP}"
) -> Ended:
    """Run `command` as all ranks of one host until they end; no process of theirs is left afterwards.

    A signal makes them stop, with `grace_s` for a checkpoint; a second Ctrl-C kills them immediately. When one rank
    fails the others are ended. `notice`: the message printed at a signal, with a placeholder for its name.
    """
    ended, give_up, passed_on = Ended(share.count), float("inf"), 0
    with catch_stop_signals() as stop_signals:
        ranks = LocalRanks(command, share, os.environ)
        while ranks.running and time.monotonic() < give_up:
            time.sleep(0.1)
            if stop_signals.first is not None and ended.stop_signal is None:
                ended.stop_signal = stop_signals.first
                print(notice.format(signal.Signals(stop_signals.first).name), file=sys.stderr, flush=True)
                ranks.terminate(grace_s)
            elif stop_signals.at_once:
                ended.at_once = True
                ranks.kill()
            elif stop_signals.repeats > passed_on:
                passed_on = stop_signals.repeats
                ranks.remind()
            ended.statuses, ended.when = ranks.poll(), ranks.ended_at
            if ended.failed:
                give_up = min(give_up, time.monotonic() + ended.settle_s)
        ended.statuses, ended.when, ended.cut_short = ranks.poll(), ranks.ended_at, ranks.cut_short
        ranks.kill()
    return ended
