"""Scaling laws of the loss, all of them a sum of powers, fitted in one way.

Every form here is a sum of terms whose logarithms are linear in the unknowns,

    ln L = ln sum_k exp(X_k theta_k),

so one gradient, one grid of starting points and one polish serve them all, and a joint fit of several architectures
is the same with wider matrices. The terms, in this order: the irreducible loss, what more parameters would take away,
what more tokens would.

Sources: the form L = E + A N^-alpha + B D^-beta: Hoffmann et al., arXiv 2203.15556, section 3.3. The depth form adds
a penalty exp(kappa (r - r*)^2) on the second term, r = ln(width / depth): a best aspect ratio, the same at every size.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

FormName = Literal["chinchilla", "depth"]
Vector = np.ndarray


@dataclass(frozen=True)
class Points:
    """Losses to fit, one entry a measurement; every array is (n,)."""

    loss: Vector
    """Nats a token."""
    parameters: Vector
    """N, however it is counted; the headline count is training FLOPs a token / 6."""
    tokens: Vector
    """D, tokens trained on."""
    aspect: Vector
    """Width / depth; ones where only the Chinchilla form is fitted."""
    run: Vector
    """The run a measurement belongs to: points of one run, or of one trunk and its branches, are not independent."""
    shape: Vector
    """The shape a measurement belongs to, for leaving one out."""
    group: Vector
    """What has a law of its own in a joint fit: the architecture."""

    def take(self, index: Vector) -> Points:
        """Some of the points, by a mask or by positions (which may repeat)."""
        return replace(self, **{name: getattr(self, name)[index] for name in self.__dataclass_fields__})

    def __len__(self) -> int:
        return len(self.loss)


@dataclass(frozen=True)
class Centre:
    """Where the logarithms are centred: without this the intercepts and the exponents are all but collinear."""

    parameters: float
    tokens: float
    aspect: float

    @classmethod
    def of(cls, points: Points) -> Centre:
        """Geometric means."""
        means = (np.exp(np.log(x).mean()) for x in (points.parameters, points.tokens, points.aspect))
        return cls(*map(float, means))


@dataclass(frozen=True)
class Law:
    """One law, in the terms in which it is published."""

    E: float
    A: float
    alpha: float
    B: float
    beta: float
    kappa: float = 0.0
    """Curvature of the penalty on the aspect ratio; 0: the Chinchilla form."""
    log_aspect: float = 0.0
    """r*, the logarithm of the best width / depth; of no meaning where kappa is 0 or less."""

    def loss(self, parameters: Vector, tokens: Vector, aspect: Vector | float = 1.0) -> Vector:
        """Loss in nats for N, D and width / depth."""
        penalty = np.exp(self.kappa * (np.log(aspect) - self.log_aspect) ** 2)
        return self.E + self.A * parameters**-self.alpha * penalty + self.B * tokens**-self.beta

    def optimum(self, flops: float) -> tuple[float, float]:
        """N and D of least loss for C = 6 N D at the best aspect ratio (Hoffmann et al., equation 4)."""
        gain = (self.alpha * self.A / (self.beta * self.B)) ** (1 / (self.alpha + self.beta))
        parameters = gain * (flops / 6) ** (self.beta / (self.alpha + self.beta))
        return parameters, flops / 6 / parameters


def slopes(form: FormName, points: Points, centre: Centre) -> tuple[Vector, Vector]:
    """The columns beside the intercept of the second and the third term: (n, 1 or 3) and (n, 1)."""
    columns = [-np.log(points.parameters / centre.parameters)]
    if form == "depth":
        aspect = np.log(points.aspect / centre.aspect)
        columns += [aspect, aspect**2]
    return np.stack(columns, axis=1), -np.log(points.tokens / centre.tokens)[:, None]


def terms(form: FormName, points: Points, centre: Centre, groups: list[str] | None = None) -> list[Vector]:
    """The matrices X_k of the three terms; with `groups`, the second and third once a group, the first shared."""
    one = np.ones((len(points), 1))
    own = [np.hstack((one, columns)) for columns in slopes(form, points, centre)]
    if groups is None:
        return [one, *own]
    masks = [(points.group == group)[:, None] for group in groups]
    return [one, *(np.hstack([columns * mask for mask in masks]) for columns in own)]


def as_law(form: FormName, theta: Vector, centre: Centre) -> Law:
    """The law of centred unknowns: (ln E, a, alpha[, c1, c2], b, beta)."""
    e, a, alpha, *bend = theta[:-2]
    b, beta = theta[-2:]
    kappa = best = 0.0
    if form == "depth":
        linear, kappa = bend
        middle = np.log(centre.aspect)
        best = middle - linear / (2 * kappa) if kappa else middle
        a -= kappa * (middle - best) ** 2
    return Law(
        E=float(np.exp(e)),
        A=float(np.exp(a + alpha * np.log(centre.parameters))),
        alpha=float(alpha),
        B=float(np.exp(b + beta * np.log(centre.tokens))),
        beta=float(beta),
        kappa=float(kappa),
        log_aspect=float(best),
    )
