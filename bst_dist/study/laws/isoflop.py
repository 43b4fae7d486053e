"""The optimal size by isoFLOP profiles: a cross-check of the fitted law that does not depend on the law's form.

At one compute budget, the loss as a function of size has a minimum. A parabola in ln N finds it (Hoffmann et al.,
arXiv 2203.15556, section 3.2). Only sizes whose curve includes the budget are used, so nothing is extrapolated.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from bst_dist.study.laws.law import Points, Vector

BUDGETS = 5
ONE_SIZE, ONE_BUDGET = 0.2, 0.03
"""How far apart, in ln, the smallest and the largest N of one size may be, and the compute of one budget. The shapes of
one size of a sweep differ in N, and shapes of one size are no three sizes."""


@dataclass(frozen=True)
class Profile:
    """Losses by size at one compute budget, and the optimal size."""

    flops: float
    parameters: Vector
    loss: Vector
    optimum: float | None
    """N at the minimum; None if the parabola opens downwards or its minimum is outside of the sizes."""


def profiles(points: Points) -> list[Profile]:
    """Return profiles at `BUDGETS` values of C = 6 N D over the range that three sizes share, or none."""
    curves = _curves(points)
    if len(curves) < 3:
        return []
    starts, ends = sorted(c[0][0] for c in curves.values()), sorted(c[0][-1] for c in curves.values())
    low, high = starts[2], ends[-3]  # here at least three curves have begun and three have not ended
    if low >= high:
        return []
    return [p for c in np.linspace(low, high, BUDGETS) if (p := _profile(curves, c)) is not None]


def exponent(found: list[Profile]) -> float | None:
    """Return d ln N_opt / d ln C over the profiles with an optimum, to compare with beta / (alpha + beta) of a law.

    None if fewer than three profiles have an optimum.
    """
    floors = [(np.log(p.flops), np.log(p.optimum)) for p in found if p.optimum is not None]
    if len(floors) < 3:
        return None
    return float(np.polyfit(*np.transpose(floors), 1)[0])


def _curves(points: Points) -> dict[float, tuple[Vector, Vector]]:
    """Return size -> (ln C ascending, mean ln L at each), for sizes with at least two budgets."""
    curves = {}
    log_n, log_c = np.log(points.parameters), np.log(6 * points.parameters * points.tokens)
    for size in _groups(log_n, np.arange(len(points)), ONE_SIZE):
        budgets = _groups(log_c, size, ONE_BUDGET)
        if len(budgets) > 1:
            means = [np.array([x[budget].mean() for budget in budgets]) for x in (log_c, np.log(points.loss))]
            curves[float(np.exp(log_n[size].mean()))] = (means[0], means[1])
    return curves


def _groups(values: Vector, index: Vector, within: float) -> list[Vector]:
    """Divide the indices into groups of ascending values that differ by at most `within` in a group."""
    ascending, groups = index[np.argsort(values[index], kind="stable")], []
    while len(ascending):
        inside = values[ascending] <= values[ascending[0]] + within
        groups.append(ascending[inside])
        ascending = ascending[~inside]
    return groups


def _profile(curves: dict[float, tuple[Vector, Vector]], log_c: float) -> Profile | None:
    inside = {n: np.interp(log_c, *curve) for n, curve in curves.items() if curve[0][0] <= log_c <= curve[0][-1]}
    if len(inside) < 3:
        return None
    sizes, losses = np.array(list(inside)), np.array(list(inside.values()))
    curved, linear, _ = np.polyfit(np.log(sizes), losses, 2)
    floor = np.exp(-linear / (2 * curved)) if curved > 0 else np.nan
    optimum = float(floor) if sizes.min() <= floor <= sizes.max() else None
    return Profile(float(np.exp(log_c)), sizes, np.exp(losses), optimum)
