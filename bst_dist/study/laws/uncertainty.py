"""How far a fitted law can be trusted: resampled runs, shapes and sizes left out, what the points can settle.

Points of one run lie on one curve and share its seed, so what is drawn again is runs and never points: on a public
width x depth data set the standard error of alpha was four times larger by shape than by point.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy import stats

from bst_dist.study.laws.fit import Fit, FitError, fit
from bst_dist.study.laws.law import Law, Points, Vector
from bst_dist.study.laws.regression import regress

UNKNOWNS = {"chinchilla": ("E", "A", "alpha", "B", "beta"),
            "depth": ("E", "A", "alpha", "B", "beta", "kappa", "log_aspect")}  # fmt: skip
EXPONENT_WIDTH, E_WIDTH = 0.5, 0.1


@dataclass(frozen=True)
class Interval:
    """An estimate with the standard error and the 95 % percentile interval of its bootstrap."""

    value: float
    standard_error: float
    low: float
    high: float


def bootstrap(fitted: Fit, points: Points, draws: int = 200, seed: int = 0) -> list[Law]:
    """Laws refitted to runs drawn again with replacement, each from the full fit's optimum."""
    generator = np.random.default_rng(seed)
    runs, number = np.unique(points.run, return_inverse=True)
    members = [np.flatnonzero(number == index) for index in range(len(runs))]
    laws = []
    for _ in range(draws):
        drawn = np.concatenate([members[index] for index in generator.integers(len(runs), size=len(runs))])
        laws.append(fit(points.take(drawn), fitted.form, fitted.delta, start=fitted).law)
    return laws


def intervals(fitted: Fit, laws: list[Law]) -> dict[str, Interval]:
    """An interval for each unknown of the form, and for the exponent of the optimal N in C, beta / (alpha + beta)."""
    found = {name: _interval(getattr(fitted.law, name), [getattr(law, name) for law in laws])
             for name in UNKNOWNS[fitted.form]}  # fmt: skip
    share = [law.beta / (law.alpha + law.beta) for law in laws]
    return found | {"optimal_N_exponent": _interval(fitted.law.beta / (fitted.law.alpha + fitted.law.beta), share)}


def unidentified(found: dict[str, Interval], points: Points) -> list[str]:
    """Why the law must not be extrapolated; empty when it may.

    An exponent must be known to within half of itself (half the 95 % interval) and E to within a tenth of the least
    loss seen; N and D must each span a factor of four, over three values at least. The rule is fixed, not tuned.
    """
    reasons = []
    for name, values in (("parameters", points.parameters), ("tokens", points.tokens)):
        different, span = len(np.unique(np.round(np.log(values), 1))), values.max() / values.min()
        if span < 4 or different < 3:
            reasons.append(
                f"{name} take {different} values over a factor of {span:.1f}; needed are 3 over a factor of 4"
            )
    for name in ("alpha", "beta"):
        half = (found[name].high - found[name].low) / 2
        if half > EXPONENT_WIDTH * found[name].value:
            reasons.append(
                f"{name} = {found[name].value:.3f} ± {half:.3f} (95 %) is not known to within half of itself"
            )
    half, least = (found["E"].high - found["E"].low) / 2, float(points.loss.min())
    if half > E_WIDTH * least:
        reasons.append(f"E = {found['E'].value:.3f} ± {half:.3f} (95 %) is not known to within a tenth of {least:.3f}")
    if found["E"].value < 1e-3 * least:
        reasons.append("E is at its bound of zero")
    return reasons


def leave_one_shape_out(points: Points, fitted: Fit) -> dict[str, float]:
    """Shape -> mean absolute relative error of its losses under a law fitted to all other shapes."""
    return {str(shape): _error_of(points, points.shape == shape, fitted) for shape in np.unique(points.shape)}


def hold_out_largest(points: Points, fitted: Fit) -> float:
    """Mean absolute relative error at the largest size under a law fitted to all smaller ones.

    Sizes within a tenth of the largest N are the largest size: shapes of one size differ by rounding of the width.
    """
    return _error_of(points, points.parameters > points.parameters.max() / 1.1, fitted)


def local_slopes(points: Points) -> dict[str, Interval]:
    """d ln L / d ln N and d ln L / d ln D over the range of the points, errors clustered by run: no extrapolation."""
    columns = np.stack((np.ones(len(points)), np.log(points.parameters), np.log(points.tokens)), axis=1)
    found = regress(columns, np.log(points.loss), points.run)
    width = stats.t.ppf(0.975, found.degrees) * found.standard_errors
    return {
        name: Interval(float(found.values[i]), float(found.standard_errors[i]),
                       float(found.values[i] - width[i]), float(found.values[i] + width[i]))
        for i, name in ((1, "parameters"), (2, "tokens"))
    }  # fmt: skip


def _error_of(points: Points, left_out: Vector, fitted: Fit) -> float:
    if left_out.all():
        raise FitError("nothing is left to fit when this shape is left out: run more shapes")
    law = fit(points.take(~left_out), fitted.form, fitted.delta).law
    out = points.take(left_out)
    return float(np.abs(law.loss(out.parameters, out.tokens, out.aspect) / out.loss - 1).mean())


def _interval(value: float, draws: list[float]) -> Interval:
    low, high = np.quantile(draws, (0.025, 0.975))
    return Interval(float(value), float(np.std(draws, ddof=1)), float(low), float(high))
