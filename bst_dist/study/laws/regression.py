"""Least squares whose errors stand up to few, unequal and correlated points, and tests that assume less still.

Sources: HC3, MacKinnon and White, J. Econometrics 29 (1985); its form for clusters, the jackknife CR3, MacKinnon,
Nielsen and Webb, J. Applied Econometrics 38 (2023); permutation of the residuals of the reduced model, Freedman and
Lane, J. Business & Economic Statistics 1 (1983).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy import stats

from bst_base.errors import UserError

Vector = np.ndarray


class RegressionError(UserError):
    """Observations that do not settle what is asked of them."""


@dataclass(frozen=True)
class Regression:
    """Coefficients (p,), their covariance, and the degrees of freedom of the t distribution they are judged by."""

    values: Vector
    covariance: Vector
    degrees: int

    @property
    def standard_errors(self) -> Vector:
        """(p,)"""
        return np.sqrt(np.diag(self.covariance))

    def p_value(self, index: int) -> float:
        """Two-sided, of the coefficient being 0."""
        return float(2 * stats.t.sf(abs(self.values[index] / self.standard_errors[index]), self.degrees))


@dataclass(frozen=True)
class Estimator:
    """Least squares on fixed columns, with errors robust to any correlation inside a cluster.

    Both the coefficients and what their errors are made of are linear in the target, so that many targets cost no more
    than one. With every point a cluster of its own the errors are HC3. The degrees of freedom are clusters less
    columns: points of a cluster are no new evidence.
    """

    coefficients: Vector
    """(p, n): from the target to the values."""
    scores: Vector
    """(G, p, n): from the target to each cluster's part in the errors."""
    degrees: int

    @classmethod
    def of(cls, columns: Vector, clusters: Vector) -> Estimator:
        """For `columns` (n, p); raises RegressionError when there are too few clusters or collinear columns."""
        names, number = np.unique(clusters, return_inverse=True)
        n, p = columns.shape
        if len(names) <= p:
            raise RegressionError(f"{len(names)} independent runs cannot settle {p} coefficients and their errors")
        if np.linalg.matrix_rank(columns) < p:
            raise RegressionError("the columns of the regression are collinear")
        inverse = np.linalg.inv(columns.T @ columns)
        coefficients = inverse @ columns.T
        residual_maker = np.eye(n) - columns @ coefficients
        scores = np.empty((len(names), p, n))
        for index in range(len(names)):
            own = np.flatnonzero(number == index)
            left = residual_maker[np.ix_(own, own)]  # I - H of the cluster, singular where it alone settles something
            scores[index] = coefficients[:, own] @ np.linalg.pinv(left, hermitian=True) @ residual_maker[own]
        if len(names) < n:
            scores *= np.sqrt((len(names) - 1) / len(names))
        return cls(coefficients, scores, len(names) - p)

    def statistics(self, targets: Vector, index: int) -> Vector:
        """Size of coefficient `index` over its error, for each of many targets (m, n)."""
        errors = np.sqrt(((targets @ self.scores[:, index].T) ** 2).sum(-1))
        return np.abs(targets @ self.coefficients[index]) / errors


def regress(columns: Vector, target: Vector, clusters: Vector) -> Regression:
    """Least squares of `target` (n,) on `columns` (n, p); see Estimator for the errors."""
    estimator = Estimator.of(columns, clusters)
    scores = estimator.scores @ target  # (G, p)
    return Regression(estimator.coefficients @ target, scores.T @ scores, estimator.degrees)


def permutation_p(columns: Vector, target: Vector, clusters: Vector, index: int, draws: int = 999,
                  seed: int = 0) -> float:  # fmt: skip
    """Two-sided p of column `index`: the residuals without it are dealt again to clusters with as many points.

    Whole clusters are dealt, so what is correlated stays together; the statistic is the coefficient over its error.
    """
    generator = np.random.default_rng(seed)
    reduced = np.delete(columns, index, axis=1)
    fitted = reduced @ np.linalg.lstsq(reduced, target, rcond=None)[0]
    members = [np.flatnonzero(clusters == name) for name in np.unique(clusters)]
    dealt = np.empty((draws, len(target)))
    for size in {len(own) for own in members}:
        alike = np.stack([own for own in members if len(own) == size])  # (clusters, size)
        order = generator.permuted(np.tile(np.arange(len(alike)), (draws, 1)), axis=1)
        dealt[:, alike] = (target - fitted)[alike[order]]
    statistics = Estimator.of(columns, clusters).statistics(np.vstack((target, fitted + dealt)), index)
    more = (statistics[1:] >= statistics[0] * (1 - 1e-9)).sum()
    return float((1 + more) / (1 + draws))


def equivalence_p(value: float, standard_error: float, degrees: int, margin: float) -> float:
    """p of the effect lying outside ±margin: two one-sided t tests (Schuirmann 1987); small: equivalent to none."""
    return float(stats.t.sf((margin - abs(value)) / standard_error, degrees))


def holm(p_values: list[float]) -> list[float]:
    """Adjusted p values that keep the chance of any false finding among all below the level (Holm 1979)."""
    order = np.argsort(p_values)
    adjusted = np.maximum.accumulate([min(1.0, (len(order) - rank) * p_values[i]) for rank, i in enumerate(order)])
    result = np.empty(len(order))
    result[order] = adjusted
    return result.tolist()
