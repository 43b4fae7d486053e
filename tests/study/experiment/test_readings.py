"""The table's statistics compared with explicit computation."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from bst_dist.study.experiment.readings import ByDocument, Reading, apart, difference, level
from bst_dist.study.statistics import Estimate


def test_standard_error_over_seeds_is_that_of_a_mean():
    found = level({0: Reading(2.0), 1: Reading(2.2), 2: Reading(2.7)})
    assert found.value == pytest.approx(2.3)
    # Deviations -0.3, -0.1, 0.4: variance 0.26 / 2 = 0.13, divided by three seeds.
    assert found.standard_error == pytest.approx(math.sqrt(0.13 / 3))
    assert (found.over, found.observations) == ("seeds", 3)


def test_a_difference_is_paired_by_seed():
    """Effects of the seed cancel: the arms vary by tenths, their differences by thousandths."""
    arm = {0: Reading(2.001), 1: Reading(2.202), 2: Reading(2.703)}
    reference = {2: Reading(2.7), 0: Reading(2.0), 1: Reading(2.2)}
    found = difference(arm, reference)
    assert found.value == pytest.approx(0.002)
    assert found.standard_error == pytest.approx(0.001 / math.sqrt(3))
    ours = stats.ttest_rel([2.001, 2.202, 2.703], [2.0, 2.2, 2.7])
    assert found.half_width == pytest.approx(0.002 - ours.confidence_interval(0.95).low)
    assert apart(found) == (ours.pvalue < 0.05)


def test_only_seeds_of_both_arms_are_paired():
    arm = {0: Reading(2.0), 1: Reading(3.0), 2: Reading(9.0)}
    found = difference(arm, {0: Reading(1.0), 1: Reading(2.5)})
    assert (found.value, found.observations) == (pytest.approx(0.75), 2)
    assert difference(arm, {7: Reading(1.0)}) is None


def test_standard_error_with_one_seed_is_over_documents():
    bits, sizes = np.array([8.0, 30.0, 21.0]), np.array([4, 10, 6])
    found = level({5: Reading(59 / 20, ByDocument(bits, sizes))})
    residuals = bits - 59 / 20 * sizes
    assert found.value == pytest.approx(59 / 20)
    assert found.standard_error == pytest.approx(math.sqrt(3 / 2 * (residuals**2).sum()) / 20)
    assert (found.over, found.observations) == ("documents", 3)


def test_a_difference_is_paired_by_document():
    """The same documents are hard for both, so the error is that of the per-document differences."""
    sizes = np.array([4, 10, 6])
    hard = np.array([8.0, 30.0, 21.0])
    arm = {0: Reading(0.0, ByDocument(hard + 0.1 * sizes, sizes))}
    reference = {0: Reading(0.0, ByDocument(hard, sizes))}
    found = difference(arm, reference)
    assert found.value == pytest.approx(0.1)
    assert found.standard_error == pytest.approx(0, abs=1e-12)
    assert level(arm).standard_error > 0.1
    assert not apart(found)  # with one seed each, the models differ, but the arms may not


def test_different_documents_are_not_paired():
    arm = {0: Reading(2.5, ByDocument(np.array([10.0, 10.0]), np.array([4, 4])))}
    reference = {0: Reading(2.0, ByDocument(np.array([10.0]), np.array([5])))}
    found = difference(arm, reference)
    assert (found.value, found.standard_error, found.over) == (pytest.approx(0.5), None, None)


def test_single_run_has_no_standard_error_and_no_significance():
    found = level({0: Reading(3.0)})
    assert found == Estimate(3.0, None)
    assert found.half_width is None
    assert not apart(found)
