"""The audit of the learning rate, on loss valleys of known depth and position, with noise."""

from __future__ import annotations

import numpy as np

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
