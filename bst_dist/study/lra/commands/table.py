"""Compare Long Range Arena runs of one task: accuracy, standard error, 95 % interval, means over seeds.

    bst lra table runs/lra-listops runs/lra-listops-full

Evaluate the runs first: `bst lra eval RUN`. A run's standard error is over its test examples, that of a mean over seeds
is over the seeds.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from bst_base.terminal import Sheet, print_table, say
from bst_dist.study.lra.table import Mean, Row, means, rows
from bst_dist.study.lra.tasks import SPLITS
from bst_dist.study.statistics import entries


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("runs", nargs="+", metavar="RUN", type=Path, help="directories of runs")
    parser.add_argument(
        "--split", choices=SPLITS, default="test", help="the split they were evaluated on (default: test)"
    )


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Print the tables."""
    found = rows(args.runs, args.split)
    grouped, first = means(found), found[0].report
    say(f"{first.task}, {args.split} split: {first.examples:,} examples")
    say(f"always the most frequent class: {first.majority_accuracy:.2%}\n")
    print_table(_of_runs(found))
    print_table(_of_means(grouped))
    runs = [{"run": row.run, "model": row.model, "seed": row.seed, **asdict(row.report)} for row in found]
    return {"runs": runs, "means": entries(grouped)}


def _of_runs(found: Sequence[Row]) -> Sheet:
    rows = [
        [
            row.run,
            row.model,
            str(row.seed),
            f"{row.report.step:,}",
            f"{row.report.accuracy:.2%} ± {row.report.accuracy_standard_error:.2%}",
            f"{row.report.accuracy_low_95:.2%} to {row.report.accuracy_high_95:.2%}",
        ]
        for row in found
    ]
    return Sheet(("run", "model", "seed", "steps", "accuracy", "95 % interval"), rows)


def _of_means(grouped: Sequence[Mean]) -> Sheet:
    rows = []
    for group in grouped:
        accuracy = group.accuracy_mean
        spread = "" if accuracy.standard_error is None else f" ± {accuracy.standard_error:.2%}"
        rows.append(
            [group.model, f"{group.parameters:,}", f"{group.step:,}", str(group.seeds), f"{accuracy.value:.2%}{spread}"]
        )
    return Sheet(("model", "parameters", "steps", "seeds", "mean accuracy"), rows)
