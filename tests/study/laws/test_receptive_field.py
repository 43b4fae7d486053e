"""Equivalence tests of the reach, on pairs whose advantage by position is known."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from bst_dist.study.laws.receptive_field import compare_receptive_fields


def test_advantage_that_grows_along_the_sequence_means_different_reach(study):
    found = compare_receptive_fields(study(1, late=0.02, noise=0.002), "bst", "sliding", "all")
    assert found.answer == "different"
    assert found.difference.low < 0.02 < found.difference.high


def test_equal_reach_needs_a_significant_equivalence_test(study):
    assert compare_receptive_fields(study(1, noise=0.002), "bst", "sliding", "all").answer == "equal"
    noisy = compare_receptive_fields(study(1, noise=0.05), "bst", "sliding", "all")
    assert noisy.difference.p_value > 0.05  # equality is not rejected, but also not shown
    assert noisy.answer == "undecided"


def test_reach_that_differs_by_the_margin_is_rarely_called_equal(study):
    answers = [
        compare_receptive_fields(study(seed, late=0.005, noise=0.006), "bst", "sliding", "all").answer
        for seed in range(60)
    ]
    assert np.mean([answer == "equal" for answer in answers]) < 0.12


def test_reach_is_not_compared_without_losses_by_position(study):
    bare = [o.__class__(**{**vars(o), "by_block": ()}) for o in study(1)]
    assert compare_receptive_fields(bare, "bst", "sliding", "all") is None


def test_reach_is_not_compared_without_labels_late_in_the_sequence(study):
    observed = [replace(o, by_block=(*o.by_block, float("nan"))) for o in study(1)]
    assert compare_receptive_fields(observed, "bst", "sliding", "all") is None
