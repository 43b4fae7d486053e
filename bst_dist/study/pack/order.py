"""The training order of a sweep's strata if time may end at any moment: the most information per second first.

The information of a set of strata is the reduction in the variances of the verdict's two changes: of the advantage per
doubling of depth and per tenfold of compute, summed over all arms. A weak prior, that a change is at most a few per
cent, makes the variances finite from the first stratum on. The next stratum is always the one that lowers the sum of
the variances most for its price. The order does not depend on the losses, so it is known before any data.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from bst_dist.study.laws.gap import Gaps
from bst_dist.study.laws.verdict import UNITS, columns
from bst_dist.study.sweep.config import NoiseConfig
from bst_dist.study.sweep.design import Run
from bst_dist.study.sweep.soundness import planned_gaps

UNKNOWN, PRIOR = 1.0, 0.05
"""Prior standard deviations: of the advantage itself (uninformative), and of its change per factor e of compute, depth
or tokens per parameter."""


def in_order_of_value(
    runs: Sequence[Run], price_s: Callable[[Run], float], noise: NoiseConfig, baseline: str
) -> list[Run]:
    """Return the runs in order of value, by whole strata. The audit of a size follows the last stratum of this size."""
    grid = [run for run in runs if run.cell.role != "audit"]
    prices: dict[str, float] = {}
    for run in grid:
        prices[run.cell.stratum] = prices.get(run.cell.stratum, 0.0) + price_s(run)
    arms = [
        _Arm(gaps[0], noise)
        for arm in dict.fromkeys(run.cell.arm for run in grid)
        if (gaps := planned_gaps(grid, baseline, arm))
    ]
    strata = _ordered(arms, prices)
    of_stratum = {stratum: [run for run in grid if run.cell.stratum == stratum] for stratum in strata}
    audit = [run for run in runs if run.cell.role == "audit"]
    found: list[Run] = []
    for index, stratum in enumerate(strata):
        found += of_stratum[stratum]
        size = of_stratum[stratum][0].cell.size
        if all(of_stratum[later][0].cell.size != size for later in strata[index + 1 :]):
            found += [run for run in audit if run.cell.size == size]
    return found


def _ordered(arms: Sequence[_Arm], prices: Mapping[str, float]) -> list[str]:
    """Return the strata in greedy order of gain per price. Ties go to the cheaper stratum, then to the earlier one."""
    chosen: list[str] = []
    left = list(prices)
    while left:
        before = sum(arm.variance(chosen) for arm in arms)
        gain = {b: before - sum(arm.variance([*chosen, b]) for arm in arms) for b in left}
        best = max(left, key=lambda b: (gain[b] / prices[b], -prices[b]))
        chosen.append(best)
        left.remove(best)
    return chosen


class _Arm:
    """The pairs of one variant in one arm. All variants have the same pairs."""

    def __init__(self, gaps: Gaps, noise: NoiseConfig) -> None:
        self.matrix, names = columns(gaps)
        self.strata, self.noise = gaps.stratum, noise
        unit = [math.log(UNITS[name].factor) if name in UNITS else 0.0 for name in names]
        self.weights = np.array([0.0, *unit]) ** 2
        """Weights of the coefficients' variances: they select the two changes, each per unit of its factor."""

    def variance(self, chosen: Sequence[str]) -> float:
        """Return the summed posterior variance of the two changes, given the strata in `chosen`."""
        precision = np.diag([UNKNOWN**-2, *[PRIOR**-2] * (self.matrix.shape[1] - 1)])
        for stratum in chosen:
            rows = self.matrix[self.strata == stratum]
            if len(rows):  # empty for a stratum of another arm
                own = np.full((len(rows), len(rows)), 1 - self.noise.within) + np.eye(len(rows)) * self.noise.within
                precision = precision + rows.T @ np.linalg.solve(2 * self.noise.seed**2 * own, rows)
        return float(self.weights @ np.diag(np.linalg.inv(precision)))
