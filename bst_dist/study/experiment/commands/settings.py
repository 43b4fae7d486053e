"""Every setting of an experiment's file: its name, type, default and meaning; or those of one section.

    bst experiment settings
    bst experiment settings measure
    bst experiment settings --markdown > docs/experiment-settings.md

Every setting can be changed on the command line, directly after the file, as section.field=value.
"""

from __future__ import annotations

import argparse
from typing import Any

from bst_dist import describe
from bst_dist.study.experiment.config import ExperimentConfig

INTRODUCTION = """# Settings of an experiment

    bst experiment run launch/recipes/ablations/ssm.yaml seeds=[0] measure.speed=true

An experiment is one YAML file. Change a setting on the command line by its dotted name, directly after the file; for an
unknown name, the error names the nearest one. What an experiment is for: [experiments](experiments.md). `settings`,
`arms` and `conditions` hold settings of the [recipe](recipes.md). `bst experiment settings SECTION` prints a part of
this page, and `bst experiment settings --markdown` prints all of it."""

add_arguments = describe.add_arguments


def run(args: argparse.Namespace) -> dict[str, Any]:
    return describe.describe(ExperimentConfig, INTRODUCTION, args, top="experiment")
