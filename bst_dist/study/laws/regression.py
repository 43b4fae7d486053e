"""Least squares with standard errors that are valid for few, heteroscedastic and correlated points; permutation tests.

Sources: HC3: MacKinnon and White, J. Econometrics 29 (1985). Its form for clusters, the jackknife CR3: MacKinnon,
Nielsen and Webb, J. Applied Econometrics 38 (2023). Permutation of the residuals of the reduced model: Freedman and
Lane, J. Business & Economic Statistics 1 (1983).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from bst_base.errors import UserError
from bst_dist.study.statistics import Estimate

Vector = np.ndarray
SINGULAR = 1e-8
"""Eigenvalues of I - H (between 0 and 1) up to this are rounding errors of 0."""


class RegressionError(UserError):
    """The observations do not determine the coefficients."""


class Alone(NamedTuple):
    """What one cluster alone determines. Its noise is in the coefficients, but in no residual, so in no error."""

    cluster: str
    direction: Vector
    """(p,): adding a multiple of it to the coefficients changes no fitted value outside of the cluster."""


def rests_on(alone: Sequence[Alone], weights: Vector) -> str | None:
    """Return the cluster without which a weighted sum of coefficients is not determined; None if there is none."""
    for cluster, direction in alone:
        if abs(direction @ weights) > 1e-6 * np.linalg.norm(direction) * np.linalg.norm(weights):
            return cluster
    return None


@dataclass(frozen=True)
class Regression:
    """Coefficients (p,), their covariance (p, p), and the degrees of freedom of the t distribution for their tests."""

    values: Vector
    covariance: Vector
    degrees: int
    alone: tuple[Alone, ...]

    def estimate(self, weights: Vector | int) -> Estimate:
        """Return one coefficient, by its index, or a weighted sum of all coefficients.

        It has no standard error if it rests on one cluster.
        """
        weights = np.eye(len(self.values))[weights] if isinstance(weights, int) else np.asarray(weights)
        if rests_on(self.alone, weights) is not None:
            return Estimate(float(weights @ self.values), None)
        variance = max(0.0, float(weights @ self.covariance @ weights))
        return Estimate(float(weights @ self.values), float(np.sqrt(variance)), self.degrees)


@dataclass(frozen=True)
class Estimator:
    """Least squares on fixed columns, with errors robust to any correlation inside a cluster.

    Coefficients and the clusters' parts of the errors are linear in the target. So one matrix product computes them for
    many targets. If every point is its own cluster, the errors are HC3. The degrees of freedom are clusters minus
    columns: more points in the same cluster are no independent evidence.
    """

    coefficients: Vector
    """(p, n): maps the target to the coefficients."""
    scores: Vector
    """(G, p, n): maps the target to each cluster's part of the errors."""
    degrees: int
    alone: tuple[Alone, ...]

    @classmethod
    def of(cls, columns: Vector, clusters: Vector) -> Estimator:
        """Prepare for `columns` (n, p). Raises RegressionError for too few clusters or collinear columns."""
        names, number = np.unique(clusters, return_inverse=True)
        n, p = columns.shape
        if len(names) <= p:
            raise RegressionError(f"{len(names)} independent runs are too few for {p} coefficients and their errors")
        if np.linalg.matrix_rank(columns) < p:
            raise RegressionError("the columns of the regression are collinear")
        inverse = np.linalg.inv(columns.T @ columns)
        coefficients = inverse @ columns.T
        residual_maker = np.eye(n) - columns @ coefficients
        scores, alone = np.empty((len(names), p, n)), []
        for index in range(len(names)):
            own = np.flatnonzero(number == index)
            values, vectors = np.linalg.eigh(residual_maker[np.ix_(own, own)])  # of I - H of the cluster
            kept = values > SINGULAR
            inverse_left = vectors[:, kept] / values[kept] @ vectors[:, kept].T
            scores[index] = coefficients[:, own] @ inverse_left @ residual_maker[own]
            alone += [Alone(str(names[index]), one) for one in (coefficients[:, own] @ vectors[:, ~kept]).T]
        if len(names) < n:
            scores *= np.sqrt((len(names) - 1) / len(names))
        return cls(coefficients, scores, len(names) - p, tuple(alone))


def regress(columns: Vector, target: Vector, clusters: Vector) -> Regression:
    """Regress `target` (n,) on `columns` (n, p) by least squares. `Estimator` describes the errors."""
    estimator = Estimator.of(columns, clusters)
    scores = estimator.scores @ target  # (G, p)
    return Regression(estimator.coefficients @ target, scores.T @ scores, estimator.degrees, estimator.alone)


def clustered_mean(values: Vector, clusters: Vector) -> Estimate:
    """Return the mean of `values` (n,); one cluster alone has no standard error."""
    if len(np.unique(clusters)) < 2:
        return Estimate(float(values.mean()), None)
    return regress(np.ones((len(values), 1)), values, clusters).estimate(0)


class CoefficientTest:
    """The t test and the permutation test of one coefficient, prepared once for any number of targets.

    The permutation test fits without the coefficient's column and permutes the residuals among clusters of equal size.
    Whole clusters move, so correlated points stay together. The statistic is the coefficient divided by its error.
    """

    def __init__(self, columns: Vector, clusters: Vector, index: int, draws: int) -> None:
        """Raise RegressionError if the columns are collinear or there are too few clusters."""
        estimator = Estimator.of(columns, clusters)
        self.degrees = estimator.degrees
        self.rests_on = rests_on(estimator.alone, np.eye(columns.shape[1])[index])
        """The cluster that alone determines the coefficient, so that neither test is valid; None if none does."""
        self.weights, self.scores = estimator.coefficients[index], estimator.scores[:, index]  # (n,), (G, n)
        reduced = np.delete(columns, index, axis=1)
        self.residual_maker = np.eye(len(columns)) - reduced @ np.linalg.pinv(reduced)
        self.places = _dealt(clusters, draws)

    def estimates(self, targets: Vector) -> tuple[Vector, Vector]:
        """Return the coefficient (m,) and its standard error (m,) for each of the targets (m, n)."""
        return targets @ self.weights, np.sqrt(((targets @ self.scores.T) ** 2).sum(-1))

    def permutation_p(self, targets: Vector) -> Vector:
        """Return the two-sided p (m,) for each of the targets (m, n).

        The part of the target that the other columns fit does not change the statistic, so only residuals are needed.
        Instead of the residuals, the weights are permuted in the opposite direction: this has the same result.
        """
        residuals = targets @ self.residual_maker.T
        observed = _ratio(*self.estimates(residuals)) * (1 - 1e-9)
        more = np.zeros(len(targets))
        for first in range(0, len(self.places), self._at_once(len(targets))):
            places = self.places[first : first + self._at_once(len(targets))]
            sizes = residuals @ self.weights[places].T  # (m, draws)
            scores = np.tensordot(residuals, self.scores[:, places], axes=(1, 2))  # (m, G, draws)
            more += (_ratio(sizes, np.sqrt((scores**2).sum(1))) >= observed[:, None]).sum(1)
        return (1 + more) / (1 + len(self.places))

    def _at_once(self, targets: int) -> int:
        """Return the number of draws to compute at once, so that arrays take a few tens of megabytes."""
        groups, n = self.scores.shape
        return max(1, 4_000_000 // (groups * max(n, targets)))


def _dealt(clusters: Vector, draws: int) -> Vector:
    """Return random permutations (draws, n) of the points that exchange whole clusters of equal size."""
    generator = np.random.default_rng(0)
    members = [np.flatnonzero(clusters == name) for name in np.unique(clusters)]
    places = np.empty((draws, len(clusters)), int)
    for size in {len(own) for own in members}:
        alike = np.stack([own for own in members if len(own) == size])  # (clusters, size)
        order = generator.permuted(np.tile(np.arange(len(alike)), (draws, 1)), axis=1)
        places[:, alike] = alike[order]
    return places


def _ratio(value: Vector, error: Vector) -> Vector:
    """Return |value| / error, with 0 / 0 = 0."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.nan_to_num(np.abs(value) / error, nan=0.0, posinf=np.inf)


def holm(p_values: Vector) -> Vector:
    """Return p values adjusted so that the probability of any false rejection stays below the level (Holm 1979).

    `p_values` is (k,) for k tests, or (k, m) for k tests in each of m studies, which are adjusted separately.
    """
    p = np.asarray(p_values, float)
    order = np.argsort(p, axis=0)
    left = np.arange(len(p), 0, -1).reshape(-1, *[1] * (p.ndim - 1))
    adjusted = np.maximum.accumulate(np.minimum(1.0, left * np.take_along_axis(p, order, 0)), axis=0)
    found = np.empty_like(p)
    np.put_along_axis(found, order, adjusted, 0)
    return found
