"""Check the learning rate of the sweep's rule in the corners of the grid.

If the rate is wrong there, an effect of depth may in truth be an effect of the rate. In each corner a parabola in ln of
the rate is fitted to ln L, with one intercept per seed. The noise is estimated from all corners together, because a
single corner has too few runs.

A corner is undecided while a planned rate has runs that did not finish: the best rate may be one of these. A rate at
which a run diverged counts as worse than every rate without one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from bst_dist.study.laws.observation import Observation
from bst_dist.study.statistics import Estimate, quantile

MARGIN = 0.005
"""Share of the loss. The rule's rate passes if it is shown to cost less than this."""
Suits = Literal["passed", "failed", "undecided"]


@dataclass(frozen=True)
class Corner:
    """The result of the audit for one architecture in one corner of the grid."""

    architecture: str
    corner: str
    losses: dict[float, float]
    """Rate divided by the rule's rate -> geometric mean of the loss over seeds."""
    seeds: int
    best: float | None
    """The best rate divided by the rule's rate; None if the parabola has no minimum among the rates tried."""
    lost: Estimate | None
    """ln of the loss at the rule's rate minus that at the best rate in the range tried; None without a fit."""
    answer: Suits
    why: str = ""
    """Why it is undecided, if it could not be tested; else the rates that diverged."""


def audit(observed: Sequence[Observation]) -> list[Corner]:
    """Return all corners where other rates were planned. With one seed or fewer than three rates they are undecided."""
    corners: dict[tuple[str, str], list[Observation]] = {}
    for o in (o for o in observed if not o.held_out):
        corners.setdefault((o.architecture, o.stratum.rpartition("-s")[0]), []).append(o)
    planned = {key: audited for key, own in corners.items() if (audited := _at_the_audited_length(own))}
    fits = {key: _parabola([o for o in own if o.usable]) for key, own in planned.items()}
    squares = sum(f[2] for f in fits.values() if f)
    degrees = sum(f[3] for f in fits.values() if f)
    scale = squares / degrees if degrees else None
    return [_corner(*key, own, fits[key], scale, degrees) for key, own in planned.items()]


def _at_the_audited_length(own: list[Observation]) -> list[Observation]:
    """Return the runs that differ only in their rate: those of lengths and seeds at which other rates were planned."""
    tried = {(o.seed, o.length) for o in own if o.rate_factor != 1}
    return [o for o in own if (o.seed, o.length) in tried]


Parabola = tuple[np.ndarray, np.ndarray, float, int]


def _parabola(own: list[Observation]) -> Parabola | None:
    """Fit ln L = a_seed + b x + c x^2, where x is ln of the rate factor.

    Return (b, c), their part of (X'X)^-1, the residual sum of squares and its degrees of freedom; None if undetermined.
    """
    seeds = sorted({o.seed for o in own})
    x = np.log([o.rate_factor for o in own])
    columns = np.column_stack([[o.seed == seed for o in own] for seed in seeds] + [x, x**2]).astype(float)
    degrees = len(own) - columns.shape[1]
    if degrees < 1 or len(seeds) < 2 or np.linalg.matrix_rank(columns) < columns.shape[1]:
        return None
    values, *_ = np.linalg.lstsq(columns, np.log([o.loss for o in own]), rcond=None)
    left = np.log([o.loss for o in own]) - columns @ values
    return values[-2:], np.linalg.inv(columns.T @ columns)[-2:, -2:], float(left @ left), degrees


def _corner(
    architecture: str,
    corner: str,
    planned: list[Observation],
    fitted: Parabola | None,
    scale: float | None,
    degrees: int,
) -> Corner:
    own = [o for o in planned if o.usable]
    factors, seeds = sorted({o.rate_factor for o in own}), len({o.seed for o in own})
    losses = {f: float(np.exp(np.mean([np.log(o.loss) for o in own if o.rate_factor == f]))) for f in factors}
    diverged = {o.rate_factor for o in planned if o.status == "diverged"}
    stable = [f for f in factors if f not in diverged]
    told = f"diverged at {_listed(diverged)}" if diverged else ""
    known: Suits | None = "failed" if 1 in diverged and stable else None
    best = lost = None
    if fitted is not None and scale is not None:
        (b, c), covariance, *_ = fitted
        bottom = float(np.exp(-b / (2 * c))) if c > 0 else None
        best = bottom if bottom is not None and factors[0] <= bottom <= factors[-1] else None
        if stable:
            lost, tested = _cost((b, c), covariance * scale, degrees, (stable[0], stable[-1]))
            known = known or tested
    if waiting := _unfinished(planned):
        known, told = "undecided", "; ".join(filter(None, (waiting, told)))
    return Corner(architecture, corner, losses, seeds, best, lost, known or "undecided", told)


def _cost(
    values: Sequence[float], covariance: np.ndarray, degrees: int, tried: tuple[float, float]
) -> tuple[Estimate, Suits]:
    """Return ln of the loss at the rule's rate minus that at the best rate in the range `tried`, and the answer.

    Args:
        values: (b, c) of the parabola, with their `covariance`.
    """
    # The gain of a rate over the rule's is linear in b and c, so its error is exact. Passed: no rate tried gains much.
    where = np.linspace(*np.log(tried), 101)
    basis = np.column_stack((where, where**2))
    gains = -basis @ np.array(values)
    errors = np.sqrt(np.einsum("ij,jk,ik->i", basis, covariance, basis))
    upper, lower = gains + quantile(0.95, degrees) * errors, gains - quantile(0.95, degrees) * errors
    at = int(np.argmax(gains))
    answer: Suits = "passed" if upper.max() < MARGIN else "failed" if lower.max() > MARGIN else "undecided"
    return Estimate(float(gains[at]), float(errors[at]), degrees), answer


def _unfinished(planned: Sequence[Observation]) -> str:
    """Return the rates with runs that did not finish and did not diverge, by status; an empty string if there are none.

    A run that is done without a usable loss counts as failed.
    """
    rates: dict[str, set[float]] = {}
    for o in planned:
        if not o.usable and o.status != "diverged":
            rates.setdefault("failed" if o.status == "done" else o.status, set()).add(o.rate_factor)
    return "; ".join(f"{status} at {_listed(of)}" for status, of in rates.items())


def _listed(factors: set[float]) -> str:
    """Name rates by their factors, of the rule's."""
    return ", ".join(f"{factor:g}" for factor in sorted(factors)) + " times the rule's rate"
