"""In which order the blocks of a sweep are trained where time may end at any moment: most knowledge per second first.

The knowledge of some blocks is how far they narrow the two changes that the verdict is about, the advantage over a
doubling of depth and over a tenfold of compute, in all arms together. A weak prior says that no change is larger than a
few per cent, so that it is defined from the first block on. Each next block is the one that lowers the sum of the
variances most for its price. What the losses turn out to be plays no part: the order is known before any data.
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
"""Standard deviations before any data: of the advantage itself, of which nothing is known, and of what a factor e of
compute, depth or tokens per parameter adds to it."""


def in_order_of_value(runs: Sequence[Run], price_s: Callable[[Run], float], noise: NoiseConfig,
                      baseline: str) -> list[Run]:  # fmt: skip
    """The same runs: whole blocks, most valuable first; an audit of a size after the last block of that size."""
    grid = [run for run in runs if run.cell.role != "audit"]
    prices: dict[str, float] = {}
    for run in grid:
        prices[run.cell.block] = prices.get(run.cell.block, 0.0) + price_s(run)
    arms = [_Arm(gaps[0], noise) for arm in dict.fromkeys(run.cell.arm for run in grid)
            if (gaps := planned_gaps(grid, baseline, arm))]  # fmt: skip
    blocks = _ordered(arms, prices)
    of_block = {block: [run for run in grid if run.cell.block == block] for block in blocks}
    audit = [run for run in runs if run.cell.role == "audit"]
    found: list[Run] = []
    for index, block in enumerate(blocks):
        found += of_block[block]
        size = of_block[block][0].cell.size
        if all(of_block[later][0].cell.size != size for later in blocks[index + 1 :]):
            found += [run for run in audit if run.cell.size == size]
    return found


def _ordered(arms: Sequence[_Arm], prices: Mapping[str, float]) -> list[str]:
    """The blocks, each the best for its price after those before it; of equals the cheaper, then the first named."""
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
    """The pairs of one variant in one arm; those of all variants are the same ones."""

    def __init__(self, gaps: Gaps, noise: NoiseConfig) -> None:
        self.matrix, names = columns(gaps)
        self.blocks, self.noise = gaps.block, noise
        unit = [math.log(UNITS[name].factor) if name in UNITS else 0.0 for name in names]
        self.weights = np.array([0.0, *unit]) ** 2
        """Of the variances of the coefficients: those of the two changes, each over its unit."""

    def variance(self, chosen: Sequence[str]) -> float:
        """What is not known of the two changes, after these blocks."""
        precision = np.diag([UNKNOWN**-2, *[PRIOR**-2] * (self.matrix.shape[1] - 1)])
        for block in chosen:
            rows = self.matrix[self.blocks == block]
            if len(rows):  # of another arm otherwise
                own = np.full((len(rows), len(rows)), 1 - self.noise.within) + np.eye(len(rows)) * self.noise.within
                precision = precision + rows.T @ np.linalg.solve(2 * self.noise.seed**2 * own, rows)
        return float(self.weights @ np.diag(np.linalg.inv(precision)))
