"""How far a fitted law can be trusted: resampled runs, left-out shapes and sizes, and what the points determine.

Points of one run lie on one curve and share its seed, so runs are resampled and never points: on a public
width x depth data set the standard error of alpha was four times larger by shape than by point.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

from bst_dist.study.laws.fit import Fit, FitError, fit
from bst_dist.study.laws.law import Law, Points, Vector, widths
from bst_dist.study.laws.regression import regress
from bst_dist.study.statistics import Estimate

UNKNOWNS = {"chinchilla": ("E", "A", "alpha", "B", "beta"),
            "aspect": ("E", "A", "alpha", "B", "beta", "kappa", "log_aspect"),
            "additive": ("E", "A", "alpha", "G", "gamma", "B", "beta")}  # fmt: skip
EXPONENT_WIDTH, E_WIDTH = 0.5, 0.1
MOST_SHAPES = 24


@dataclass(frozen=True)
class Interval:
    """An estimate with the standard error and the 95 % percentile interval of its bootstrap."""

    value: float
    standard_error: float
    low: float
    high: float


@dataclass(frozen=True)
class LackOfFit:
    """Whether the form misses the shapes by more than seeds scatter."""

    statistic: float
    """F: mean square of the shapes' mean residuals over that of seeds within a shape."""
    p_value: float


def bootstrap(fitted: Fit, points: Points, draws: int = 200, seed: int = 0) -> list[Law]:
    """Laws refitted to runs drawn with replacement, each search starting at the full fit's optimum."""
    generator = np.random.default_rng(seed)
    runs, number = np.unique(points.run, return_inverse=True)
    members = [np.flatnonzero(number == index) for index in range(len(runs))]
    laws: list[Law] = []
    for _ in range(20 * draws):
        if len(laws) == draws:
            break
        drawn = np.concatenate([members[index] for index in generator.integers(len(runs), size=len(runs))])
        try:
            laws.append(fit(points.take(drawn), fitted.form, fitted.delta, start=fitted).law)
        except FitError:  # a draw of one shape alone
            continue
    if len(laws) < 2:
        raise FitError("too few runs to resample")
    return laws


def interval(of: Callable[[Law], float], law: Law, laws: Sequence[Law]) -> Interval:
    """A quantity computed from a law, with its interval over resampled runs."""
    draws = np.array([of(one) for one in laws], float)
    draws = draws[np.isfinite(draws)]
    if len(draws) < len(laws) / 2:
        return Interval(of(law), float("nan"), float("-inf"), float("inf"))
    low, high = np.quantile(draws, (0.025, 0.975))
    return Interval(float(of(law)), float(np.std(draws, ddof=1)), float(low), float(high))


def intervals(fitted: Fit, laws: Sequence[Law]) -> dict[str, Interval]:
    """An interval for each unknown of the form, and for the exponent of the optimal N in C where it is a power."""
    found = {name: interval(lambda law, name=name: getattr(law, name), fitted.law, laws)
             for name in UNKNOWNS[fitted.form]}  # fmt: skip
    if fitted.form != "additive":
        found["optimal_N_exponent"] = interval(lambda law: law.beta / (law.alpha + law.beta), fitted.law, laws)
    return found


def unidentified(found: dict[str, Interval], points: Points) -> list[str]:
    """Why the law must not be extrapolated; empty when it may.

    An exponent must be known to within half of its value (half the 95 % interval) and E to within a tenth of the lowest
    loss observed; N and D must each span a factor of four, with three values at least. The rule is fixed, not tuned.
    """
    reasons = []
    for name, values in (("parameters", points.parameters), ("tokens", points.tokens)):
        different, span = len(np.unique(np.round(np.log(values), 1))), values.max() / values.min()
        if span < 4 or different < 3:
            reasons.append(
                f"{name} take {different} values over a factor of {span:.1f}; needed are 3 over a factor of 4"
            )
    for name in (name for name in ("alpha", "beta", "gamma") if name in found):
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
    """Shape -> mean absolute relative error of its losses under a law fitted to all other shapes.

    Of many shapes only MOST_SHAPES are left out in turn, spread over all of them.
    """
    shapes = np.unique(points.shape)
    shapes = shapes[np.unique(np.linspace(0, len(shapes) - 1, MOST_SHAPES).round().astype(int))]
    return {str(shape): _error_of(points, points.shape == shape, fitted) for shape in shapes}


def hold_out_largest(points: Points, fitted: Fit) -> float:
    """Mean absolute relative error at the largest size under a law fitted to all smaller ones.

    Sizes within a tenth of the largest N are the largest size: shapes of one size differ a little.
    """
    return _error_of(points, points.parameters > points.parameters.max() / 1.1, fitted)


def local_slopes(points: Points) -> dict[str, Estimate]:
    """d ln L / d ln of N, D and depth (those that vary) over the range of the points, errors clustered by run.

    N at fixed D, D at fixed N; not for extrapolation.
    """
    names = [n for n in ("parameters", "tokens", "depth") if np.ptp(np.log(getattr(points, n))) > 0.05]
    columns = np.column_stack([np.ones(len(points)), *(np.log(getattr(points, name)) for name in names)])
    found = regress(columns, np.log(points.loss), points.run)
    return {name: found.estimate(1 + place) for place, name in enumerate(names)}


def lack_of_fit(points: Points, fitted: Fit) -> LackOfFit | None:
    """From the mean residuals of runs, whose points are not independent; None where no shape has two seeds."""
    residuals = np.log(points.loss) - np.log(fitted.predict(points))
    runs, number = np.unique(points.run, return_inverse=True)
    level = np.array([residuals[number == index].mean() for index in range(len(runs))])
    shapes = points.shape[np.array([np.flatnonzero(number == index)[0] for index in range(len(runs))])]
    groups = [level[shapes == shape] for shape in np.unique(shapes)]
    within = sum(len(g) - 1 for g in groups)
    # Tokens are determined within runs; shapes determine the rest of the unknowns.
    between = len(groups) - (sum(widths(fitted.form)) - 2)
    if within < 1 or between < 1:
        return None
    squares = sum(float(((g - g.mean()) ** 2).sum()) for g in groups)
    if squares == 0:
        return None
    f = sum(len(g) * g.mean() ** 2 for g in groups) / between / (squares / within)
    return LackOfFit(float(f), float(stats.f.sf(f, between, within)))


def _error_of(points: Points, left_out: Vector, fitted: Fit) -> float:
    if left_out.all():
        raise FitError("nothing is left to fit when this shape is left out: run more shapes")
    law = fit(points.take(~left_out), fitted.form, fitted.delta).law
    out = points.take(left_out)
    return float(np.abs(law.loss(out.parameters, out.tokens, out.width, out.depth) / out.loss - 1).mean())
