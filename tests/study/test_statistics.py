from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import pytest

from bst_dist.study.statistics import (
    Z95,
    Estimate,
    entries,
    equality,
    exponential,
    mean,
    ratio,
    readable,
    share_interval,
    share_report,
    share_text,
)


def test_ratio_is_of_sums_not_a_mean_of_ratios():
    assert ratio(np.array([1.0, 9.0]), np.array([1, 3])).value == 2.5


def test_standard_error_agrees_with_a_bootstrap_over_documents():
    random = np.random.default_rng(1)
    size = random.lognormal(5, 1, 400)
    bits = size * random.normal(2, 0.3, 400)
    draws = random.integers(0, 400, (4000, 400))
    bootstrap = (bits[draws].sum(1) / size[draws].sum(1)).std()
    assert ratio(bits, size).standard_error == pytest.approx(bootstrap, rel=0.08)


def test_equal_document_sizes_give_the_usual_standard_error():
    bits = np.array([1.0, 2.0, 4.0, 9.0])
    expected = bits.std(ddof=1) / math.sqrt(4)
    assert ratio(bits, np.ones(4)).standard_error == pytest.approx(expected, rel=1e-12)
    assert ratio(bits, np.ones(4)).degrees == 3


def test_one_document_has_no_standard_error():
    assert ratio(np.array([6.0]), np.array([3])) == Estimate(2.0, None)
    assert str(Estimate(2.0, None)) == "2.0000"


def test_intervals_and_p_values_use_students_t_distribution():
    five = mean([1.0, 2.0, 4.0, 4.0, 9.0])
    assert (five.value, five.degrees, five.observations) == (4.0, 4, 5)
    assert five.standard_error == pytest.approx(math.sqrt((9 + 4 + 0 + 0 + 25) / 4 / 5))
    assert five.half_width == pytest.approx(2.7764451 * five.standard_error)  # t of 97.5 %, 4 degrees of freedom
    assert (five.low, five.high) == (4.0 - five.half_width, 4.0 + five.half_width)
    assert Estimate(2.7764451, 1.0, 4).p_value == pytest.approx(0.05)
    assert Estimate(-1.959964, 1.0).p_value == pytest.approx(0.05)  # the normal distribution
    assert [Estimate(value, 0.0, 4).p_value for value in (0.0, 0.1)] == [1.0, 0.0]
    alone = mean([3.0])
    assert (alone.value, alone.standard_error, alone.p_value) == (3.0, None, 1.0)
    assert (alone.low, alone.high, alone.observations) == (-math.inf, math.inf, 1)


def test_equality_is_shown_by_two_one_sided_tests():
    """One standard error, infinite degrees of freedom: 1.6448536 standard errors to each side."""
    assert equality(Estimate(0.0, 1.0), 1.645) == "equal"
    assert equality(Estimate(0.0, 1.0), 1.644) == "undecided"
    assert equality(Estimate(-1.0, 1.0), 2.645) == "equal"
    assert equality(Estimate(-1.97, 1.0), 2.0) == "different"
    assert equality(Estimate(1.95, 1.0), 2.0) == "undecided"
    assert equality(Estimate(1.0, None), 2.0) == "undecided"
    # With 4 degrees of freedom 2.1318 to each side.
    assert [equality(Estimate(0.0, 1.0, 4), margin) for margin in (2.131, 2.132)] == ["undecided", "equal"]


def test_huge_numbers_are_printed_in_scientific_notation():
    assert Estimate(1954405542.44, 664831679.94).text(2) == "2.0e+09 ± 6.6e+08"
    assert Estimate(9_999_999.0, None).text(2) == "9,999,999.00"
    assert Estimate(-3.2e10, None).text(4, sign=True) == "-3.2e+10"
    assert Estimate(0.5, 0.25).text(1, sign=True) == "+0.5 ± 0.2"
    assert readable(math.inf, 2) == "inf"


def test_perplexity_error_is_perplexity_times_the_error_of_nats():
    perplexity = exponential(Estimate(math.log(50), 0.01))
    assert perplexity.value == pytest.approx(50)
    assert perplexity.standard_error == pytest.approx(0.5)


def test_perplexity_beyond_floating_point_is_infinite():
    assert exponential(Estimate(1e4, None)).value == math.inf


@dataclass(frozen=True)
class Part:
    loss: Estimate
    unknown: float | None = None


@dataclass(frozen=True)
class Found:
    name: str
    parts: list[Part]
    by_corpus: dict[str, Part]
    nothing: float = math.nan
    none: Estimate | None = None


def test_report_has_two_entries_per_estimate_and_omits_none():
    part = Part(Estimate(2.5, 0.5))
    entry = {"loss": 2.5, "loss_standard_error": 0.5}
    assert entries(Found("run", [part, Part(Estimate(1.0, None))], {"a": part})) == {
        "name": "run",
        "parts": [entry, {"loss": 1.0, "loss_standard_error": None}],
        "by_corpus": {"a": entry},
    }


@pytest.mark.parametrize(("value", "text"), [(0.0, "0.0000 (0.0000 to 0.1072)"), (1.0, "1.0000 (0.8928 to 1.0000)")])
def test_share_of_none_or_all_of_the_rows_has_an_interval(value, text):
    """Wilson's score interval of 0 of n ends at z^2 / (n + z^2)."""
    share = ratio(np.full(32, 4 * value), np.full(32, 4.0))
    assert share.standard_error == 0
    assert share_interval(share)[0 if value else 1] == pytest.approx(abs(value - Z95**2 / (32 + Z95**2)))
    assert share_text(share) == text
    assert share_report(share, "keys")["keys_high_95"] == share_interval(share)[1]


def test_share_of_half_of_the_rows_is_printed_with_its_error():
    share = ratio(np.arange(32) % 2, np.ones(32))
    assert share_text(share) == f"0.5000 ± {share.standard_error:.4f}"
    assert share_interval(share) == pytest.approx((0.5 - 0.169, 0.5 + 0.169), abs=0.005)


@pytest.mark.parametrize("probability", [0.02, 0.1, 0.5])
def test_interval_of_a_share_over_rows_has_its_nominal_coverage(probability):
    """Each row has 4 labels, all right or all wrong in half of the rows, so labels are not independent."""
    random, hits = np.random.default_rng(3), 0
    for _ in range(1000):
        right = random.random((64, 4)) < probability
        right[:32] = right[:32, :1]
        low, high = share_interval(ratio(right.sum(1), np.full(64, 4.0)))
        hits += low <= probability <= high
    assert hits / 1000 > 0.92
