"""Coordinate check of a sweep's architectures, in width and depth, including SSM dynamics.

    bst sweep coordinates launch/sweeps/mini.yaml --widths 32 64 128 --depths 2 4 8

Models of several widths and depths train for a few steps. One learning rate suits them all if the change of their
activations depends on neither width nor depth. Passed: both one-sided tests put every slope within ±0.2. Undecided:
more seeds are needed. The rate is a tenth of the peak rate, as during warm-up, because activations that have changed
completely show nothing. Under the standard parametrisation the change depends on the width and the check fails
(rules.parametrisation=standard shows by how much). The result is kept for the sweep's report.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch

from bst_base.arguments import at_least
from bst_base.errors import UserError
from bst_base.outputs import write_afterwards
from bst_dist.model.lm import LanguageModel
from bst_dist.study.report.terminal import show
from bst_dist.study.sweep.commands.common import add_sweep, open_sweep
from bst_dist.study.sweep.config import SweepConfig
from bst_dist.study.sweep.coordinates import Check, Coordinate, coordinates
from bst_dist.study.sweep.design import Cell, Designer
from bst_dist.study.sweep.present import coordinate_blocks
from bst_dist.study.sweep.shape import at_width


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_sweep(parser)
    parser.add_argument(
        "--widths", type=at_least(1), nargs="+", required=True, metavar="D", help="multiples of the head width"
    )
    parser.add_argument("--depths", type=at_least(1), nargs="+", required=True, metavar="N", help="numbers of layers")
    parser.add_argument(
        "--rate",
        type=float,
        default=0.1,
        metavar="X",
        help="learning rate as a share of the peak (default: %(default)s)",
    )
    parser.add_argument(
        "--seeds", type=at_least(1), default=6, metavar="K", help="seeds of the weights (default: %(default)s)"
    )
    parser.add_argument(
        "--steps", type=at_least(1), default=4, metavar="K", help="steps to train (default: %(default)s)"
    )


def run(args: argparse.Namespace) -> dict[str, Any]:
    for name in ("widths", "depths"):
        if len(set(getattr(args, name))) < 2:
            raise UserError(f"--{name}: give two different values at least, to see what depends on them")
    sweep = open_sweep(args)
    designer = Designer(sweep)
    first = {cell.architecture: cell for cell in reversed(designer.cells()) if cell.role == "grid"}
    found, kind = {}, ""
    for name in designer.architectures:
        found[name], kind = _check(sweep, designer, first[name], args)
    made = Check(kind, args.widths, args.depths, args.steps, args.rate, found)
    write_afterwards(args, lambda: made.write(sweep.root))
    show(coordinate_blocks(made))
    return made.report()


def _check(
    sweep: SweepConfig, designer: Designer, cell: Cell, args: argparse.Namespace
) -> tuple[list[Coordinate], str]:
    """Return the coordinates of one architecture at the learning rates of a cell, and the kind of parametrisation."""
    recipe, base = designer.runs([cell])[0].recipe, designer.base_of(cell)["model"]

    def make(width: int, depth: int) -> LanguageModel:
        return LanguageModel(at_width(base, sweep.shape, width, depth))

    length = recipe.train.sequence_length
    ids = torch.randint(recipe.model.vocab_size, (2, length + 1), generator=torch.Generator().manual_seed(0))
    peak = recipe.optimizer
    rates = {name: args.rate * getattr(peak, name) for name in ("learning_rate", "ssm_learning_rate")}
    found = coordinates(
        make, args.widths, args.depths, peak.model_copy(update=rates), ids, args.steps, range(args.seeds)
    )
    return found, recipe.model.parametrisation.kind
