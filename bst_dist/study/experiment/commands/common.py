"""What the commands about an experiment have in common."""

from __future__ import annotations

import argparse

from bst_base.shipped import RECIPES
from bst_dist.study.experiment.config import ExperimentConfig, load_experiment
from bst_dist.study.experiment.design import Trial, trials
from bst_dist.study.runs.command import Study, add_file
from bst_dist.study.runs.state import State


def add_experiment(parser: argparse.ArgumentParser) -> None:
    """The experiment's file and settings that differ from it."""
    add_file(parser, "experiment", RECIPES)


def open_experiment(args: argparse.Namespace) -> tuple[ExperimentConfig, list[Trial], Study]:
    """The experiment that the arguments name, its runs, and these as they are trained."""
    experiment = load_experiment(args.file, args.overrides)
    found = trials(experiment)
    state = State(experiment.directory, experiment.retries)
    return experiment, found, Study("experiment", experiment.name, found, state)
