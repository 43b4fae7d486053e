"""The fit compared with published results, and with synthetic sweeps."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest
from scipy.optimize import check_grad

from bst_dist.study.laws.fit import FitError, fit, log_loss, objective
from bst_dist.study.laws.law import Centre, Law, Points, terms

PUBLISHED = Law(E=1.82, A=480.0, alpha=0.347, B=2100.0, beta=0.366)
BENT = Law(E=1.8, A=400.0, alpha=0.34, B=1200.0, beta=0.36, kappa=0.06, log_aspect=np.log(40.0))
ADDITIVE = Law(E=1.5, A=60.0, alpha=0.6, B=1500.0, beta=0.35, G=3.0, gamma=0.9)


def published():
    """Return 245 points of figure 4 of Hoffmann et al. 2022 (arXiv 2203.15556), read off by Besiroglu et al. 2024
    (arXiv 2404.10102). The file is from the Gemstones repository; its licence is in the same folder."""
    with Path(__file__).with_name("chinchilla_fig4_points.csv").open() as file:
        rows = list(csv.DictReader(file))
    loss, n, flops = (np.array([float(row[key]) for row in rows]) for key in ("loss", "Model Size", "Training FLOP"))
    one, number = np.ones(len(rows)), np.arange(len(rows))
    return Points(loss, n, flops / (6 * n), one, one, number, np.full(len(rows), "chinchilla"))


@pytest.mark.parametrize(
    ("left_out", "delta", "value", "a", "b", "e", "alpha", "beta"),
    [
        (5, 1e-3, 0.0010182740178, 477.83, 2143.42, 1.81722, 0.34731, 0.36717),
        (5, 0.0, 1.1294947, 482.01, 2085.43, 1.81686, 0.34781, 0.36585),
        (0, 1e-3, 0.0018260105, 495.73, 12845.6, 1.89134, 0.34931, 0.45305),
    ],
)
def test_fit_of_published_points_gives_the_known_optimum(left_out, delta, value, a, b, e, alpha, beta):
    points = published()
    found = fit(points.take(np.sort(np.argsort(points.loss)[: len(points) - left_out])), delta=delta)
    assert found.value == pytest.approx(value, rel=3e-8 if delta else 5e-8)  # up to the last published digit
    assert pytest.approx(a, rel=5e-4) == found.law.A
    assert pytest.approx(b, rel=1e-3) == found.law.B
    assert pytest.approx(e, abs=1e-4) == found.law.E
    assert (found.law.alpha, found.law.beta) == (pytest.approx(alpha, abs=1e-4), pytest.approx(beta, abs=1e-4))


@pytest.mark.parametrize("delta", [1e-3, 0.0])
@pytest.mark.parametrize(("form", "law"), [("chinchilla", PUBLISHED), ("aspect", BENT), ("additive", ADDITIVE)])
def test_fit_of_noiseless_losses_recovers_the_law(form, law, delta, sweep):
    found = fit(sweep(law), form, delta)
    assert found.value < 1e-6
    for name in ("E", "A", "alpha", "B", "beta", "kappa", "log_aspect", "G", "gamma"):
        if getattr(law, name) is not None:
            assert getattr(found.law, name) == pytest.approx(getattr(law, name), rel=5e-3, abs=2e-3), name


def test_least_absolute_deviation_ignores_outliers(sweep):
    points = sweep(PUBLISHED)
    points.loss[::17] *= 1.3
    assert fit(points, delta=0.0).law.alpha == pytest.approx(PUBLISHED.alpha, abs=1e-3)


def test_fit_is_at_least_as_good_as_random_starts(sweep):
    """The reference uses many random starts, refined by another optimiser."""
    from scipy.optimize import minimize

    points = sweep(PUBLISHED, noise=0.01, seed=4)
    centre, target = Centre.of(points), np.log(points.loss)
    matrices = terms("chinchilla", points, centre)
    generator = np.random.default_rng(0)

    def value(theta):
        return objective(target - log_loss(matrices, theta)[0], 1e-3) * 1e3

    starts = (generator.uniform((-1, -3, 0.1, -3, 0.1), (1, 1, 1, 1, 1)) for _ in range(10))
    options = {"maxiter": 4000, "maxfev": 4000, "xatol": 1e-10, "fatol": 1e-12, "adaptive": True}
    best = min(minimize(value, start, method="Nelder-Mead", options=options).fun for start in starts)
    assert fit(points).value * 1e3 <= best * (1 + 1e-6)


@pytest.mark.parametrize("form", ["chinchilla", "aspect", "additive"])
def test_jacobian_is_the_derivative(form, sweep):
    points = sweep(BENT, noise=0.01)
    matrices = terms(form, points, Centre.of(points))
    unknowns = sum(matrix.shape[1] for matrix in matrices)
    for seed in range(3):
        theta = np.random.default_rng(seed).normal(0, 0.3, unknowns)
        error = check_grad(lambda t: log_loss(matrices, t)[0].sum(), lambda t: log_loss(matrices, t)[1].sum(0), theta)
        assert error < 1e-4


def test_optimum_of_a_law_minimises_the_loss_at_fixed_flops():
    flops = 1e21
    sizes = np.geomspace(1e8, 1e11, 20001)
    least = sizes[np.argmin(PUBLISHED.loss(sizes, flops / 6 / sizes))]
    n, d = PUBLISHED.optimum(flops)
    assert n == pytest.approx(least, rel=1e-3)
    assert 6 * n * d == pytest.approx(flops)


def test_too_few_points_are_refused(sweep):
    with pytest.raises(FitError, match="4 points are too few for the 5 unknowns of the chinchilla form"):
        fit(sweep(PUBLISHED).take(np.arange(4)))
