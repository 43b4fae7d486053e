"""The predicted cost of a grid, and the part of the grid that fits a budget."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from bst_base.errors import UserError
from bst_dist.study.laws.regression import RegressionError
from bst_dist.study.laws.verdict import UNITS, columns
from bst_dist.study.sweep.config import BudgetConfig, NoiseConfig
from bst_dist.study.sweep.design import Cell, Run, of_grid
from bst_dist.study.sweep.soundness import UnsoundError, planned_gaps, require_sound


def standard_errors(runs: Sequence[Run], noise: NoiseConfig, baseline: str, arm: str) -> dict[str, float]:
    """Predict the standard error of a variant's change over each factor, in ln of the loss per unit of the factor.

    The difference of a pair has twice the variance of a run. Points of one pair share all of it except `noise.within`.
    """
    gaps = planned_gaps(runs, baseline, arm)[0]
    matrix, names = columns(gaps)
    if gaps.pairs <= matrix.shape[1] or np.linalg.matrix_rank(matrix) < matrix.shape[1]:
        raise RegressionError(f"{gaps.pairs} pairs of runs are too few for {matrix.shape[1]} coefficients")
    shared = (gaps.stratum[:, None] == gaps.stratum) * (1 - noise.within) + np.eye(len(gaps)) * noise.within
    weights = np.linalg.inv(matrix.T @ matrix) @ matrix.T
    errors = np.sqrt(np.diag(weights @ (2 * noise.seed**2 * shared) @ weights.T))
    return {n: float(errors[1 + i]) * math.log(UNITS[n].factor) for i, n in enumerate(names) if n in UNITS}


Cost = Callable[[Run], float]


def cost(budget: BudgetConfig, rates: dict[str, float]) -> tuple[Cost, float, str]:
    """Return a function from a run to its cost in the budget's unit, the limit, and the name of the unit.

    `rates` is shape key -> measured FLOP/s. The returned function raises UserError if a budget in time has neither a
    measurement nor `budget.flops_per_s`.
    """
    if budget.gpu_hours is None and budget.cpu_minutes is None:
        return (lambda run: run.own_flops), budget.flops or math.inf, "FLOPs"
    unit, limit, seconds = (
        ("GPU-hours", budget.gpu_hours, 3600)
        if budget.gpu_hours is not None
        else ("CPU-minutes", budget.cpu_minutes, 60)
    )

    def spent(run: Run) -> float:
        rate = rates.get(shape_key(run.cell), budget.flops_per_s)
        if rate is None:
            raise UserError("a budget in time needs budget.flops_per_s, or a measurement: bst sweep plan --measure")
        ranks = run.recipe.ranks or 1  # while a run starts, all of its devices wait
        return (run.own_flops / rate + budget.start_s * ranks) / seconds

    return spent, float(limit), unit


def shape_key(cell: Cell) -> str:
    """Return the key of a measured speed: the architecture, arm, size and depth of a cell."""
    return f"{cell.architecture}-{cell.arm}-n{cell.size:.3g}-d{cell.depth}"


@dataclass(frozen=True)
class Fitted:
    """The part of a grid that fits its budget."""

    runs: list[Run]
    dropped: list[str]
    """Dropped strata, in the order in which they were dropped."""
    spent: float


def fit_budget(
    runs: list[Run], spent: Cost, limit: float, noise: NoiseConfig, baseline: str, arm: str, unit: str = "FLOPs"
) -> Fitted:
    """Drop strata, with all their architectures, until the rest fits the budget.

    The choice is greedy: the stratum that adds least to the standard errors of the changes, relative to its cost. A
    stratum without which the grid would be unsound stays. `unit`: of the costs, for the message. Raises UserError if no
    further stratum can be dropped.
    """
    dropped: list[str] = []
    prices: dict[str, float] = {}
    for run in runs:
        prices[run.cell.stratum] = prices.get(run.cell.stratum, 0.0) + spent(run)
    while (total := sum(map(spent, runs))) > limit:
        choices = []
        for stratum in dict.fromkeys(run.cell.stratum for run in runs):
            rest = [run for run in runs if run.cell.stratum != stratum]
            lost = _precision_loss(runs, rest, noise, baseline, arm)
            if lost is not None:
                choices.append((lost / prices[stratum], stratum))
        if not choices:
            raise UserError(
                f"the smallest grid that can answer costs {total:.3g} {unit}, the budget is {limit:.3g} {unit}: raise "
                "the budget, or remove a size, a length or an architecture"
            )
        worst = min(choices)[1]
        runs, dropped = [run for run in runs if run.cell.stratum != worst], [*dropped, worst]
    return Fitted(runs, dropped, total)


def _precision_loss(
    runs: Sequence[Run], rest: Sequence[Run], noise: NoiseConfig, baseline: str, arm: str
) -> float | None:
    """Return the growth of the summed standard errors of the changes with only `rest`; None if `rest` is unsound."""
    if not of_grid(list(rest)) or {r.cell.arm for r in rest} != {r.cell.arm for r in runs}:
        return None
    try:
        require_sound(rest, baseline, arm)
        before, after = (
            [standard_errors(some, noise, baseline, a) for a in dict.fromkeys(r.cell.arm for r in runs)]
            for some in (runs, rest)
        )
    except (UnsoundError, RegressionError):
        return None
    if any(one.keys() != other.keys() for one, other in zip(before, after, strict=True)):
        return None
    return sum(sum(one.values()) for one in after) - sum(sum(one.values()) for one in before)
