from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import pytest

from bst_dist.study.statistics import Estimate, entries, exponential, ratio


def test_ratio_is_of_sums_not_a_mean_of_ratios():
    assert ratio(np.array([1.0, 9.0]), np.array([1, 3])).value == 2.5


def test_standard_error_agrees_with_a_bootstrap_over_documents():
    random = np.random.default_rng(1)
    size = random.lognormal(5, 1, 400)
    bits = size * random.normal(2, 0.3, 400)
    draws = random.integers(0, 400, (4000, 400))
    bootstrap = (bits[draws].sum(1) / size[draws].sum(1)).std()
    assert ratio(bits, size).standard_error == pytest.approx(bootstrap, rel=0.08)


def test_equal_sizes_give_the_textbook_error_of_a_mean():
    bits = np.array([1.0, 2.0, 4.0, 9.0])
    expected = bits.std(ddof=1) / math.sqrt(4)
    assert ratio(bits, np.ones(4)).standard_error == pytest.approx(expected, rel=1e-12)


def test_one_document_has_no_error_to_tell():
    assert ratio(np.array([6.0]), np.array([3])) == Estimate(2.0, None)
    assert str(Estimate(2.0, None)) == "2.0000"


def test_perplexity_error_is_relative_to_that_of_the_nats():
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


def test_a_report_has_an_estimate_as_two_entries_and_leaves_out_what_is_not_known():
    part = Part(Estimate(2.5, 0.5))
    entry = {"loss": 2.5, "loss_standard_error": 0.5}
    assert entries(Found("run", [part, Part(Estimate(1.0, None))], {"a": part})) == {
        "name": "run", "parts": [entry, {"loss": 1.0, "loss_standard_error": None}], "by_corpus": {"a": entry},
    }  # fmt: skip
