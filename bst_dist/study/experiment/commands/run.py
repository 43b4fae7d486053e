"""Train the missing runs of an experiment, evaluate them, and print its table.

    bst experiment run launch/recipes/ablations/ssm.yaml

An experiment is a file that names a base recipe beside it, arms with their settings, and what to measure:

    name: window
    question: Is a window of 64 better than one of 32?
    recipe: base.yaml
    arms: {narrow: {model.block: 32}, wide: {model.block: 64}}
    reference: narrow
    seeds: [0, 1, 2]
    measure: {lengths: [256, 4096], tokens: 131072}

You can stop or kill the command at any time and start it again: it continues from the run directories. Runs that
several experiments share are trained once. `bst experiment settings` explains every setting of the file. --hostfile and
--slurm train the runs on several hosts, as in `bst sweep run`; --dry-run starts nothing.
"""

from __future__ import annotations

import argparse
from typing import Any

from bst_dist.study.experiment.commands.common import add_experiment, open_experiment
from bst_dist.study.experiment.commands.report import report
from bst_dist.study.experiment.design import require_corpora
from bst_dist.study.runs.command import add_training, check_training, train


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_experiment(parser)
    add_training(parser)


def run(args: argparse.Namespace) -> dict[str, Any]:
    check_training(args)
    experiment, found, study = open_experiment(args)
    if not args.dry_run:
        require_corpora(found)
    trained = train(args, study)
    if "passed" not in trained:  # only shown, or submitted
        return trained
    return {"passed": trained["passed"], **report(args, experiment, found, study.state)}
