"""Arguments and inputs shared by the `bst experiment` commands."""

from __future__ import annotations

import argparse

from bst_base.shipped import RECIPES
from bst_dist.study.experiment.config import ExperimentConfig, load_experiment
from bst_dist.study.experiment.design import Trial, trials
from bst_dist.study.runs.command import Study, add_file
from bst_dist.study.runs.state import State


def add_experiment(parser: argparse.ArgumentParser) -> None:
    """Add the arguments for the experiment's file and for settings that override it."""
    add_file(parser, "experiment", RECIPES)


def open_experiment(args: argparse.Namespace) -> tuple[ExperimentConfig, list[Trial], Study]:
    """Load the experiment that the arguments name; return it, its runs, and the study that trains them."""
    experiment = load_experiment(args.file, args.overrides)
    found = trials(experiment)
    state = State(experiment.directory, experiment.retries)
    return experiment, found, Study("experiment", experiment.name, found, state)
