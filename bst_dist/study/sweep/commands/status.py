"""Show the progress of a sweep's runs.

    bst sweep status launch/sweeps/mini.yaml

Failed and diverged runs are listed with the reason; they stay in the table.
"""

from __future__ import annotations

import argparse
from typing import Any

from bst_dist.study.runs.command import show_status
from bst_dist.study.sweep.commands.common import add_sweep, open_plan

add_arguments = add_sweep


def run(args: argparse.Namespace) -> dict[str, Any]:
    return show_status(open_plan(args)[1])
