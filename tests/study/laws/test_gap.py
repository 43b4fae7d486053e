"""Pairs of runs: gaps, gains, sizes, and pairs that are left out."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from bst_base.errors import UserError
from bst_base.terminal import Sheet
from bst_dist.study.laws import gap, verdict
from bst_dist.study.laws.advantage import compare
from bst_dist.study.laws.regression import regress
from bst_dist.study.report import advantage


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


def test_gain_is_not_read_beyond_the_ends_of_the_baseline_curve(observation):
    """A curve that flattens would give any gain: a loss below its last point may be reached at no compute."""
    rows = [observation("sliding", 1e5, 2, 0, m, loss) for m, loss in ((5, 5.0), (10, 4.0), (20, 3.999))]
    rows += [observation("bst", 1e5, 2, 0, m, loss) for m, loss in ((5, 5.1), (10, 4.0), (20, 3.99))]
    found = pair(rows)
    assert found.gap == pytest.approx(np.log([5.0 / 5.1, 1.0, 3.999 / 3.99]))
    assert np.isnan(found.log_gain).tolist() == [True, False, True]
    assert verdict.mean_gain(found).value == pytest.approx(0.0, abs=1e-12)


def test_report_counts_the_gains_that_are_left_out(study):
    """The variant is ahead, so its longest runs are below the end of every baseline's curve."""
    found = compare(study(0, mean=0.02, noise=0), "sliding", "all")
    rows = [row for block in advantage.tables(found) if isinstance(block, Sheet) for row in block.rows]
    assert rows[0][4].endswith("; without 24 of 72, which the baseline's curve does not reach")


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


def test_baseline_with_two_runs_of_equal_compute_has_no_pair(study):
    """Between two such points a loss cannot be interpolated: the slope is 0 / 0."""
    observed = study(0)
    twice = next(o for o in observed if o.architecture == "sliding")
    found = pair([*observed, twice])
    assert np.isfinite(found.gap).all()
    assert len(found) == len(observed) // 2 - 3  # the lengths of one stratum
    assert found.left_out[0].endswith("two runs of sliding in the same stratum have the same compute")


def test_gap_that_is_no_number_is_refused(study):
    found = pair(study(0))
    with pytest.raises(UserError, match="a gap of bst is not a number: all 100000 2-s0"):
        replace(found, gap=np.where(np.arange(len(found)) == 0, np.nan, found.gap))


def test_partner_without_a_loss_is_named_before_the_end_of_its_curve(study):
    observed = [replace(o, loss=float("nan")) if o.name == "sliding all 100000 2-s0 20.0" else o for o in study(0)]
    assert pair(observed).left_out == ("bst all 100000 2-s0 20.0: the loss of sliding in the same stratum is nan",)
