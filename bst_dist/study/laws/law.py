"""Scaling laws of the loss. All forms are sums of powers and are fitted in the same way.

Every form is a sum of terms whose logarithms are linear in the unknowns:

    ln L = ln sum_k exp(X_k theta_k).

So all forms share one gradient, one grid of starting points and one local search, and a joint fit of several
architectures only has wider matrices. The first term is the irreducible loss E. The other terms, by form:

- chinchilla: A N^-alpha + B D^-beta (Hoffmann et al., arXiv 2203.15556, section 3.3);
- aspect: the same with the term in N times exp(kappa (r - r*)^2), r = ln(width / depth), kappa >= 0: one aspect ratio
  is best at every size;
- additive: A width^-alpha + G depth^-gamma + B D^-beta: width and depth reduce the loss separately.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

FormName = Literal["chinchilla", "aspect", "additive"]
FORMS: tuple[FormName, ...] = ("chinchilla", "aspect", "additive")
Vector = np.ndarray
FAR = 10.0
"""Distance in ln(width / depth) from the centre of the points, beyond which a best ratio counts as none."""


@dataclass(frozen=True)
class Points:
    """Losses to fit; every array is (n,), with one entry per measurement."""

    loss: Vector
    """Nats per token."""
    parameters: Vector
    """N, as parameters or as non-embedding parameters."""
    tokens: Vector
    """D, tokens trained on."""
    width: Vector
    """All ones if widths and depths are not known; then only the chinchilla form can be fitted."""
    depth: Vector
    run: Vector
    """The run of each measurement. Points of one run, or of one trunk and its branches, are not independent."""
    group: Vector
    """The architecture of each measurement. Each architecture has its own law."""

    @property
    def shape(self) -> Vector:
        """Labels (n,) for leaving out one shape: width x depth, or the size N if all widths are 1 (not known)."""
        if (self.width == 1).all():
            return np.array([f"N {n:.2g}" for n in self.parameters])
        return np.array([f"{w:g} x {d:g}" for w, d in zip(self.width, self.depth, strict=True)])

    def take(self, index: Vector) -> Points:
        """Return the points selected by a mask or by indices, which may repeat."""
        return replace(self, **{name: getattr(self, name)[index] for name in self.__dataclass_fields__})

    def __len__(self) -> int:
        return len(self.loss)


@dataclass(frozen=True)
class Centre:
    """The values at which the logarithms are centred. Without it, intercepts and exponents are nearly collinear."""

    parameters: float
    tokens: float
    width: float
    depth: float

    @classmethod
    def of(cls, points: Points) -> Centre:
        """Return the geometric means of the points."""
        columns = (points.parameters, points.tokens, points.width, points.depth)
        return cls(*(float(np.exp(np.log(x).mean())) for x in columns))


@dataclass(frozen=True)
class Law:
    """One law, in the parametrisation of the literature."""

    E: float
    A: float
    alpha: float
    B: float
    beta: float
    kappa: float = 0.0
    """aspect: curvature of the penalty on the aspect ratio, never negative."""
    log_aspect: float = 0.0
    """aspect: r*, the logarithm of the best width / depth; without a best one, the origin of the slope `tilt`."""
    tilt: float = 0.0
    """aspect: slope of the penalty if no aspect ratio is best; else 0."""
    G: float | None = None
    """additive: scale of the term in depth, with exponent gamma. A and alpha then belong to the term in width."""
    gamma: float | None = None

    @property
    def has_valley(self) -> bool:
        """Whether the law has a best aspect ratio."""
        return self.kappa > 0 and self.tilt == 0

    def loss(
        self, parameters: Vector, tokens: Vector, width: Vector | float = 1.0, depth: Vector | float = 1.0
    ) -> Vector:
        """Return the loss in nats."""
        rest = self.E + self.B * tokens**-self.beta
        if self.G is not None and self.gamma is not None:
            return rest + self.A * np.power(width, -self.alpha) + self.G * np.power(depth, -self.gamma)
        off = np.log(np.divide(width, depth)) - self.log_aspect
        return rest + self.A * parameters**-self.alpha * np.exp(self.kappa * off**2 + self.tilt * off)

    def best_aspect(self, low: float, high: float) -> float:
        """Return the ln(width / depth) of least loss between `low` and `high`; only for the aspect form."""
        if self.kappa > 0:
            lowest = self.log_aspect - self.tilt / (2 * self.kappa)
        else:
            lowest = self.log_aspect if self.tilt == 0 else -np.sign(self.tilt) * np.inf
        return float(np.clip(lowest, low, high))

    def optimum(
        self, flops: float, ratio: float = 12.0, aspects: tuple[float, float] = (-np.inf, np.inf)
    ) -> tuple[float, float]:
        """Return N and D of least loss for C = 6 N D, with the best shape for each N (Hoffmann et al., equation 4).

        Args:
            ratio: N / (width^2 depth); only the additive form uses it.
            aspects: the ln(width / depth) allowed; only the aspect form uses it.
        """
        if self.G is None:
            scale = self.A
            if self.kappa or self.tilt:
                off = self.best_aspect(*aspects) - self.log_aspect
                scale *= float(np.exp(self.kappa * off**2 + self.tilt * off))
            gain = (self.alpha * scale / (self.beta * self.B)) ** (1 / (self.alpha + self.beta))
            parameters = gain * (flops / 6) ** (self.beta / (self.alpha + self.beta))
            return parameters, flops / 6 / parameters
        sizes = np.exp(np.linspace(np.log(flops) / 2 - 12, np.log(flops) / 2 + 12, 4801))
        widths, depths = self.shape_of(sizes, ratio)
        best = int(np.argmin(self.loss(sizes, flops / 6 / sizes, widths, depths)))
        return float(sizes[best]), float(flops / 6 / sizes[best])

    def shape_of(self, parameters: Vector, ratio: float) -> tuple[Vector, Vector]:
        """Return the real-valued width and depth of least loss for N = ratio width^2 depth; NaN if no shape is best."""
        size = np.asarray(parameters, float) / ratio
        if self.G is not None and self.gamma is not None:  # A w^-a + G d^-g at w^2 d fixed: a A w^-a = 2 g G d^-g
            power = self.alpha + 2 * self.gamma
            width = (self.alpha * self.A / (2 * self.gamma * self.G) * size**self.gamma) ** (1 / power)
            return width, size / width**2
        if not self.has_valley:
            return np.full_like(size, np.nan), np.full_like(size, np.nan)
        depth = (size / np.exp(2 * self.log_aspect)) ** (1 / 3)
        return depth * np.exp(self.log_aspect), depth


def slopes(form: FormName, points: Points, centre: Centre) -> list[Vector]:
    """Return the columns (n, p) of each term after the first, without the intercept."""

    def falling(name: str) -> Vector:
        return -np.log(getattr(points, name) / getattr(centre, name))[:, None]

    if form == "additive":
        return [falling("width"), falling("depth"), falling("tokens")]
    by_size = falling("parameters")
    if form == "aspect":
        aspect = falling("depth") - falling("width")
        by_size = np.hstack((by_size, aspect, aspect**2))
    return [by_size, falling("tokens")]


def terms(form: FormName, points: Points, centre: Centre, groups: list[str] | None = None) -> list[Vector]:
    """Return the matrices X_k of the terms. With `groups`, all but the first have separate columns for each group."""
    one = np.ones((len(points), 1))
    own = [np.hstack((one, columns)) for columns in slopes(form, points, centre)]
    if groups is None:
        return [one, *own]
    masks = [(points.group == group)[:, None] for group in groups]
    return [one, *(np.hstack([columns * mask for mask in masks]) for columns in own)]


def widths(form: FormName) -> list[int]:
    """Return the number of unknowns of each term, including the first."""
    return {"chinchilla": [1, 2, 2], "aspect": [1, 4, 2], "additive": [1, 2, 2, 2]}[form]


def as_law(form: FormName, theta: Vector, centre: Centre) -> Law:
    """Convert centred unknowns, in the order of the terms, to a law."""
    e, *parts = np.split(theta, np.cumsum(widths(form))[:-1])

    def scale(part: Vector, name: str) -> float:
        return float(np.exp(part[0] + part[1] * np.log(getattr(centre, name))))

    tokens = parts[-1]
    common = {"E": float(np.exp(e[0])), "B": scale(tokens, "tokens"), "beta": float(tokens[1])}
    first = parts[0]
    if form == "additive":
        second = {"G": scale(parts[1], "depth"), "gamma": float(parts[1][1])}
        return Law(**common, A=scale(first, "width"), alpha=float(first[1]), **second)
    bend = {}
    if form == "aspect":
        first, bend = _bend(first, float(np.log(centre.width / centre.depth)))
    return Law(**common, A=scale(first, "parameters"), alpha=float(first[1]), **bend)


def _bend(part: Vector, middle: float) -> tuple[Vector, dict[str, float]]:
    """Return the term's scale and exponent, and the penalty relative to its best ratio.

    Without a best ratio, or with one further than FAR from `middle` (the centre of the points), the penalty is a slope
    and a curvature at `middle`.
    """
    linear, kappa = float(part[2]), float(part[3])
    off = -linear / (2 * kappa) if kappa > 0 else np.inf
    if abs(off) > FAR:
        return part[:2], {"kappa": kappa, "log_aspect": middle, "tilt": linear}
    return np.array([part[0] - kappa * off**2, part[1]]), {"kappa": kappa, "log_aspect": middle + off}
