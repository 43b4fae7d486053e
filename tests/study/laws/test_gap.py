"""Pairs of runs: gaps, gains, sizes, and pairs that are left out."""

from __future__ import annotations

import numpy as np
import pytest

from bst_base.errors import UserError
from bst_dist.study.laws import gap, verdict
from bst_dist.study.laws.regression import regress


def pair(observed, axis="flops", variant="bst"):
    return gap.pair(observed, variant, "sliding", "all", axis)


def test_gap_and_depth_slope_are_exact_without_noise(study):
    found = pair(study(0, mean=0.02, per_depth=0.01, noise=0))
    assert found.gap == pytest.approx(0.02 + 0.01 * np.log(found.depth / 4), abs=1e-12)
    matrix, names = verdict.columns(found)
    fitted = regress(matrix, found.gap, found.stratum)
    assert dict(zip(names, fitted.values[1:], strict=True))["depth"] == pytest.approx(0.01)


def test_gain_is_the_extra_compute_of_the_baseline(observation):
    """With losses that are a power of compute, the gain follows from the gap and the exponent."""
    rows = [observation("sliding", 1e5, 2, 0, m, 5 * m**-0.1) for m in (5, 10, 20, 40)]
    rows += [observation("bst", 1e5, 2, 0, m, 5 * (1.25 * m) ** -0.1) for m in (5, 10, 20)]
    assert np.exp(pair(rows).log_gain) == pytest.approx(1.25)


def test_gap_at_equal_time_includes_the_speed_of_an_architecture(observation):
    rows = [observation("sliding", 1e5, 2, 0, m, 5 * m**-0.1, time_s=m) for m in (5, 10, 20, 40)]
    rows += [observation("bst", 1e5, 2, 0, m, 5 * m**-0.1, time_s=2 * m) for m in (5, 10, 20, 40)]
    found = pair(rows, "time_s")
    assert found.gap == pytest.approx(-0.1 * np.log(2))
    assert len(found) == 3
    assert "beyond the baseline's curve" in found.left_out[0]


def test_unpaired_runs_are_left_out_and_named(study):
    observed = study(0)
    found = pair(observed[1:])
    assert len(found) == len(observed) // 2 - 1
    assert "beyond the baseline's curve in flops" in found.left_out[0]
    with pytest.raises(UserError, match="no pair of mega and sliding"):
        pair(observed, variant="mega")


def test_run_with_nan_loss_is_left_out_and_named(study, observation):
    observed = study(0)
    odd = [
        observation("bst", 1e5, 2, 0, 5.0, float("nan")) if o.name == "bst all 100000 2-s0 5.0" else o for o in observed
    ]
    found = pair(odd)
    assert len(found) == len(observed) // 2 - 1
    assert found.left_out == ("bst all 100000 2-s0 5.0: its loss is nan",)
    assert np.isfinite(found.gap).all()


def test_size_mismatch_is_reported_for_every_pair(study):
    found = pair(study(0, parameters=lambda name, depth, size: size * (1.17 if (name, depth) == ("bst", 8) else 1)))
    assert found.mismatch == pytest.approx(np.where(found.depth == 8, np.log(1.17), 0.0))
