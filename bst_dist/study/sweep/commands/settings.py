"""Every setting of a sweep's file: its name, type, default and meaning; or those of one section.

    bst sweep settings
    bst sweep settings rules
    bst sweep settings --markdown > docs/sweep-settings.md

Every setting can be changed on the command line, directly after the file, as section.field=value.
"""

from __future__ import annotations

import argparse
from typing import Any

from bst_dist import describe
from bst_dist.study.sweep.config import SweepConfig

INTRODUCTION = """# Settings of a sweep

    bst sweep design launch/sweeps/mini.yaml noise.seed=0.01

A sweep is one YAML file. Change a setting on the command line by its dotted name, directly after the file; for an
unknown name, the error names the nearest one. What a sweep is for, and what it rejects: [sweeps](sweeps.md).
`settings`, `arms`, `kernels` and `architectures` hold settings of the [recipe](recipes.md). `bst sweep settings
SECTION` prints a part of this page, and `bst sweep settings --markdown` prints all of it."""

add_arguments = describe.add_arguments


def run(args: argparse.Namespace) -> dict[str, Any]:
    return describe.describe(SweepConfig, INTRODUCTION, args, top="sweep")
