"""What a grid will be able to see, and what it costs, before anything is spent."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from bst_base.errors import UserError
from bst_dist.study.laws.verdict import detectable
from bst_dist.study.sweep.config import BudgetConfig, NoiseConfig
from bst_dist.study.sweep.confounding import ConfoundedError, design_columns, require_sound
from bst_dist.study.sweep.design import Cell, Run


@dataclass(frozen=True)
class Power:
    """What is expected of one variant's comparison, in ln of the loss."""

    pairs: int
    mean: float
    """Predicted standard error of the mean gap."""
    changes: dict[str, tuple[float, float]]
    """Factor -> predicted standard error of the gap's change over the factor's range, smallest change that is seen."""


def predict(runs: Sequence[Run], noise: NoiseConfig) -> Power:
    """Standard errors of the comparison of any one variant with the baseline over these runs.

    The difference of a pair has twice a run's variance; points of one pair share all of it but `noise.within`.
    """
    grid = [run for run in runs if run.cell.role == "grid" and run.multiple is not None]
    one = [run for run in grid if run.cell.architecture == grid[0].cell.architecture]
    columns = design_columns(one)
    matrix = np.stack([np.ones(len(one)), *(v - v.mean() for v in columns.values())], axis=1)
    block = np.array([run.cell.block for run in one])
    pairs, variance = len(set(block)), 2 * noise.seed**2
    shared = (block[:, None] == block) * (1 - noise.within) + np.eye(len(one)) * noise.within
    inverse = np.linalg.pinv(matrix.T @ matrix)
    errors = np.sqrt(np.diag(inverse @ matrix.T @ (variance * shared) @ matrix @ inverse))
    degrees = pairs - matrix.shape[1]
    changes = {}
    for (name, values), error in zip(columns.items(), errors[1:], strict=True):
        change = float(error * np.ptp(values))
        changes[name] = (change, detectable(change, degrees) if degrees > 0 else math.inf)
    return Power(pairs, float(errors[0]), changes)


Cost = Callable[[Run], float]


def cost(budget: BudgetConfig, rates: dict[str, float]) -> tuple[Cost, float, str]:
    """What a run costs in the budget's unit, the limit, and the unit; `rates`: label of a cell -> measured FLOP/s.

    Raises UserError when a budget in time has neither a measurement nor a rate.
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
        return (run.own_flops / rate + budget.start_s) / seconds

    return spent, float(limit), unit


def shape_key(cell: Cell) -> str:
    """What a measured speed holds for: an architecture in one shape."""
    return f"{cell.architecture}-{cell.arm}-n{cell.size:.3g}-d{cell.depth}"


@dataclass(frozen=True)
class Fitted:
    """The part of a grid that its budget pays for."""

    runs: list[Run]
    dropped: list[str]
    """Blocks that were dropped, in order."""
    spent: float


def fit_budget(runs: list[Run], spent: Cost, limit: float, noise: NoiseConfig) -> Fitted:
    """Drop blocks, with all their architectures, until the rest is paid for.

    Greedily: the block whose loss adds least to the smallest change that would be seen, for what it saves; never one
    without which the grid would be confounded. Raises UserError when nothing more can be dropped.
    """
    dropped: list[str] = []
    prices: dict[str, float] = {}
    for run in runs:
        prices[run.cell.block] = prices.get(run.cell.block, 0.0) + spent(run)
    while (total := sum(map(spent, runs))) > limit:
        before, choices = _blindness(runs, noise), []
        for block in dict.fromkeys(run.cell.block for run in runs):
            rest = [run for run in runs if run.cell.block != block]
            if _keeps_its_factors(runs, rest):
                choices.append(((_blindness(rest, noise) - before) / prices[block], block))
        if not choices:
            raise UserError(
                f"the least grid that is not confounded costs {total:.3g} and the budget is {limit:.3g}: raise the "
                "budget, or take out a size, a length or an architecture"
            )
        worst = min(choices)[1]
        runs, dropped = [run for run in runs if run.cell.block != worst], [*dropped, worst]
    return Fitted(runs, dropped, total)


def _blindness(runs: Sequence[Run], noise: NoiseConfig) -> float:
    """The smallest change that is seen, summed over the factors asked about; what is lost by dropping runs."""
    power = predict(runs, noise)
    return sum(seen for name, (_, seen) in power.changes.items() if name in ("compute", "depth"))


def _keeps_its_factors(runs: Sequence[Run], rest: Sequence[Run]) -> bool:
    grid = [run for run in rest if run.cell.role == "grid" and run.multiple is not None]
    before = [run for run in runs if run.cell.role == "grid" and run.multiple is not None]
    if not grid or design_columns(grid).keys() != design_columns(before).keys():
        return False
    if not math.isfinite(_blindness(rest, NoiseConfig())):
        return False
    try:
        require_sound(rest)
    except ConfoundedError:
        return False
    return True
