"""Measure the accuracy of a Long Range Arena run on its test split, with its uncertainty.

    bst lra eval runs/lra-listops
    bst lra eval runs/lra-listops --split validation --step 4000

The result is also kept in the run directory, for `bst lra table`.
"""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path
from typing import Any

from bst_base.arguments import at_least
from bst_base.outputs import write_afterwards
from bst_base.terminal import say
from bst_dist.study.lra.evaluate import evaluate, keep, open_classifier
from bst_dist.study.lra.tasks import SPLITS


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", metavar="RUN", type=Path, help="directory of a run")
    parser.add_argument("--split", choices=SPLITS, default="test", help="the split to evaluate on (default: test)")
    parser.add_argument("--step", type=int, metavar="N", help="the checkpoint after N steps (default: the newest)")
    parser.add_argument("--rows", type=at_least(1), default=64, metavar="N", help="examples at a time (default: 64)")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Evaluate the run, print the accuracy and store the report in the run directory."""
    report = evaluate(open_classifier(args.run, args.step), args.split, args.rows)
    write_afterwards(args, lambda: keep(args.run, report))
    accuracy = f"{report.accuracy:.2%} ± {report.accuracy_standard_error:.2%}"
    say(
        f"{args.run} after {report.step:,} steps: {accuracy} of {report.examples:,} examples of {report.task} "
        f"({args.split})\n95 % interval {report.accuracy_low_95:.2%} to {report.accuracy_high_95:.2%}; "
        f"always the most frequent class: {report.majority_accuracy:.2%}"
    )
    return {"run": str(args.run), **asdict(report)}
