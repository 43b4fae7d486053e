"""The gap, its statistics and the rule, over repeated synthetic sweeps whose answer is known."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from bst_base.errors import UserError
from bst_dist.study.laws import gap, regression, verdict
from bst_dist.study.laws.table import Row

SIZES, DEPTHS, MULTIPLES = (1e5, 2e5, 4e5), (2, 8), (5.0, 10.0, 20.0)


def row(architecture, size, depth, seed, multiple, loss, time_s=None):
    block = f"{size:.0f} {depth} {seed}"
    return Row(
        run=f"{architecture} {block} {multiple}", trunk=f"{architecture} {block}", status="done",
        architecture=architecture, arm="all", size=size, depth=depth, width=64, seed=seed, block=block,
        tokens_per_parameter=multiple, parameters=size, parameters_total=int(size), parameters_non_embedding=int(size),
        parameters_matrices=int(size), parameters_kernel=0, flops_per_token={"ffn": 2 * size},
        tokens=int(size * multiple), flops=6 * size * size * multiple, loss_nats=loss,
        time_s=time_s or size * multiple,
    )  # fmt: skip


def sweep(seed, mean=0.01, per_depth=0.0, per_flops=0.0, noise=0.004, seeds=4, variant="bst"):
    """Rows of both architectures: the gap is `mean` plus its slopes in the natural logarithms of depth and compute."""
    generator = np.random.default_rng(seed)
    rows = []
    for size in SIZES:
        for depth in DEPTHS:
            for draw in range(seeds):
                levels = generator.normal(0, noise, 2)
                for multiple in MULTIPLES:
                    flops = 6 * size * size * multiple
                    base = 1.0 + 20 * size**-0.3 + 20 * (size * multiple) ** -0.3
                    rest = generator.normal(0, noise / 4, 2)
                    g = mean + per_depth * np.log(depth / 4) + per_flops * np.log(flops / 2e12)
                    rows.append(row("sliding", size, depth, draw, multiple, base * np.exp(levels[0] + rest[0])))
                    rows.append(row(variant, size, depth, draw, multiple, base * np.exp(levels[1] + rest[1] - g)))
    return rows


def judge(seed, **truth):
    return {change.factor: change for change in verdict.judge([gap.pair(sweep(seed, **truth), "bst", "sliding")], 199)}


def test_gap_and_gain_are_exact_where_nothing_is_noisy():
    found = gap.pair(sweep(0, mean=0.02, per_depth=0.01, noise=0), "bst", "sliding")
    assert found.gap == pytest.approx(0.02 + 0.01 * np.log(found.depth / 4), abs=1e-12)
    matrix, names = verdict.columns(found)
    fitted = regression.regress(matrix, found.gap, found.block)
    assert dict(zip(names, fitted.values[1:], strict=True))["depth"] == pytest.approx(0.01)


def test_gain_is_the_compute_that_the_baseline_needs():
    """Losses on a power of compute: the gain follows from the gap by the exponent."""
    rows = [row("sliding", 1e5, 2, 0, m, 5 * m**-0.1) for m in (5, 10, 20, 40)]
    rows += [row("bst", 1e5, 2, 0, m, 5 * (1.25 * m) ** -0.1) for m in (5, 10, 20)]
    assert np.exp(gap.pair(rows, "bst", "sliding").log_gain) == pytest.approx(1.25)


def test_gap_at_equal_time_charges_a_slower_architecture():
    rows = [row("sliding", 1e5, 2, 0, m, 5 * m**-0.1, time_s=m) for m in (5, 10, 20, 40)]
    rows += [row("bst", 1e5, 2, 0, m, 5 * m**-0.1, time_s=2 * m) for m in (5, 10, 20, 40)]
    found = gap.pair(rows, "bst", "sliding", "time_s")
    assert found.gap == pytest.approx(-0.1 * np.log(2))
    assert len(found) == 3
    assert "beyond the baseline's curve" in found.left_out[0]


def test_runs_that_did_not_finish_are_left_out_and_named():
    rows = sweep(0)
    rows[0] = rows[0].model_copy(update={"status": "diverged"})
    found = gap.pair(rows, "bst", "sliding")
    assert len(found) == len(rows) // 2 - 1
    assert "beyond the baseline's curve in flops" in found.left_out[0]
    with pytest.raises(UserError, match="no pair of mega and sliding"):
        gap.pair(rows, "mega", "sliding")


def test_errors_of_single_points_are_hc3():
    generator = np.random.default_rng(1)
    columns = np.stack((np.ones(30), generator.normal(size=30)), axis=1)
    target = columns @ (1.0, 2.0) + generator.normal(size=30) * (1 + columns[:, 1] ** 2)
    inverse = np.linalg.inv(columns.T @ columns)
    residuals = target - columns @ inverse @ columns.T @ target
    leverage = np.einsum("ij,jk,ik->i", columns, inverse, columns)
    expected = inverse @ (columns.T * (residuals / (1 - leverage)) ** 2) @ columns @ inverse
    assert regression.regress(columns, target, np.arange(30)).covariance == pytest.approx(expected)


def test_clustered_errors_are_those_of_leaving_clusters_out():
    """CR3 is the jackknife over clusters, about the full estimate."""
    generator = np.random.default_rng(2)
    clusters = np.repeat(np.arange(8), 3)
    columns = np.stack((np.ones(24), generator.normal(size=24)), axis=1)
    target = generator.normal(size=24) + generator.normal(size=8)[clusters]
    full = np.linalg.lstsq(columns, target, rcond=None)[0]
    without = [np.linalg.lstsq(columns[clusters != g], target[clusters != g], rcond=None)[0] for g in range(8)]
    expected = 7 / 8 * sum(np.outer(b - full, b - full) for b in without)
    assert regression.regress(columns, target, clusters).covariance == pytest.approx(expected)


def test_holm_is_the_textbook_example():
    assert regression.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])


def test_intervals_of_the_change_over_depth_cover_it_as_often_as_they_say():
    span = np.log(DEPTHS[1] / DEPTHS[0])
    tried = 60
    changes = [judge(seed, per_depth=0.01)["depth"] for seed in range(tried)]
    hits = sum(change.low <= 0.01 * span <= change.high for change in changes)
    assert stats.binom.cdf(hits, tried, 0.95) > 0.005, f"{hits} of {tried}"


def test_no_change_is_hardly_ever_called_one():
    answers = [change.answer for seed in range(40) for change in judge(seed, noise=0.01).values()]
    false = sum(answer in ("grows", "shrinks") for answer in answers)
    assert stats.binom.sf(false - 1, len(answers), 0.05) > 0.005, f"{false} of {len(answers)}"


def test_a_change_of_twice_the_margin_is_hardly_ever_called_equivalent():
    span = np.log(DEPTHS[1] / DEPTHS[0])
    answers = [judge(seed, per_depth=0.01 / span, noise=0.006)["depth"].answer for seed in range(30)]
    assert answers.count("equivalent") <= 2


@pytest.mark.parametrize(
    ("truth", "factor", "answer"),
    [
        ({"per_depth": 0.02}, "depth", "grows"),
        ({"per_depth": -0.02}, "depth", "shrinks"),
        ({"per_flops": 0.02}, "flops", "grows"),
        ({"noise": 0.0005}, "depth", "equivalent"),
        ({"noise": 0.03}, "depth", "undecided"),
    ],
)
def test_the_rule_gives_the_answer_that_is_true(truth, factor, answer):
    change = judge(11, **truth)[factor]
    assert change.answer == answer
    assert (change.more_pairs > 0) == (answer == "undecided")


def test_pairs_said_to_be_needed_show_a_change_as_large_as_the_margin_four_times_in_five():
    truth = {"noise": 0.006, "per_depth": verdict.MARGIN / np.log(4)}
    errors = [judge(seed, seeds=2, **truth)["depth"].standard_error for seed in range(20)]
    needed = verdict.pairs_needed(np.sqrt(np.mean(np.square(errors))), pairs=12)
    seen = [judge(seed, seeds=-(-needed // 6), **truth)["depth"].p_robust < 0.05 for seed in range(40)]
    assert stats.binom.cdf(sum(seen), 40, 0.8) > 0.005, f"{sum(seen)} of 40"


def test_crossing_is_where_the_gap_vanishes():
    gaps = gap.pair(sweep(5, mean=0.01, per_flops=0.02, noise=0.001), "bst", "sliding")
    change = next(c for c in verdict.judge([gaps], 199) if c.factor == "flops")
    expected = 2e12 * np.exp(-0.01 / 0.02)  # at the mean depth, which is where the depth term vanishes
    assert verdict.crossing_flops(gaps, change) == pytest.approx(expected, rel=0.2)
