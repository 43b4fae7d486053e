"""Fit a scaling law: variable projection over a grid of exponents, then a local search ("polish").

With given exponents a law is linear in its other unknowns. So the start of the local search is found without random
restarts: the exponents on a grid, the other unknowns by non-negative least squares. The local search minimises

    (1 / delta) sum Huber_delta(ln L - ln L_hat).

The sum is not averaged and is divided by delta, because a smaller objective makes default tolerances stop the search
early. Its limit for delta -> 0 is least absolute deviation, which a sequence of linear programs then solves exactly.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np
from scipy.optimize import linprog, minimize
from scipy.sparse import csr_array, eye_array, hstack

from bst_base.errors import UserError
from bst_dist.study.laws.law import Centre, FormName, Law, Points, Vector, as_law, slopes, terms, widths

EXPONENTS = np.linspace(0.05, 1.25, 25)
COARSE = np.linspace(0.1, 1.2, 12)
"""Exponents for forms with four terms, whose grid has three exponents."""
BENDS = [(linear, curved) for linear in (-0.2, 0.0, 0.2) for curved in (0.0, 0.1, 0.3)]
FLOOR = 1e-6
"""Lower bound of a term, as a share of the lowest loss. It keeps the term's logarithm finite."""


class FitError(UserError):
    """The points do not determine the law."""


@dataclass(frozen=True)
class Fit:
    """A fitted law, with the unknowns and the centre that a refit on other points of the same sweep starts from."""

    form: FormName
    law: Law
    value: float
    """Value of the objective: the sum of Huber losses of the log residuals, or of their absolute values."""
    delta: float
    theta: Vector
    centre: Centre

    def predict(self, points: Points) -> Vector:
        """Return the predicted loss of each point in nats."""
        return np.exp(log_loss(terms(self.form, points, self.centre), self.theta)[0])


def log_loss(matrices: list[Vector], theta: Vector) -> tuple[Vector, Vector]:
    """Return ln L_hat (n,) and its Jacobian (n, p) with respect to all unknowns."""
    parts = np.split(theta, np.cumsum([matrix.shape[1] for matrix in matrices])[:-1])
    logs = np.stack([matrix @ part for matrix, part in zip(matrices, parts, strict=True)])
    largest = logs.max(axis=0)
    shares = np.exp(logs - largest)
    total = shares.sum(axis=0)
    shares /= total  # share of each term in the loss
    return largest + np.log(total), np.hstack(
        [share[:, None] * matrix for share, matrix in zip(shares, matrices, strict=True)]
    )


def objective(residuals: Vector, delta: float) -> float:
    """Return the sum of the Huber losses; with delta 0, the sum of the absolute values."""
    size = np.abs(residuals)
    if not delta:
        return float(size.sum())
    return float(np.where(size <= delta, 0.5 * size**2, delta * (size - 0.5 * delta)).sum())


def fit(points: Points, form: FormName = "chinchilla", delta: float = 1e-3, start: Fit | None = None) -> Fit:
    """Fit `form` to `points`; `delta` is Huber's threshold on log losses, 0 for least absolute deviation.

    With `start`, a fit to points of the same sweep, the search keeps its centre and begins at its unknowns. Resampling
    uses this. Raises FitError if the points do not determine the form.
    """
    _require_enough(points, form)
    centre = start.centre if start else Centre.of(points)
    target, matrices = np.log(points.loss), terms(form, points, centre)
    begin = start.theta if start else _best_start(points, form, centre, delta)
    theta = polish(matrices, target, begin, delta, bounds_of(form, target), rounds=1 if start else 2)
    value = objective(target - log_loss(matrices, theta)[0], delta)
    return Fit(form, as_law(form, theta, centre), value, delta, theta, centre)


def polish(
    matrices: list[Vector], target: Vector, theta: Vector, delta: float, bounds: Vector, rounds: int = 2
) -> Vector:
    """Return the local optimum near `theta` within `bounds` (p, 2). Each round of L-BFGS begins with a new Hessian."""
    width = delta or 1e-5  # for least absolute deviation: close enough for the linear programs to continue

    def scaled(unknowns: Vector) -> tuple[float, Vector]:
        predicted, jacobian = log_loss(matrices, unknowns)
        residuals = target - predicted
        return objective(residuals, width) / width, -jacobian.T @ np.clip(residuals / width, -1, 1)

    theta = np.clip(theta, bounds[:, 0], bounds[:, 1])
    fine = rounds > 1  # a resample (1 round) begins near its optimum, and its scatter is larger than these tolerances
    options = {
        "ftol": 1e-14 if fine else 1e-9,
        "gtol": 1e-9,
        "maxcor": 30,
        "maxiter": 2000 if fine else 200,
        "maxfun": 4000,
    }
    for _ in range(rounds):
        theta = minimize(scaled, theta, jac=True, method="L-BFGS-B", bounds=bounds, options=options).x
    return theta if delta else _linear_programs(matrices, target, theta, bounds)


def _linear_programs(matrices: list[Vector], target: Vector, theta: Vector, bounds: Vector) -> Vector:
    """Minimise the sum of absolute residuals: linear programs min sum |r - J step| in a shrinking box around theta.

    Each residual is written as u - v with u, v >= 0.
    """
    radius = 0.05
    predicted, jacobian = log_loss(matrices, theta)
    best = float(np.abs(target - predicted).sum())
    for _ in range(60):
        n, p = jacobian.shape
        box = np.clip(bounds - theta[:, None], -radius, radius)
        program = linprog(
            np.concatenate((np.zeros(p), np.ones(2 * n))),
            A_eq=hstack((csr_array(jacobian), eye_array(n), -eye_array(n)), format="csr"),
            b_eq=target - predicted,
            bounds=np.vstack((box, np.tile((0, np.inf), (2 * n, 1)))),
            method="highs",
        )
        trial = theta + program.x[:p]
        after, after_jacobian = log_loss(matrices, trial)
        value = float(np.abs(target - after).sum())
        if value < best:
            gained, theta, predicted, jacobian, best = best - value, trial, after, after_jacobian, value
            if gained < 1e-13 * best:
                break
        else:
            radius /= 8
            if radius < 1e-9:
                break
    return theta


def _best_start(points: Points, form: FormName, centre: Centre, delta: float) -> Vector:
    """Return the best start by the objective, among the twenty grid points with the least relative squared error."""
    weight = 1 / points.loss
    columns = slopes(form, points, centre)
    grids = [_exponents(matrix.shape[1], len(columns)) for matrix in columns]  # a list of (g, p)
    bases = [weight[None], *(np.exp(g @ matrix.T) * weight for g, matrix in zip(grids, columns, strict=True))]
    places = np.stack(np.meshgrid(*(np.arange(len(b)) for b in bases), indexing="ij"), axis=-1).reshape(-1, len(bases))
    scales, misfit = _nonnegative(bases, places)
    matrices, target = terms(form, points, centre), np.log(points.loss)
    floor = np.log(points.loss.min() * 1e-3)
    starts = []
    for index in np.argsort(misfit)[:20]:
        e, *rest = np.maximum(np.log(np.maximum(scales[index], 1e-300)), floor)
        own = [np.concatenate(([a], g[i])) for a, g, i in zip(rest, grids, places[index][1:], strict=True)]
        starts.append(np.concatenate(([e], *own)))
    return min(starts, key=lambda theta: objective(target - log_loss(matrices, theta)[0], delta))


def _exponents(unknowns: int, number: int) -> Vector:
    """Return the grid of one term (g, unknowns): all exponents, combined with all BENDS if the term has a bend."""
    bends = BENDS if unknowns == 3 else [()]
    return np.array([(exponent, *bend) for exponent in (EXPONENTS if number < 3 else COARSE) for bend in bends])


def _nonnegative(bases: list[Vector], places: Vector) -> tuple[Vector, Vector]:
    """Solve the non-negative least squares of 1 on one row of each basis, for all combinations at once.

    There are so few columns that all active sets are tried. `bases` are (g_k, n); `places` (m, k) holds the row indices
    of each combination. Return the coefficients (m, k) and the squared errors (m,).
    """
    m, k = places.shape
    gram, moment = np.empty((m, k, k)), np.empty((m, k))
    for i, j in itertools.product(range(k), repeat=2):
        gram[:, i, j] = (bases[i] @ bases[j].T)[places[:, i], places[:, j]]
    for i in range(k):
        moment[:, i] = bases[i].sum(1)[places[:, i]]
    best, scales = np.full(m, np.inf), np.zeros((m, k))
    for active in itertools.chain.from_iterable(itertools.combinations(range(k), size) for size in range(1, k + 1)):
        picked = list(active)
        block = gram[:, picked][:, :, picked] + 1e-12 * np.eye(len(picked))
        found = np.linalg.solve(block, moment[:, picked, None])[..., 0]
        misfit = bases[0].shape[1] - (found * moment[:, picked]).sum(-1)
        better = (found >= 0).all(-1) & (misfit < best)
        best[better] = misfit[better]
        scales[better] = 0.0
        scales[better[:, None] & np.isin(np.arange(k), picked)] = found[better].ravel()
    return scales, best


def bounds_of(form: FormName, target: Vector) -> Vector:
    """Return (p, 2) bounds of the unknowns: each term at least FLOOR, exponents positive, and kappa not negative."""
    low, high = target.min() + np.log(FLOOR), target.max() + 5
    every = [(low, target.max())]
    for width in widths(form)[1:]:
        every += [(low, high), (1e-3, 3.0), *([(-3.0, 3.0), (0.0, 3.0)] if width == 4 else [])]
    return np.array(every)


def _require_enough(points: Points, form: FormName) -> None:
    unknowns = sum(widths(form))
    if len(points) < unknowns:
        raise FitError(f"{len(points)} points are too few for the {unknowns} unknowns of the {form} form")
    needed = {
        "chinchilla": ("tokens", "parameters"),
        "aspect": ("tokens", "parameters", "depth"),
        "additive": ("tokens", "width", "depth"),
    }[form]
    for name in needed:
        if np.ptp(np.log(getattr(points, name))) < 0.05:
            raise FitError(f"the {form} form needs points of different {name}")
    if not np.isfinite(np.log(points.loss)).all():
        raise FitError("a loss is not a positive number")
