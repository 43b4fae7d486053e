"""The audit of the learning rate, on loss valleys of known depth and position, with noise."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from bst_dist.study.laws.audit import audit


def corners(observation, best=1.0, curvature=0.03, noise=0.0005, seeds=2, seed=0, depths=(2, 8)):
    """Return observations with ln L = c (ln rate - ln best)^2, for two architectures, two depths and three rates."""
    generator = np.random.default_rng(seed)
    return [
        observation(
            name,
            1e5,
            depth,
            draw,
            5.0,
            rate_factor=f,
            loss=3 * np.exp(curvature * np.log(f / best) ** 2 + 0.02 * draw + generator.normal(0, noise)),
        )
        for name in ("sliding", "bst")
        for depth in depths
        for draw in range(seeds)
        for f in (0.5, 1.0, 2.0)
    ]


def test_audit_passes_if_the_best_rate_is_that_of_the_rule(observation):
    found = audit(corners(observation))
    assert len(found) == 4
    assert {corner.answer for corner in found} == {"passed"}
    assert all(abs(corner.best - 1) < 0.1 for corner in found)


def test_audit_fails_if_the_best_rate_is_elsewhere(observation):
    found = audit(corners(observation, best=2.0, curvature=0.05))
    assert {corner.answer for corner in found} == {"failed"}
    assert all(corner.lost.value > 0.015 for corner in found)


def test_audit_of_a_flat_loss_passes_or_is_undecided_under_noise(observation):
    """The best of three noisy losses is at another rate two times in three, which does not show a wrong rate."""
    small = [audit(corners(observation, curvature=0.0, noise=0.0008, seed=s)) for s in range(40)]
    assert np.mean([all(c.answer == "passed" for c in found) for found in small]) > 0.8
    large = [c.answer for s in range(40) for c in audit(corners(observation, curvature=0.0, noise=0.007, seed=s))]
    assert large.count("failed") <= 0.02 * len(large)
    assert large.count("undecided") > 0.9 * len(large)


def test_audit_with_one_seed_is_undecided(observation):
    assert {corner.answer for corner in audit(corners(observation, seeds=1))} == {"undecided"}


def test_runs_with_only_the_rate_of_the_rule_are_no_audit(observation):
    assert audit([o for o in corners(observation) if o.rate_factor == 1]) == []


def without(observed, factors, status, seeds=(0, 1)):
    """Return the same runs, of which those of bst at these rates have this status and no loss."""
    return [
        replace(o, status=status, loss=float("nan"))
        if o.architecture == "bst" and o.rate_factor in factors and o.seed in seeds
        else o
        for o in observed
    ]


def of_bst(observed):
    """Return the answers and reasons of the corners of bst; those of sliding must have passed or failed."""
    found = audit(observed)
    assert {c.answer for c in found if c.architecture == "sliding"} <= {"passed", "failed"}
    return {(c.answer, c.why) for c in found if c.architecture == "bst"}


def five_rates(observation, best=1.0):
    return [
        replace(o, rate_factor=f, loss=3 * np.exp(0.03 * np.log(f / best) ** 2 + 0.02 * o.seed + rest))
        for o in corners(observation)
        if o.rate_factor == 1
        for f, rest in zip((0.25, 0.5, 1.0, 2.0, 4.0), np.random.default_rng(1).normal(0, 5e-4, 5), strict=True)
    ]


@pytest.mark.parametrize("status", ["failed", "waiting", "running"])
@pytest.mark.parametrize("seeds", [(0, 1), (1,)])
def test_corner_is_undecided_while_a_planned_rate_is_not_done(observation, status, seeds):
    """The best rate is 2.5 times the rule's. Without the runs above it the parabola's best tried rate is the rule's."""
    observed = without(five_rates(observation, best=2.5), (2.0, 4.0), status, seeds)
    assert of_bst(observed) == {("undecided", f"{status} at 2, 4 times the rule's rate")}


def test_done_run_without_a_loss_counts_as_failed(observation):
    observed = without(five_rates(observation), (4.0,), "done")
    assert of_bst(observed) == {("undecided", "failed at 4 times the rule's rate")}


def test_diverged_rate_counts_as_worse_and_is_named(observation):
    told = "diverged at 4 times the rule's rate"
    assert of_bst(without(five_rates(observation), (4.0,), "diverged")) == {("passed", told)}
    assert of_bst(without(five_rates(observation), (4.0,), "diverged", seeds=(1,))) == {("passed", told)}
    mixed = without(without(five_rates(observation), (4.0,), "diverged"), (0.25,), "waiting")
    assert of_bst(mixed) == {("undecided", f"waiting at 0.25 times the rule's rate; {told}")}


def test_rate_that_diverges_with_one_seed_is_no_better_rate(observation):
    """The one run at twice the rule's rate that did not diverge has the least loss."""
    observed = corners(observation, best=4.0, curvature=0.02)
    assert of_bst(observed) == {("failed", "")}
    assert of_bst(without(observed, (2.0,), "diverged", seeds=(0,))) == {
        ("passed", "diverged at 2 times the rule's rate")
    }


def test_rule_whose_own_rate_diverges_has_failed(observation):
    observed = without(five_rates(observation), (1.0, 2.0, 4.0), "diverged")
    assert of_bst(observed) == {("failed", "diverged at 1, 2, 4 times the rule's rate")}
    nothing = without(five_rates(observation), (0.25, 0.5, 1.0, 2.0, 4.0), "diverged")
    assert {answer for answer, _ in of_bst(nothing)} == {"undecided"}
