"""A table of Long Range Arena runs of one task: accuracy, its standard error and 95 % interval, means over seeds.

    bst lra table runs/lra-listops runs/lra-listops-full

Runs must have been evaluated: `bst lra eval RUN`. The standard error of a run is that of its test examples; of a mean
over seeds, that of the seeds.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from bst_dist.study.lra.table import Row, means, rows
from bst_dist.study.lra.tasks import SPLITS
from data_pipeline.commands.prepare import plain_table


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `bst lra table`."""
    parser.add_argument("runs", nargs="+", metavar="RUN", type=Path, help="directories of runs")
    parser.add_argument("--split", choices=SPLITS, default="test", help="what they were evaluated on (default: test)")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Print the tables."""
    found = rows(args.runs, args.split)
    grouped, first = means(found), found[0].report
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = 200  # a file has room for long names of runs
    console.print(f"{first['task']}, {args.split} split: {first['examples']:,} examples")
    console.print(f"always the most frequent class: {first['majority_accuracy']:.2%}\n")
    console.print(_of_runs(found))
    console.print()
    console.print(_of_means(grouped))
    runs = [{"run": row.run, "model": row.model, "seed": row.seed, **row.report} for row in found]
    return {"runs": runs, "means": grouped}


def _of_runs(found: Sequence[Row]) -> Table:
    table = plain_table("run", "model", "seed", "steps", "accuracy", "95 % interval")
    for row in found:
        report = row.report
        table.add_row(row.run, row.model, str(row.seed), f"{report['step']:,}",
                      f"{report['accuracy']:.2%} ± {report['accuracy_standard_error']:.2%}",
                      f"{report['accuracy_low_95']:.2%} to {report['accuracy_high_95']:.2%}")  # fmt: skip
    return table


def _of_means(grouped: Sequence[dict[str, Any]]) -> Table:
    table = plain_table("model", "parameters", "seeds", "mean accuracy")
    for group in grouped:
        error = group["accuracy_mean_standard_error"]
        spread = "" if error is None else f" ± {error:.2%}"
        table.add_row(group["model"], f"{group['parameters']:,}", str(group["seeds"]),
                      f"{group['accuracy_mean']:.2%}{spread}")  # fmt: skip
    return table
