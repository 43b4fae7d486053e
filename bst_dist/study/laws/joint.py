"""One irreducible loss for several architectures: a joint fit, and whether the points speak against it.

Architectures that see the same text through the same receptive field can only differ in how fast they approach its
entropy. Where E is shared, differences in A, alpha, B and beta are better determined.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from bst_dist.study.laws.fit import Fit, FitError, bounds_of, fit, log_loss, objective, polish
from bst_dist.study.laws.law import Centre, FormName, Law, Points, Vector, as_law, terms


@dataclass(frozen=True)
class JointFit:
    """Laws that share E."""

    laws: dict[str, Law]
    value: float
    """The objective over all groups."""
    separate: float
    """The same objective when each group has an E of its own: never larger."""


def fit_shared(points: Points, form: FormName = "chinchilla", delta: float = 1e-3, rounds: int = 2) -> JointFit:
    """Fit every group at once with one E, each keeping the rest of its law to itself.

    Starts from several values of E between those the groups have on their own.
    """
    groups = [str(group) for group in np.unique(points.group)]
    if len(groups) < 2:
        raise FitError("a joint fit needs two architectures at least")
    centre, target = Centre.of(points), np.log(points.loss)
    alone = [_centred(fit(points.take(points.group == group), form, delta), centre) for group in groups]
    matrices = terms(form, points, centre, groups)
    bounds = _joint_bounds(form, target, len(groups))
    own = sorted(theta[0] for theta in alone)
    found = [
        polish(matrices, target, _stack(form, e, alone), delta, bounds, rounds)
        for e in np.unique(np.log(np.linspace(np.exp(own[0]), np.exp(own[-1]), 4)))
    ]
    value, theta = min((objective(target - log_loss(matrices, t)[0], delta), tuple(t)) for t in found)
    separate = sum(_value(points.take(points.group == g), form, centre, t, delta)
                   for g, t in zip(groups, alone, strict=True))  # fmt: skip
    laws = {g: as_law(form, t, centre) for g, t in zip(groups, _split(form, np.array(theta), len(groups)), strict=True)}
    return JointFit(laws, value, separate)


def shared_e_p_value(points: Points, form: FormName = "chinchilla", delta: float = 1e-3, draws: int = 99,
                     seed: int = 0) -> float:  # fmt: skip
    """How often runs that do share E would speak against it as much as these do, by a parametric bootstrap.

    Losses are drawn from the joint fit; a residual of a run is its own level plus what is left, so that points of one
    run stay together. A small value: do not share E.
    """
    generator = np.random.default_rng(seed)
    joint = fit_shared(points, form, delta)
    predicted = np.empty(len(points))
    for group, law in joint.laws.items():
        own = points.group == group
        predicted[own] = law.loss(points.parameters[own], points.tokens[own], points.aspect[own])
    residuals = np.log(points.loss / predicted)
    runs, number = np.unique(points.run, return_inverse=True)
    level = np.array([residuals[number == index].mean() for index in range(len(runs))])
    rest = residuals - level[number]
    more = 0
    for _ in range(draws):
        noise = generator.permutation(level)[number] + rest * generator.choice((-1, 1), size=len(runs))[number]
        drawn = Points(**{**points.__dict__, "loss": predicted * np.exp(noise)})
        again = fit_shared(drawn, form, delta, rounds=1)
        more += again.value - again.separate >= joint.value - joint.separate
    return (1 + more) / (1 + draws)


def _centred(fitted: Fit, centre: Centre) -> Vector:
    """A fit's unknowns, moved to another centre."""
    e, a, alpha, *bend = fitted.theta[:-2]
    b, beta = fitted.theta[-2:]
    if bend:
        shift = np.log(centre.aspect / fitted.centre.aspect)
        linear, curved = bend
        a, bend = a + linear * shift + curved * shift**2, [linear + 2 * curved * shift, curved]
    a -= alpha * np.log(centre.parameters / fitted.centre.parameters)
    b -= beta * np.log(centre.tokens / fitted.centre.tokens)
    return np.array([e, a, alpha, *bend, b, beta])


def _stack(form: FormName, e: float, alone: list[Vector]) -> Vector:
    width = 2 if form == "chinchilla" else 4
    return np.concatenate(([e], *(t[1 : 1 + width] for t in alone), *(t[1 + width :] for t in alone)))


def _split(form: FormName, theta: Vector, groups: int) -> list[Vector]:
    width = 2 if form == "chinchilla" else 4
    second = theta[1 : 1 + width * groups].reshape(groups, width)
    third = theta[1 + width * groups :].reshape(groups, 2)
    return [np.concatenate((theta[:1], a, b)) for a, b in zip(second, third, strict=True)]


def _joint_bounds(form: FormName, target: Vector, groups: int) -> Vector:
    one = bounds_of(form, target)
    width = 2 if form == "chinchilla" else 4
    return np.vstack((one[:1], *[one[1 : 1 + width]] * groups, *[one[1 + width :]] * groups))


def _value(points: Points, form: FormName, centre: Centre, theta: Vector, delta: float) -> float:
    return objective(np.log(points.loss) - log_loss(terms(form, points, centre), theta)[0], delta)
