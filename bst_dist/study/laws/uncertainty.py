"""The uncertainty of a fitted law: bootstrap over runs, left-out shapes and sizes, and which unknowns are determined.

Points of one run lie on one curve and share its seed, so the bootstrap resamples runs, never single points. On a public
width x depth data set, resampling shapes gave a standard error of alpha four times as large as resampling points.
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

UNKNOWNS = {
    "chinchilla": ("E", "A", "alpha", "B", "beta"),
    "aspect": ("E", "A", "alpha", "B", "beta", "kappa", "log_aspect"),
    "additive": ("E", "A", "alpha", "G", "gamma", "B", "beta"),
}
EXPONENT_WIDTH, E_WIDTH = 0.5, 0.1
MOST_SHAPES = 24
MOST_LOST = 0.05
"""The largest share of resampled values that may be no number, for an interval of the others."""


@dataclass(frozen=True)
class Interval:
    """An estimate with its standard error and 95 % percentile interval from the bootstrap."""

    value: float
    standard_error: float
    low: float
    high: float


@dataclass(frozen=True)
class LackOfFit:
    """An F test of whether the residuals of the shapes are larger than the scatter of seeds explains."""

    statistic: float
    """F: mean square of the shapes' mean residuals / mean square of the seeds within a shape."""
    p_value: float


def bootstrap(fitted: Fit, points: Points, draws: int = 200, seed: int = 0) -> list[Law]:
    """Return laws fitted to runs drawn with replacement; each search starts at the optimum of `fitted`.

    Raises FitError if fewer than two of 20 x `draws` resamples can be fitted.
    """
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
        except FitError:  # for example, all runs drawn have the same shape
            continue
    if len(laws) < 2:
        raise FitError("too few runs to resample")
    return laws


def interval(of: Callable[[Law], float], law: Law, laws: Sequence[Law]) -> Interval:
    """Return the quantity `of(law)` with its interval over `laws`, fits of resampled runs.

    The interval is infinite if more than `MOST_LOST` of the resampled values are not finite: it is not determined.
    """
    draws = np.array([of(one) for one in laws], float)
    draws = draws[np.isfinite(draws)]
    if len(draws) < max(2, (1 - MOST_LOST) * len(laws)):
        return Interval(of(law), float("nan"), float("-inf"), float("inf"))
    low, high = np.quantile(draws, (0.025, 0.975))
    return Interval(float(of(law)), float(np.std(draws, ddof=1)), float(low), float(high))


def intervals(fitted: Fit, laws: Sequence[Law]) -> dict[str, Interval]:
    """Return an interval for each unknown and, except for additive, for the exponent of the optimal N in C.

    A law without a best width / depth has no `log_aspect`: it counts as NaN.
    """

    def unknown(name: str) -> Callable[[Law], float]:
        return lambda law: float("nan") if name == "log_aspect" and not law.has_valley else getattr(law, name)

    found = {name: interval(unknown(name), fitted.law, laws) for name in UNKNOWNS[fitted.form]}
    if fitted.form != "additive":
        found["optimal_N_exponent"] = interval(lambda law: law.beta / (law.alpha + law.beta), fitted.law, laws)
    return found


def unidentified(found: dict[str, Interval], points: Points) -> list[str]:
    """Return the reasons why the law must not be extrapolated; empty if it may be.

    Half the 95 % interval of each exponent must be at most half of its value, and that of E at most a tenth of the
    lowest observed loss. E must not be at its bound of zero. N and D must each span a factor of four and have at least
    three values. These limits were fixed in advance, not tuned.
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
                f"{name} = {found[name].value:.3f} ± {half:.3f} (95 %): the half-width of the interval is more "
                "than half of the value"
            )
    half, least = (found["E"].high - found["E"].low) / 2, float(points.loss.min())
    if half > E_WIDTH * least:
        reasons.append(
            f"E = {found['E'].value:.3f} ± {half:.3f} (95 %): the half-width of the interval is more than a "
            f"tenth of the lowest loss, {least:.3f}"
        )
    if found["E"].value < 1e-3 * least:
        reasons.append("E is at its bound of zero")
    return reasons


def leave_one_shape_out(points: Points, fitted: Fit) -> dict[str, float]:
    """Return shape -> mean absolute relative error of its losses under a law fitted to all other shapes.

    If there are more shapes than MOST_SHAPES, only this many of them, evenly spread, are left out in turn.
    """
    shapes = np.unique(points.shape)
    shapes = shapes[np.unique(np.linspace(0, len(shapes) - 1, MOST_SHAPES).round().astype(int))]
    return {str(shape): _error_of(points, points.shape == shape, fitted) for shape in shapes}


def hold_out_largest(points: Points, fitted: Fit) -> float:
    """Return the mean absolute relative error at the largest size under a law fitted to all smaller sizes.

    Every N above the largest N / 1.1 counts as the largest size, because shapes of one size differ a little in N.
    """
    return _error_of(points, points.parameters > points.parameters.max() / 1.1, fitted)


def local_slopes(points: Points) -> dict[str, Estimate]:
    """Return d ln L / d ln x for each x of N, D and depth that varies, by regression with errors clustered by run.

    Each slope holds the other variables fixed. The slopes describe the range of the points, not what lies beyond it.
    """
    names = [n for n in ("parameters", "tokens", "depth") if np.ptp(np.log(getattr(points, n))) > 0.05]
    columns = np.column_stack([np.ones(len(points)), *(np.log(getattr(points, name)) for name in names)])
    found = regress(columns, np.log(points.loss), points.run)
    return {name: found.estimate(1 + place) for place, name in enumerate(names)}


def lack_of_fit(points: Points, fitted: Fit) -> LackOfFit | None:
    """Return the F test on the mean residual of each run (points of a run are not independent).

    None if no shape has two seeds, or if there are too few shapes for the unknowns.
    """
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
