"""The coordinate check of a sweep's architectures, in width and in depth, SSM dynamics included.

    bst sweep coordinates launch/sweeps/mini.yaml --widths 32 64 128 --depths 2 4 8

A learning rate may be used at every width and depth where no change depends on them (slope within ±0.2): then the check
passes. It is made at a tenth of the peak rate, as in a warm-up: activations that have changed altogether cannot show
what they depend on. Under the standard parametrisation changes do depend on the width and the check fails:
rules.parametrisation=standard shows by how much. What it finds is kept for the sweep's report.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from typing import Any

import torch
from rich.box import SIMPLE
from rich.table import Table

from bst_base.files import atomic_file
from bst_dist.model.lm import LanguageModel
from bst_dist.study.sweep.commands.common import COORDINATES, add_sweep, open_console, open_sweep, say
from bst_dist.study.sweep.config import SweepConfig
from bst_dist.study.sweep.coordinates import Coordinate, check
from bst_dist.study.sweep.design import Cell, Designer
from bst_dist.study.sweep.shape import at_width


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_sweep(parser)
    parser.add_argument("--widths", type=int, nargs="+", required=True, metavar="D", help="multiples of the head width")
    parser.add_argument("--depths", type=int, nargs="+", required=True, metavar="N", help="numbers of layers")
    parser.add_argument("--rate", type=float, default=0.1, metavar="X",
                        help="share of the peak rate to train at (default: %(default)s)")  # fmt: skip
    parser.add_argument("--seeds", type=int, default=6, metavar="K", help="of weights (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=4, metavar="K", help="steps to train (default: %(default)s)")


def run(args: argparse.Namespace) -> dict[str, Any]:
    sweep = open_sweep(args)
    designer, console = Designer(sweep), open_console()
    first = {cell.architecture: cell for cell in reversed(designer.cells()) if cell.role == "grid"}
    architectures, kind = {}, ""
    for name in designer.architectures:
        found, kind = _check(sweep, designer, first[name], args)
        console.print(_table(name, found, max(len(args.widths), len(args.depths))))
        architectures[name] = [{**asdict(one), "passed": one.passed} for one in found]
    failed = {name for name, found in architectures.items() if not all(one["passed"] for one in found)}
    report = {"passed": not failed, "parametrisation": kind, "widths": args.widths, "depths": args.depths,
              "steps": args.steps, "rate": args.rate, "architectures": architectures}  # fmt: skip
    sweep.root.mkdir(parents=True, exist_ok=True)
    with atomic_file(sweep.root / COORDINATES) as file:
        file.write(json.dumps(report, indent=2).encode() + b"\n")
    say(f"{kind}: " + (f"changes depend on the shape in {', '.join(sorted(failed))}" if failed
                       else "no change depends on the width or the depth: one rate may be used for all"))  # fmt: skip
    return report


def _check(sweep: SweepConfig, designer: Designer, cell: Cell,
           args: argparse.Namespace) -> tuple[list[Coordinate], str]:  # fmt: skip
    """The coordinates of one architecture at the rates of a cell, and its parametrisation."""
    recipe, base = designer.runs([cell])[0].recipe, designer.base_of(cell)["model"]

    def make(width: int, depth: int) -> LanguageModel:
        return LanguageModel(at_width(base, sweep.shape, width, depth))

    length = recipe.train.sequence_length
    ids = torch.randint(recipe.model.vocab_size, (2, length + 1), generator=torch.Generator().manual_seed(0))
    peak = recipe.optimizer
    rates = {name: args.rate * getattr(peak, name) for name in ("learning_rate", "ssm_learning_rate")}
    found = check(make, args.widths, args.depths, peak.model_copy(update=rates), ids, args.steps,
                  range(args.seeds))  # fmt: skip
    return found, recipe.model.parametrisation.kind


def _table(name: str, found: list[Coordinate], shapes: int) -> Table:
    table = Table("change of", "along", *map(str, range(1, 1 + shapes)), "slope", "", title=name, box=SIMPLE)
    for one in found:
        values = [f"{change:.3g}" for change in one.changes.values()]
        values += [""] * (shapes - len(values))
        table.add_row(
            one.watched,
            one.along,
            *values,
            f"{one.slope:+.2f} ± {one.standard_error:.2f}",
            "" if one.passed else "depends",
        )
    return table
