"""Robust errors, the permutation test and Holm's correction, compared with their definitions."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from bst_dist.study.laws import regression


def test_errors_of_single_points_are_hc3():
    generator = np.random.default_rng(1)
    columns = np.stack((np.ones(30), generator.normal(size=30)), axis=1)
    target = columns @ (1.0, 2.0) + generator.normal(size=30) * (1 + columns[:, 1] ** 2)
    inverse = np.linalg.inv(columns.T @ columns)
    residuals = target - columns @ inverse @ columns.T @ target
    leverage = np.einsum("ij,jk,ik->i", columns, inverse, columns)
    expected = inverse @ (columns.T * (residuals / (1 - leverage)) ** 2) @ columns @ inverse
    assert regression.regress(columns, target, np.arange(30)).covariance == pytest.approx(expected)


def test_clustered_errors_equal_the_jackknife_over_clusters():
    """CR3 equals the jackknife over clusters, centred at the full estimate."""
    generator = np.random.default_rng(2)
    clusters = np.repeat(np.arange(8), 3)
    columns = np.stack((np.ones(24), generator.normal(size=24)), axis=1)
    target = generator.normal(size=24) + generator.normal(size=8)[clusters]
    full = np.linalg.lstsq(columns, target, rcond=None)[0]
    without = [np.linalg.lstsq(columns[clusters != g], target[clusters != g], rcond=None)[0] for g in range(8)]
    expected = 7 / 8 * sum(np.outer(b - full, b - full) for b in without)
    assert regression.regress(columns, target, clusters).covariance == pytest.approx(expected)


def test_permutation_test_equals_enumeration_of_all_orders():
    """Freedman and Lane's test, written out: every order of six points is refitted."""
    generator = np.random.default_rng(3)
    columns = np.stack((np.ones(6), generator.normal(size=6)), axis=1)
    target = generator.normal(size=6) + 0.8 * columns[:, 1]

    def statistic(values):
        found = regression.regress(columns, values, np.arange(6)).estimate(1)
        return abs(found.value) / found.standard_error

    centred = target - target.mean()
    exact = np.mean(
        [
            statistic(target.mean() + centred[list(o)]) >= statistic(target) * (1 - 1e-9)
            for o in itertools.permutations(range(6))
        ]
    )
    drawn = regression.CoefficientTest(columns, np.arange(6), 1, draws=4000).permutation_p(target[None])[0]
    assert drawn == pytest.approx(exact, abs=0.03)


def test_batched_permutation_tests_equal_single_tests():
    generator = np.random.default_rng(4)
    clusters = np.repeat(np.arange(8), 2)
    columns = np.stack((np.ones(16), np.repeat([0.0, 1.0], 8), generator.normal(size=16)), axis=1)
    test = regression.CoefficientTest(columns, clusters, 1, draws=99)
    targets = generator.normal(size=(5, 16))
    assert test.permutation_p(targets).tolist() == [test.permutation_p(one[None])[0] for one in targets]


def test_holm_correction_equals_the_textbook_example():
    assert regression.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    both = np.array([[0.01, 0.04, 0.03, 0.005], [0.9, 0.01, 0.01, 0.01]]).T
    assert pytest.approx(np.array([[0.03, 0.06, 0.06, 0.02], [0.9, 0.04, 0.04, 0.04]])) == regression.holm(both).T


def lone_cluster():
    """Return columns, clusters and a target: six clusters of three points at one depth, and one at another."""
    generator = np.random.default_rng(5)
    clusters = np.repeat(np.arange(7), 3)
    columns = np.stack((np.ones(21), clusters == 6, generator.normal(size=21)), axis=1)
    return columns, clusters, generator.normal(size=21) + generator.normal(size=7)[clusters]


def test_coefficient_that_rests_on_one_cluster_has_no_standard_error():
    """Once, the errors had nothing of this cluster's noise: intervals of 95 % covered the truth in 55 % of cases."""
    columns, clusters, target = lone_cluster()
    found = regression.regress(columns, target, clusters)
    fitted = np.linalg.lstsq(columns, target, rcond=None)[0]
    assert found.estimate(1) == (pytest.approx(fitted[1]), None, np.inf, None)
    assert found.estimate([1, 1, 0]).standard_error is None  # the mean at the other depth
    assert regression.CoefficientTest(columns, clusters, 1, draws=9).rests_on == "6"


def test_other_coefficients_keep_the_error_of_the_jackknife():
    """Without the lone cluster they are still determined; what is not cancels, in the solution of least norm too."""
    columns, clusters, target = lone_cluster()
    found = regression.regress(columns, target, clusters)
    left = [np.linalg.pinv(columns[clusters != g]) @ target[clusters != g] for g in range(7)]
    for weights in ([0, 0, 1], [1, 0, 0]):  # the slope, and the mean at the depth of six clusters
        fitted = np.linalg.lstsq(columns, target, rcond=None)[0] @ weights
        expected = np.sqrt(6 / 7 * sum((one @ weights - fitted) ** 2 for one in left))
        assert found.estimate(weights).standard_error == pytest.approx(expected)
    assert regression.CoefficientTest(columns, clusters, 2, draws=9).rests_on is None
