"""Test whether several architectures have the same irreducible loss E, and fit them jointly with one E.

Architectures with the same data and the same receptive field can only differ in how fast they approach its entropy. A
shared E determines the differences in A, alpha, B and beta better. E is shared only if the difference is shown to be
small: a difference that is merely not significant is no reason to share it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from bst_dist.study.laws.fit import Fit, FitError, bounds_of, fit, log_loss, objective, polish
from bst_dist.study.laws.law import Centre, FormName, Law, Points, Vector, as_law, terms, widths
from bst_dist.study.laws.uncertainty import bootstrap
from bst_dist.study.statistics import Estimate

MARGIN = 0.01
"""The margin within which two values of E count as equal, as a share of the lowest loss."""
FORM: FormName = "chinchilla"
DELTA = 1e-3
"""As in `fit`."""


@dataclass(frozen=True)
class JointFit:
    """Laws that share E."""

    laws: dict[str, Law]
    value: float
    """Value of the objective over all groups."""
    separate: float
    """Value of the same objective if each group has its own E. It is never larger."""


def e_difference(points: Points, first: str, second: str, draws: int = 100) -> Estimate:
    """Return E of the second group minus E of the first, as a share of their lowest loss; the error is by bootstrap."""
    points = points.take(np.isin(points.group, (first, second)))
    found = []
    for seed, group in enumerate((first, second)):
        own = points.take(points.group == group)
        fitted = fit(own)
        found.append((fitted.law.E, np.array([law.E for law in bootstrap(fitted, own, draws, seed)])))
    (e, drawn), (other, other_drawn) = found
    least = float(points.loss.min())
    degrees = len(np.unique(points.run)) - 2 * sum(widths("chinchilla"))
    if degrees < 1:
        raise FitError("too few runs to compare two values of E")
    return Estimate((other - e) / least, float(np.std(other_drawn - drawn, ddof=1)) / least, degrees)


def fit_shared(points: Points) -> JointFit:
    """Fit all groups together with one E; all other unknowns are separate for each group.

    The search starts from several values of E between those of the separate fits.
    """
    groups = [str(group) for group in np.unique(points.group)]
    if len(groups) < 2:
        raise FitError("a joint fit needs two architectures at least")
    centre, target = Centre.of(points), np.log(points.loss)
    alone = [_centred(fit(points.take(points.group == group), FORM, DELTA), centre) for group in groups]
    matrices, bounds = terms(FORM, points, centre, groups), _stack(FORM, [bounds_of(FORM, target)] * len(groups))
    own = sorted(theta[0] for theta in alone)
    found = []
    for e in np.unique(np.log(np.linspace(np.exp(own[0]), np.exp(own[-1]), 4))):
        begin = _stack(FORM, alone)
        begin[0] = e
        found.append(polish(matrices, target, begin, DELTA, bounds))
    value, theta = min((objective(target - log_loss(matrices, t)[0], DELTA), tuple(t)) for t in found)
    separate = sum(
        _value(points.take(points.group == g), FORM, centre, t, DELTA) for g, t in zip(groups, alone, strict=True)
    )
    laws = {g: as_law(FORM, t, centre) for g, t in zip(groups, _split(FORM, np.array(theta), len(groups)), strict=True)}
    return JointFit(laws, value, separate)


def _centred(fitted: Fit, centre: Centre) -> Vector:
    """Return the unknowns of a fit, converted to another centre."""
    moved, begin = fitted.theta.copy(), 1
    names = ["width", "depth", "tokens"] if fitted.form == "additive" else ["parameters", "tokens"]
    shift = np.log(centre.width / centre.depth) - np.log(fitted.centre.width / fitted.centre.depth)
    for name, width in zip(names, widths(fitted.form)[1:], strict=True):
        if width == 4:
            linear, curved = moved[begin + 2 : begin + 4]
            moved[begin] += linear * shift + curved * shift**2
            moved[begin + 2] += 2 * curved * shift
        moved[begin] -= moved[begin + 1] * np.log(getattr(centre, name) / getattr(fitted.centre, name))
        begin += width
    return moved


def _stack(form: FormName, alone: list[Vector]) -> Vector:
    """Return the groups' unknowns (or bounds) in the order of the joint fit: E once, then each term group by group."""
    cut = np.cumsum(widths(form))[:-1]
    parts = [np.split(theta, cut) for theta in alone]
    return np.concatenate([parts[0][0], *(part[k] for k in range(1, len(cut) + 1) for part in parts)])


def _split(form: FormName, theta: Vector, groups: int) -> list[Vector]:
    """Return the unknowns of each group: the inverse of `_stack`."""
    own, begin = [[theta[:1]] for _ in range(groups)], 1
    for width in widths(form)[1:]:
        for parts in own:
            parts.append(theta[begin : begin + width])
            begin += width
    return [np.concatenate(parts) for parts in own]


def _value(points: Points, form: FormName, centre: Centre, theta: Vector, delta: float) -> float:
    return objective(np.log(points.loss) - log_loss(terms(form, points, centre), theta)[0], delta)
