"""Train what is missing of an experiment, evaluate, and print its table.

    bst experiment run launch/recipes/ablations/ssm.yaml

An experiment is a file: a base recipe beside it, arms by name with their settings, and what is measured:

    name: window
    question: Is a window of 64 better than one of 32?
    recipe: base.yaml
    arms: {narrow: {model.block: 32}, wide: {model.block: 64}}
    reference: narrow
    seeds: [0, 1, 2]
    measure: {lengths: [256, 4096], tokens: 131072}

May be stopped or killed at any moment and given again: it goes on from what the run directories say. Runs that several
experiments have in common are trained once. Every field of the file is documented in
bst_dist/study/experiment/config.py.
"""

from __future__ import annotations

import argparse
import time
from collections import Counter
from typing import Any

from rich.console import Console

from bst_dist.study.experiment.commands import report
from bst_dist.study.experiment.config import load_experiment
from bst_dist.study.experiment.design import Trial, require_corpora, trials
from bst_dist.study.runs.runner import Runner, Worker
from bst_dist.study.runs.state import State
from bst_dist.study.sweep.commands.common import say


def add_arguments(parser: argparse.ArgumentParser) -> None:
    report.add_arguments(parser)
    parser.add_argument("--workers", type=int, default=1, metavar="N", help="runs to train at a time on this host")


def run(args: argparse.Namespace) -> dict[str, Any]:
    experiment = load_experiment(args.experiment, args.overrides)
    found = trials(experiment)
    require_corpora(found)
    state, started = State(experiment.directory, experiment.retries), time.monotonic()
    train(found, state, args.workers)
    counts = Counter(state.standing(trial).status for trial in found)
    say(f"{experiment.name}: " + ", ".join(f"{n} {status}" for status, n in counts.items())
        + f" after {time.monotonic() - started:.0f} s")  # fmt: skip
    return {"passed": counts["done"] == len(found), **report.report(experiment, found)}


def train(found: list[Trial], state: State, workers: int) -> None:
    """Train until nothing is left to start, telling on a terminal how far each run is."""
    console = Console()
    done = sum(state.standing(trial).status == "done" for trial in found)
    say(f"{done} of {len(found)} runs are done")
    with console.status("") as status:

        def tell(text: str) -> None:
            console.print(text, markup=False, highlight=False, soft_wrap=True)  # above the line that is kept below

        def watch(running: list[Worker]) -> None:
            if console.is_terminal:
                status.update("; ".join(_progress(worker, state) for worker in running) or "waiting for other commands")

        Runner(found, state, workers, tell).run(watch)


def _progress(worker: Worker, state: State) -> str:
    line = state.progress(worker.run.name)
    step = line["step"] if line else 0
    loss = f", {line['bits_per_byte']:.3f} bits/byte" if line else ""
    return f"{worker.run.name}: step {step} of {worker.run.recipe.train.steps}{loss}"
