"""Intervals, forms and joint fits over repeated synthetic sweeps of known laws."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from bst_dist.study.laws import isoflop, uncertainty
from bst_dist.study.laws.fit import Fit, fit
from bst_dist.study.laws.joint import e_difference, fit_shared
from bst_dist.study.laws.law import Centre, Law, Points
from bst_dist.study.statistics import equality

PUBLISHED = Law(E=1.82, A=480.0, alpha=0.347, B=2100.0, beta=0.366)
BENT = Law(E=1.8, A=400.0, alpha=0.34, B=1200.0, beta=0.36, kappa=0.06, log_aspect=np.log(40.0))


def joined(*parts):
    return Points(**{name: np.concatenate([getattr(p, name) for p in parts]) for name in Points.__dataclass_fields__})


def test_bootstrap_intervals_have_their_nominal_coverage(sweep):
    hits, tried = {"alpha": 0, "beta": 0}, 12
    for seed in range(tried):
        points = sweep(PUBLISHED, noise=0.004, seed=seed)
        fitted = fit(points)
        found = uncertainty.intervals(fitted, uncertainty.bootstrap(fitted, points, draws=30, seed=seed))
        for name in hits:
            hits[name] += found[name].low <= getattr(PUBLISHED, name) <= found[name].high
    assert all(0.75 * tried <= hit for hit in hits.values()), hits


def test_bootstrap_over_points_underestimates_the_error(sweep):
    points = sweep(PUBLISHED, noise=0.01, seed=2)
    fitted = fit(points)
    by_run = uncertainty.intervals(fitted, uncertainty.bootstrap(fitted, points, 50))
    every = Points(**{**points.__dict__, "run": np.arange(len(points))})
    by_point = uncertainty.intervals(fitted, uncertainty.bootstrap(fitted, every, 50))
    assert by_run["alpha"].standard_error > 1.2 * by_point["alpha"].standard_error


def test_known_depth_term_is_recovered_and_improves_held_out_predictions(sweep):
    points = sweep(BENT, noise=0.002, seed=1)
    bent, plain = fit(points, "aspect"), fit(points)
    found = uncertainty.intervals(bent, uncertainty.bootstrap(bent, points, 80))
    assert found["kappa"].low <= BENT.kappa <= found["kappa"].high
    assert found["kappa"].low > 0
    errors = [np.mean(list(uncertainty.leave_one_shape_out(points, fitted).values())) for fitted in (bent, plain)]
    assert errors[0] < errors[1]


def test_wide_sweep_identifies_the_law_and_small_sweep_does_not(sweep):
    wide = sweep(PUBLISHED, noise=0.001)
    fitted = fit(wide)
    assert uncertainty.unidentified(uncertainty.intervals(fitted, uncertainty.bootstrap(fitted, wide, 40)), wide) == []
    small = sweep(Law(1.0, 30.0, 0.3, 30.0, 0.3), noise=0.01, sizes=(1e5, 2e5, 3e5))
    fitted = fit(small)
    reasons = uncertainty.unidentified(uncertainty.intervals(fitted, uncertainty.bootstrap(fitted, small, 40)), small)
    assert any("parameters take 3 values over a factor of 3.0" in reason for reason in reasons)


def test_largest_size_is_predicted_from_smaller_sizes(sweep):
    points = sweep(PUBLISHED, noise=0.001)
    assert uncertainty.hold_out_largest(points, fit(points)) < 0.02


def test_local_slopes_equal_those_of_a_power_law(sweep):
    law = Law(E=1e-9, A=40.0, alpha=0.2, B=1e-9, beta=0.2)
    slope = uncertainty.local_slopes(sweep(law, noise=0.001))
    assert slope["parameters"].low <= -0.2 <= slope["parameters"].high
    assert slope["tokens"].value == pytest.approx(0.0, abs=2e-3)


def test_shared_e_is_recovered_and_different_e_is_detected(sweep):
    other = Law(1.82, 300.0, 0.36, 1900.0, 0.36)
    same = joined(sweep(PUBLISHED, 0.001, 1, "sliding"), sweep(other, 0.001, 2, "bst"))
    found = fit_shared(same)
    assert found.laws["bst"].E == found.laws["sliding"].E == pytest.approx(1.82, abs=0.04)
    assert found.laws["bst"].alpha == pytest.approx(0.36, abs=0.03)
    assert found.value >= found.separate * (1 - 1e-6)
    apart = joined(sweep(PUBLISHED, 0.001, 1, "sliding"), sweep(Law(2.2, 300, 0.36, 1900, 0.36), 0.001, 2, "bst"))
    assert equality(e_difference(apart, "sliding", "bst", 30), 0.01) == "different"
    difference = e_difference(same, "sliding", "bst", 30)
    assert difference.low <= 0 <= difference.high
    noisy = joined(sweep(PUBLISHED, 0.02, 1, "sliding"), sweep(other, 0.02, 2, "bst"))
    assert equality(e_difference(noisy, "sliding", "bst", 30), 0.01) == "undecided"  # not rejected does not mean equal


def test_equality_of_e_does_not_depend_on_other_architectures(sweep):
    """Runs of a third architecture say nothing about the scatter of two, so they add no degrees of freedom."""

    def of(law, seed, group):
        made = sweep(law, 0.002, seed, group)
        return replace(made, run=np.char.add(f"{group} ", made.run))

    two = joined(of(PUBLISHED, 1, "sliding"), of(PUBLISHED, 2, "bst"))
    three = joined(two, of(Law(1.5, 300.0, 0.36, 1900.0, 0.36), 3, "mega"))
    assert e_difference(three, "sliding", "bst", 10) == e_difference(two, "sliding", "bst", 10)
    assert e_difference(three, "sliding", "bst", 10).degrees == 2 * 24 - 2 * 5  # runs - unknowns


def test_isoflop_optima_agree_with_the_law():
    law = Law(E=1.8, A=400.0, alpha=0.34, B=410.0, beta=0.28)
    generator = np.random.default_rng(0)
    n, c = (x.ravel() for x in np.meshgrid(np.geomspace(1e7, 1e10, 7), np.geomspace(1e18, 1e20, 5)))
    loss = law.loss(n, c / 6 / n) * np.exp(generator.normal(0, 0.001, n.shape))
    label = np.full(n.shape, "a")
    found = isoflop.profiles(Points(loss, n, c / 6 / n, np.ones_like(n), np.ones_like(n), np.arange(len(n)), label))
    assert len(found) == 5
    assert isoflop.exponent(found) == pytest.approx(law.beta / (law.alpha + law.beta), abs=0.06)
    for profile in found:
        assert profile.optimum == pytest.approx(law.optimum(profile.flops)[0], rel=0.4)


def test_shapes_of_two_sizes_are_no_isoflop_profile():
    """The three shapes of a size differ by 4 % of N, so they are one point of a profile and not three."""
    law = Law(E=1.0, A=30.0, alpha=0.25, B=30.0, beta=0.25)

    def exponent(sizes):
        each = np.outer(sizes, (0.96, 1.0, 1.04)).ravel()
        n, c = (x.ravel() for x in np.meshgrid(each, np.geomspace(3e12, 8e13, 9)))
        d = c / 6 / n
        one = np.ones_like(n)
        return isoflop.exponent(isoflop.profiles(Points(law.loss(n, d), n, d, one, one, np.arange(len(n)), one)))

    assert exponent((1e6, 4e6)) is None
    assert exponent((5e5, 1e6, 2e6, 4e6)) == pytest.approx(0.5, abs=0.05)


@pytest.mark.parametrize("change", [{}, {"kappa": 0.0, "tilt": -0.2}, {"kappa": 0.01, "tilt": 0.3}])
def test_optimum_of_an_aspect_law_is_that_of_the_nearest_shape_tried(change):
    law = Law(**{**BENT.__dict__, "kappa": 0.05, "log_aspect": np.log(2.0), **change})
    low, high = np.log(30.0), np.log(200.0)
    n, d = law.optimum(1e18, aspects=(low, high))
    sizes, aspects = np.geomspace(n / 30, n * 30, 4001), np.linspace(low, high, 201)
    losses = law.loss(sizes[:, None], 1e18 / 6 / sizes[:, None], np.exp(aspects)[None], 1.0)
    size, aspect = np.unravel_index(np.argmin(losses), losses.shape)
    assert law.best_aspect(low, high) == pytest.approx(aspects[aspect], abs=1e-9)
    assert n == pytest.approx(sizes[size], rel=0.005)
    assert 6 * n * d == pytest.approx(1e18)


def test_best_shape_of_laws_without_a_valley_is_not_determined():
    """A law without a valley has a placeholder as its best ratio, which is no draw of it."""
    laws = [replace(BENT, log_aspect=4.0 + 0.01 * i, kappa=0.0 if i < 6 else 0.06) for i in range(100)]
    fitted = Fit("aspect", laws[50], 0.0, 1e-3, np.zeros(7), Centre(1e8, 1e9, 64.0, 4.0))
    assert uncertainty.intervals(fitted, laws)["log_aspect"].low == -np.inf
    found = uncertainty.intervals(fitted, laws[2:])["log_aspect"]  # 4 of 98 have none
    assert found.low == pytest.approx(np.quantile(np.arange(6, 100), 0.025) / 100 + 4.0)


def test_lack_of_fit_test_rejects_only_the_wrong_form(sweep):
    points = sweep(BENT, noise=0.002, seed=1)
    assert uncertainty.lack_of_fit(points, fit(points)).p_value < 1e-3
    assert uncertainty.lack_of_fit(points, fit(points, "aspect")).p_value > 0.05


def test_monotonic_loss_over_aspect_gives_no_best_shape(sweep):
    """The loss only falls with the aspect, and flattens. An unbounded parabola would report the worst shape as best."""
    points = sweep(PUBLISHED)
    x = np.log(points.width / points.depth)
    falling = Points(
        **{**points.__dict__, "loss": points.loss * np.exp(-0.03 * (x - x.min()) - 0.004 * (x - x.min()) ** 2)}
    )
    law = fit(falling, "aspect").law
    assert law.kappa >= 0
    assert not (law.has_valley and x.min() <= law.log_aspect <= x.max())


def test_best_shape_minimises_the_loss():
    additive = Law(E=1.5, A=60.0, alpha=0.6, B=1500.0, beta=0.35, G=3.0, gamma=0.9)
    for law in (BENT, additive):
        width, depth = law.shape_of(1e8, 12.0)
        tried = np.geomspace(depth / 8, depth * 8, 20001)
        losses = law.loss(1e8, 1e9, np.sqrt(1e8 / 12 / tried), tried)
        assert depth == pytest.approx(tried[np.argmin(losses)], rel=1e-3)
        assert 12 * width**2 * depth == pytest.approx(1e8)
        n, d = law.optimum(1e21)
        sizes = np.geomspace(n / 30, n * 30, 20001)
        shapes = law.shape_of(sizes, 12.0)
        assert n == pytest.approx(sizes[np.argmin(law.loss(sizes, 1e21 / 6 / sizes, *shapes))], rel=0.01)
        assert 6 * n * d == pytest.approx(1e21)


def test_interval_equals_spread_and_quantiles_of_its_draws():
    laws = [Law(1.8, 400.0, alpha, 410.0, 0.3) for alpha in (0.30, 0.31, 0.33, 0.36, 0.40)]
    found = uncertainty.interval(lambda law: law.alpha, laws[2], laws)
    assert found.value == 0.33
    assert found.standard_error == pytest.approx((sum((a.alpha - 0.34) ** 2 for a in laws) / 4) ** 0.5)
    assert (found.low, found.high) == (pytest.approx(0.301), pytest.approx(0.396))  # 2.5 % of four gaps from each end
    lost = uncertainty.interval(lambda law: law.alpha if law.alpha > 0.34 else float("nan"), laws[2], laws)
    assert (lost.low, lost.high) == (-np.inf, np.inf)  # most draws give NaN


@pytest.mark.parametrize(
    ("name", "value", "half", "said"),
    [
        ("alpha", 0.3, 0.14, None),
        ("alpha", 0.3, 0.16, "alpha = 0.300 ± 0.160"),
        ("E", 1.5, 0.19, None),
        ("E", 1.5, 0.21, "E = 1.500 ± 0.210"),
        ("E", 0.0021, 0.0, None),
        ("E", 0.0019, 0.0, "E is at its bound of zero"),
    ],
)
def test_parameters_beyond_fixed_limits_are_not_identified(name, value, half, said):
    n = d = np.array([1e6, 3e6, 9e6])
    points = Points(np.array([2.0, 2.5, 3.0]), n, d, n, n, np.arange(3), np.full(3, "a"))
    found = {each: uncertainty.Interval(at, 0.0, at, at) for each, at in (("alpha", 0.3), ("beta", 0.3), ("E", 1.5))}
    found[name] = uncertainty.Interval(value, 0.0, value - half, value + half)
    reasons = uncertainty.unidentified(found, points)
    assert reasons == [] if said is None else [r[: len(said)] for r in reasons] == [said]


def test_lack_of_fit_equals_the_f_test_over_shapes(sweep):
    points = sweep(PUBLISHED, noise=0.01, seed=3)
    fitted = fit(points)
    residuals: dict = {}
    for loss, expected, run, shape in zip(points.loss, fitted.predict(points), points.run, points.shape, strict=True):
        residuals.setdefault(shape, {}).setdefault(run, []).append(np.log(loss / expected))
    shapes = [[float(np.mean(values)) for values in runs.values()] for runs in residuals.values()]
    runs = sum(map(len, shapes))
    assert runs > len(shapes) > 3
    unknowns = 3  # E, A, alpha; the effect of tokens is estimated within runs
    between = sum(len(means) * np.mean(means) ** 2 for means in shapes) / (len(shapes) - unknowns)
    within = sum((mean - np.mean(means)) ** 2 for means in shapes for mean in means) / (runs - len(shapes))
    assert uncertainty.lack_of_fit(points, fitted).statistic == pytest.approx(between / within)
