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
from typing import Any

from bst_dist.study.experiment.commands import report
from bst_dist.study.experiment.config import load_experiment
from bst_dist.study.experiment.design import require_corpora, trials
from bst_dist.study.runs import training
from bst_dist.study.runs.state import State


def add_arguments(parser: argparse.ArgumentParser) -> None:
    report.add_arguments(parser)
    parser.add_argument("--workers", type=int, default=1, metavar="N", help="runs to train at a time on this host")


def run(args: argparse.Namespace) -> dict[str, Any]:
    experiment = load_experiment(args.experiment, args.overrides)
    found = trials(experiment)
    require_corpora(found)
    state = State(experiment.directory, experiment.retries)
    counts = training.train(experiment.name, found, state, args.workers, lambda trial: trial.tokens)
    return {"passed": counts["done"] == len(found), **report.report(experiment, found)}
