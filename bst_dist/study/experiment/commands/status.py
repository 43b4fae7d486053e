"""Show the progress of an experiment's runs.

    bst experiment status launch/recipes/ablations/ssm.yaml

Failed and diverged runs are listed with the reason; they stay in the table.
"""

from __future__ import annotations

import argparse
from typing import Any

from bst_dist.study.experiment.commands.common import add_experiment, open_experiment
from bst_dist.study.runs.command import show_status

add_arguments = add_experiment


def run(args: argparse.Namespace) -> dict[str, Any]:
    return show_status(open_experiment(args)[2])
