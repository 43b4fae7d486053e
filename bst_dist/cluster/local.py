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

Exit status: 0 the steps asked for are done; 2 something given is wrong; 75 stopped by a signal, with a checkpoint:
start it again with --resume; 74 a host could not read or write a file, or a file system hangs: likewise; 70 the ranks
hung: likewise; otherwise the failed rank's own, 128 + N after signal N.
"""

from __future__ import annotations

import argparse
import math
import os
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from bst_base.arguments import at_least, seconds
from bst_base.errors import UserError
from bst_base.host import free_port, without_brackets
from bst_dist.checkpoint.directory import committed, step_of
from bst_dist.cluster.printing import unhurried_output
from bst_dist.cluster.processes import LocalRanks, Share, told_to_stop
from bst_dist.cluster.verdict import STOP, Ended
from bst_dist.config import Recipe
from bst_dist.model.weightless import weightless
from bst_dist.parallel.ranks import choose_accelerator, require_accelerator
from bst_dist.train import rundir
from bst_dist.train.__main__ import add_arguments as add_program_arguments
from bst_dist.train.__main__ import request
from bst_dist.train.start.request import Request, Start, load, resolve


def add_grace(parser: argparse.ArgumentParser) -> None:
    """How long a stop may take; whoever sends the signal has a limit of his own, and may tell it."""
    parser.add_argument("--grace", type=seconds, default=math.inf, metavar="SECONDS", help=(
        "after a signal, kill the ranks if their checkpoint takes longer than this (default: no limit; a second "
        "Ctrl-C ends them at once)"
    ))  # fmt: skip


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_program_arguments(parser)
    parser.add_argument("--ranks", type=at_least(1), metavar="N", help=(
        "processes to start (default: the recipe's number, or one per accelerator, or one)"
    ))  # fmt: skip
    parser.add_argument(
        "--nodes", type=at_least(1), default=1, metavar="N", help="hosts that run this command (default: 1)"
    )
    parser.add_argument(
        "--node",
        type=at_least(0),
        default=0,
        metavar="I",
        help="with --nodes: which of them this is, from 0 (default: 0)",
    )
    parser.add_argument("--master", metavar="ADDRESS:PORT", help="with --nodes: where node 0 is; an IPv6 "
                        "address in brackets")  # fmt: skip
    parser.add_argument("--check", action="store_true", help="only check the recipe: start no rank, write nothing")
    add_grace(parser)


@unhurried_output()
def run(args: argparse.Namespace) -> dict[str, Any]:
    """Check, start, wait; the report is the run's outcome, with `passed` false unless all ranks were done."""
    require_accelerator()
    choose_accelerator()
    asked = request(args)
    recipe = load(asked)
    share = share_of(args, recipe)
    start = resolve(recipe, asked, share.world)
    if args.check:
        return check(start, share)
    before = rundir.read_outcome(start.run_dir)  # of the start before: it stays when the ranks refuse to begin
    ended = launch(program(asked), share, args.grace)
    if why := ended.explain({}):
        print(f"bst train: {why}; results so far: {start.run_dir}", file=sys.stderr)
    outcome = rundir.read_outcome(start.run_dir)
    outcome = {} if outcome is None or outcome == before else outcome
    if share.first == 0:
        outcome = told_apart(start.run_dir, outcome, ended.told, recipe.train.steps)
    report = {"passed": ended.status == 0, "exit_status": ended.status, "run_dir": str(start.run_dir)}
    return {**report, "ranks": share.world, **outcome}


def told_apart(run_dir: Path, outcome: dict[str, Any], told: int | None, steps: int) -> dict[str, Any]:
    """The outcome of a start by the signal that its launching process was told to stop by: the ranks only heard SIGTERM
    from it, and have left it to say the last line. Without a signal they were told by something else."""
    if "stopped" not in outcome:
        return outcome
    if told:
        outcome = outcome | {"stopped": signal.Signals(told).name}
        rundir.finish(run_dir, outcome)
    print(rundir.closing(outcome, steps), flush=True)
    return outcome


def check(start: Start, share: Share) -> dict[str, Any]:
    """Say what would be trained; the model is built without memory for its weights, so that its layers check their
    settings too."""
    recipe = start.recipe
    with weightless():
        parameters = sum(parameter.numel() for parameter in start.objective.model().parameters())
    train, done = recipe.train, committed(start.run_dir)
    tokens = train.sequences * train.sequence_length
    lines = {
        "run": f"{start.run_dir}, {f'from step {step_of(done[0])}' if done else 'from step 0'} to {start.until}",
        "model": f"{parameters / 1e6:,.2f} M parameters",
        "ranks": f"{share.world} (dp {share.world // recipe.parallel.sp} x sp {recipe.parallel.sp}), "
        f"ZeRO-{start.completed['zero_optimization']['stage']}, {train.precision}",
        "step": f"{tokens:,} tokens, micro-batches per rank: {start.spread.micro_batches}",
        "total": f"{train.steps:,} steps, {train.tokens:,} tokens",
    }
    if unequal := start.spread.unequal(recipe.parallel.sp):
        lines["masked"] = unequal
    if start.changed:
        lines["change"] = f"{'; '.join(start.changed)} (before, from here on)"
    print("\n".join(f"{name:<6} {text}" for name, text in lines.items()))
    print("the recipe can be trained; nothing was started")
    return {"passed": True, "run_dir": str(start.run_dir), "ranks": share.world, "parameters": parameters}


def share_of(args: argparse.Namespace, recipe: Recipe) -> Share:
    """This machine's ranks among all; raises UserError when the arguments name no place among the nodes."""
    count = args.ranks or default_ranks(recipe)
    if args.nodes == 1 and args.master is None:
        return Share(0, count, count, "127.0.0.1", free_port())
    address, _, port = (args.master or "").rpartition(":")
    if not address or not port.isdigit() or not 0 <= args.node < args.nodes:
        raise UserError(f"--node {args.node} of --nodes {args.nodes}: nodes count from 0, and --master ADDRESS:PORT "
                        "says where node 0 is")  # fmt: skip
    return Share(args.node * count, count, args.nodes * count, without_brackets(address), int(port))


def default_ranks(recipe: Recipe) -> int:
    """Ranks for this machine when the command line names none."""
    if recipe.ranks:
        return recipe.ranks
    return torch.accelerator.device_count() if torch.accelerator.is_available() else 1


def program(asked: Request) -> list[str]:
    """What every rank runs."""
    command = [sys.executable, "-m", "bst_dist.train", str(asked.recipe), *asked.overrides]
    command += ["--run-dir", str(asked.run_dir)] if asked.run_dir else []
    command += ["--resume"] if asked.resume else []
    command += ["--from-zero"] if asked.from_zero else []
    command += ["--replan-schedule"] if asked.replan else []
    return command + (["--until", str(asked.until)] if asked.until else [])


def launch(
    command: Sequence[str], share: Share, grace_s: float = math.inf, notice: str = f"bst train: {STOP}"
) -> Ended:
    """Run `command` as all ranks of one host, to their end; no process of theirs is left then.

    A signal makes them stop, with `grace_s` for a checkpoint, and one that comes again later ends them at once; when
    one fails the others are ended. `notice`: what is printed at the signal, with a place for its name.
    """
    ended, give_up, passed_on = Ended(share.count), float("inf"), 0
    with told_to_stop() as told:
        ranks = LocalRanks(command, share, os.environ)
        while ranks.running and time.monotonic() < give_up:
            time.sleep(0.1)
            if told and ended.told is None:
                ended.told = told[0]
                print(notice.format(signal.Signals(told[0]).name), file=sys.stderr, flush=True)
                ranks.terminate(grace_s)
            elif len(told) > 1:
                ended.at_once = True
                ranks.kill()
            elif told.repeats > passed_on:
                passed_on = told.repeats
                ranks.remind()
            ended.statuses, ended.when = ranks.poll(), ranks.ended_at
            if ended.failed:
                give_up = min(give_up, time.monotonic() + ended.settle_s)
        ended.statuses, ended.when = ranks.poll(), ranks.ended_at
        ranks.kill()
    return ended
