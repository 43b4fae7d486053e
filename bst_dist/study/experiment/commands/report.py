"""Evaluate the finished runs of an experiment, and print and write its table.

    bst experiment report launch/recipes/ablations/ssm.yaml

Earlier evaluations are reused. The table is written into the experiment's directory as table.json, table.csv, report.md
and report.html, with the figure as PNG and PDF. Unfinished runs are listed.
"""

from __future__ import annotations

import argparse
from typing import Any

from bst_base.outputs import write_afterwards
from bst_base.terminal import say
from bst_dist.study.experiment.commands.common import add_experiment, open_experiment
from bst_dist.study.experiment.config import ExperimentConfig
from bst_dist.study.experiment.design import Trial
from bst_dist.study.experiment.measure import measure_run
from bst_dist.study.experiment.present import blocks, write_report
from bst_dist.study.experiment.table import gather, write
from bst_dist.study.report.terminal import show
from bst_dist.study.runs.state import State

add_arguments = add_experiment


def run(args: argparse.Namespace) -> dict[str, Any]:
    experiment, found, study = open_experiment(args)
    return report(args, experiment, found, study.state)


def report(args: argparse.Namespace, experiment: ExperimentConfig, found: list[Trial], state: State) -> dict[str, Any]:
    """Measure the finished runs and print the table; return the machine-readable report. The files come after it."""
    measured = []
    for trial in found:
        run_status = state.status_of(trial)
        done = run_status.status == "done"
        own = measure_run(trial.name, experiment.measure, state, say) if done else None
        measured.append((trial, run_status, own))
    table = gather(experiment, measured)
    show(blocks(table))

    def write_files() -> None:
        files = [*write(table, experiment.results), *write_report(table, experiment.results)]
        say("wrote " + ", ".join(str(path) for path in files))

    write_afterwards(args, write_files)
    return table.report()
