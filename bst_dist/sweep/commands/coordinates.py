"""The coordinate check of a sweep's architectures, in width and in depth, SSM dynamics included.

    bst sweep coordinates launch/sweeps/mini.yaml --widths 32 64 128 --depths 2 4 8

A learning rate may be used at every width and depth where no change depends on them (slope within ±0.2). Under the
standard parametrisation changes do depend on the width; the check says by how much.
"""

from __future__ import annotations

import argparse
from dataclasses import asdict
from typing import Any

import torch
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from bst_dist.model.lm import LanguageModel
from bst_dist.sweep.commands.common import add_sweep, open_sweep
from bst_dist.sweep.coordinates import check
from bst_dist.sweep.design import Designer
from bst_dist.sweep.shape import at_width


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_sweep(parser)
    parser.add_argument("--widths", type=int, nargs="+", required=True, metavar="D", help="multiples of the head width")
    parser.add_argument("--depths", type=int, nargs="+", required=True, metavar="N")
    parser.add_argument("--steps", type=int, default=4, metavar="K", help="steps to train (default: %(default)s)")


def run(args: argparse.Namespace) -> dict[str, Any]:
    sweep = open_sweep(args)
    designer, console, report = Designer(sweep), Console(), {}
    first = {cell.architecture: cell for cell in reversed(designer.cells()) if cell.role == "grid"}
    for name in designer.architectures:
        recipe = designer.runs([first[name]])[0].recipe
        base = designer.base_of(first[name])

        def make(width: int, depth: int, base: dict[str, Any] = base) -> LanguageModel:
            return LanguageModel(at_width(base["model"], sweep.shape, width, depth))

        length = recipe.train.sequence_length
        ids = torch.randint(recipe.model.vocab_size, (2, length + 1), generator=torch.Generator().manual_seed(0))
        found = check(make, args.widths, args.depths, recipe.optimizer, ids, args.steps)
        table = Table("change of", "along", *map(str, range(1, 1 + max(len(args.widths), len(args.depths)))), "slope",
                      "", title=name, box=SIMPLE)  # fmt: skip
        for one in found:
            values = [f"{change:.3g}" for change in one.changes.values()]
            values += [""] * (max(len(args.widths), len(args.depths)) - len(values))
            table.add_row(one.watched, one.along, *values, f"{one.slope:+.2f}", "" if one.passed else "depends")
        console.print(table)
        report[name] = [{**asdict(one), "passed": one.passed} for one in found]
    return {"architectures": report}
