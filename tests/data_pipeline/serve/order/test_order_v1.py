"""Version 1 of the order: assignment of positions to corpora. Its streaming mode is tested in test_plan.py."""

from __future__ import annotations

from collections import Counter
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bst_base.errors import UserError
from data_pipeline.serve.order.order_v1 import BLOCK, QuotaMixture, quotas

WEIGHTS = st.lists(st.integers(1, 50).map(lambda w: w / 10), min_size=1, max_size=5)


@given(weights=WEIGHTS, seats=st.integers(1, 5000))
def test_quotas_are_rounded_by_the_largest_remainder_method(weights: list[float], seats: int) -> None:
    found = quotas(weights, seats)
    exact = [Fraction(repr(w)) * seats / sum(Fraction(repr(v)) for v in weights) for w in weights]
    assert sum(found) == seats
    assert all(share - 1 < quota < share + 1 for quota, share in zip(found, exact, strict=True))
    up = [share - int(share) for quota, share in zip(found, exact, strict=True) if quota > share]
    down = [share - int(share) for quota, share in zip(found, exact, strict=True) if quota <= share and share % 1]
    assert not up or not down or min(up) >= max(down)


def test_quotas_of_simple_weights_are_exact() -> None:
    assert quotas([0.5, 0.25, 0.25], BLOCK) == [512, 256, 256]
    assert quotas([0.7, 0.2, 0.1], 10) == [7, 2, 1]
    assert quotas([1, 1, 1], 1024) == [342, 341, 341]


@given(weights=WEIGHTS, seed=st.integers(0, 9), block=st.integers(0, 10**9))
def test_every_block_holds_exactly_its_quotas(weights: list[float], seed: int, block: int) -> None:
    mixture = QuotaMixture([(0, weights)], seed)
    corpora, _ = mixture.locate(np.arange(block * BLOCK, (block + 1) * BLOCK))
    assert np.bincount(corpora, minlength=len(weights)).tolist() == quotas(weights, BLOCK)


@given(data=st.data(), seed=st.integers(0, 9))
def test_each_corpus_is_read_in_order_without_gaps_across_weight_changes(data: st.DataObject, seed: int) -> None:
    count = data.draw(st.integers(1, 4))
    weights = st.lists(st.sampled_from([0.0, 0.5, 1.0, 2.5]), min_size=count, max_size=count).filter(any)
    starts = [0, *sorted(data.draw(st.sets(st.integers(1, 4000), max_size=3)))]
    mixture = QuotaMixture([(start, data.draw(weights)) for start in starts], seed)
    corpora, indices = mixture.locate(np.arange(5000))
    drawn = Counter()
    for corpus, index in zip(corpora.tolist(), indices.tolist(), strict=True):
        assert index == drawn[corpus]
        drawn[corpus] += 1


@given(begin=st.integers(0, 6000), count=st.integers(1, 3000))
def test_any_range_equals_that_part_of_the_whole_order(begin: int, count: int) -> None:
    mixture = QuotaMixture([(0, [1, 2]), (1500, [3, 0]), (1501, [1, 1])], seed=4)
    whole = mixture.locate(np.arange(9000))
    part = mixture.locate(np.arange(begin, begin + count))
    for found, expected in zip(part, whole, strict=True):
        assert np.array_equal(found, expected[begin : begin + count])


def test_each_block_has_another_order() -> None:
    mixture = QuotaMixture([(0, [1, 1])], seed=0)
    first, second = (mixture.locate(np.arange(block * BLOCK, (block + 1) * BLOCK))[0] for block in (0, 1))
    assert 400 < (first == second).sum() < 624  # half of 1024, give or take seven standard deviations


def test_order_version_1_is_pinned() -> None:
    """Existing runs depend on this order."""
    corpora, indices = QuotaMixture([(0, [5, 3, 2]), (2000, [1, 0, 1])], seed=11).locate(np.arange(1994, 2006))
    assert corpora.tolist() == [0, 2, 0, 0, 1, 0, 2, 2, 2, 2, 0, 2]
    assert indices.tolist() == [1002, 398, 1003, 1004, 594, 1005, 399, 400, 401, 402, 1006, 403]


def test_weight_too_small_for_one_position_is_refused() -> None:
    with pytest.raises(UserError, match=r"corpus 1 .* is too small for any of 1024 positions"):
        QuotaMixture([(0, [1.0, 0.0001])], seed=0)


@given(position=st.integers(0, 6000))
def test_counts_equal_the_drawn_positions(position: int) -> None:
    mixture = QuotaMixture([(0, [1, 2]), (1500, [3, 0]), (1501, [1, 1])], seed=4)
    drawn = mixture.locate(np.arange(max(position, 1)))[0][:position]
    assert mixture.counts(position).tolist() == np.bincount(drawn, minlength=2).tolist()
