"""Evaluate the finished runs of an experiment, and print and write its table.

    bst experiment report launch/recipes/ablations/ssm.yaml

What was evaluated before is read again. The table goes into the experiment's directory as table.json, table.csv,
report.md and report.html, with the figure as PNG and PDF. Runs that are not done are said to be so.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from bst_dist.study.experiment.config import ExperimentConfig, load_experiment
from bst_dist.study.experiment.design import Trial, trials
from bst_dist.study.experiment.measure import measure_run
from bst_dist.study.experiment.present import show, write_report
from bst_dist.study.experiment.table import gather, write
from bst_dist.study.report.terminal import say
from bst_dist.study.runs.state import State


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("experiment", type=Path, metavar="EXPERIMENT", help="the experiment's YAML file")
    parser.add_argument("overrides", nargs="*", metavar="section.field=value", help="settings that differ from it")


def run(args: argparse.Namespace) -> dict[str, Any]:
    experiment = load_experiment(args.experiment, args.overrides)
    return report(experiment, trials(experiment))


def report(experiment: ExperimentConfig, found: list[Trial]) -> dict[str, Any]:
    """Measure, print and write; returns the table for machines."""
    state, measured = State(experiment.directory, experiment.retries), []
    for trial in found:
        standing = state.standing(trial)
        done = standing.status == "done"
        kept = experiment.directory / "lengths"
        own = measure_run(state.directory(trial.name), experiment.measure, kept, say) if done else None
        measured.append((trial, standing, own))
    table = gather(experiment, measured)
    show(table)
    files = [*write(table, experiment.results), *write_report(table, experiment.results)]
    say("wrote " + ", ".join(str(path) for path in files))
    return table.report()
