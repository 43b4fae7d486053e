"""Mixtures: shares are kept at any position, weights can change, and the order needs no history."""

from __future__ import annotations

from collections import Counter
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bst_base.errors import UserError
from data_pipeline.serve.order.mixture import Dealer, Mixture, whole_weights

WEIGHTS = st.lists(
    st.one_of(st.sampled_from([0.0, 0.0001, 0.0015, 0.05, 0.3, 0.7]), st.floats(1e-3, 5)), min_size=1, max_size=6
).filter(any)


@given(weights=WEIGHTS, seed=st.integers(0, 9), positions=st.integers(0, 10**12))
def test_counts_match_the_weights_at_every_position(weights: list[float], seed: int, positions: int) -> None:
    """Compared with exact fractions: the difference never exceeds the depth of the tree of divisions."""
    exact = [
        Fraction(w) * positions / sum(Fraction(each) for each in whole_weights(weights)) for w in whole_weights(weights)
    ]
    counts = Dealer(weights, "test", seed).counts(positions)
    assert counts.sum() == positions
    assert all(abs(int(count) - share) <= 3 for count, share in zip(counts, exact, strict=True))


def test_corpus_with_a_small_weight_gets_its_share() -> None:
    counts = Dealer([0.9985, 0.0015], "test", 0).counts(10_000_000)
    assert abs(counts[1] - 15_000) <= 1
    counts = Dealer([1.0, 0.0000001], "test", 0).counts(10**9)
    assert abs(counts[1] - 100) <= 1


def test_only_the_proportion_of_weights_matters() -> None:
    assert whole_weights([7, 3]) == whole_weights([0.7, 0.3]) == whole_weights([70.0, 30.0]) == [7, 3]
    assert whole_weights([0.85, 0.1, 0.05]) == [17, 2, 1]
    assert whole_weights([0.0, 2.0]) == [0, 1]
    fine = whole_weights([0.12345678901234, 0.9])
    assert sum(fine) <= 1 << 30 and fine[0] / sum(fine) == pytest.approx(0.12345678901234 / 1.02345678901234, rel=1e-7)


@given(weights=WEIGHTS, seed=st.integers(0, 9), begin=st.integers(0, 10**9))
def test_located_corpus_and_index_match_the_counts(weights: list[float], seed: int, begin: int) -> None:
    dealer = Dealer(weights, "test", seed)
    corpora, indices = dealer.locate(np.arange(begin, begin + 50))
    for place, (corpus, index) in enumerate(zip(corpora.tolist(), indices.tolist(), strict=True), start=begin):
        before, after = dealer.counts(place), dealer.counts(place + 1)
        assert before[corpus] == index
        assert (after - before).tolist() == [int(other == corpus) for other in range(len(weights))]


@given(data=st.data(), seed=st.integers(0, 9))
def test_each_corpus_is_read_in_order_without_gaps_across_weight_changes(data: st.DataObject, seed: int) -> None:
    count = data.draw(st.integers(1, 4))
    weights = st.lists(st.sampled_from([0.0, 0.5, 1.0, 2.5]), min_size=count, max_size=count).filter(any)
    starts = [0, *sorted(data.draw(st.sets(st.integers(1, 4000), max_size=3)))]
    mixture = Mixture([(start, data.draw(weights)) for start in starts], seed)
    corpora, indices = mixture.locate(np.arange(5000))
    drawn = Counter()
    for corpus, index in zip(corpora.tolist(), indices.tolist(), strict=True):
        assert index == drawn[corpus]
        drawn[corpus] += 1
    assert mixture.counts(5000).tolist() == [drawn[corpus] for corpus in range(count)]


@given(begin=st.integers(0, 6000), count=st.integers(1, 3000))
def test_any_range_equals_that_part_of_the_whole_order(begin: int, count: int) -> None:
    mixture = Mixture([(0, [1, 2]), (1500, [3, 0]), (1501, [1, 1])], seed=4)
    whole = mixture.locate(np.arange(9000))
    part = mixture.locate(np.arange(begin, begin + count))
    for found, expected in zip(part, whole, strict=True):
        assert np.array_equal(found, expected[begin : begin + count])


def test_corpus_of_weight_0_does_not_change_the_order() -> None:
    with_it, without = (Mixture([(0, weights)], seed=3) for weights in ([0.6, 0.3, 0.1, 0.0], [0.6, 0.3, 0.1]))
    for found, expected in zip(with_it.locate(np.arange(500)), without.locate(np.arange(500)), strict=True):
        assert np.array_equal(found, expected)


def test_order_version_2_is_pinned() -> None:
    """Existing runs depend on this order; version 3 assigns corpora in the same way."""
    corpora, indices = Mixture([(0, [5, 3, 2]), (2000, [1, 0, 1])], seed=11).locate(np.arange(1990, 2006))
    assert corpora.tolist() == [0, 1, 0, 2, 0, 1, 0, 2, 0, 1, 0, 2, 0, 2, 0, 2]
    assert indices.tolist() == [
        995,
        597,
        996,
        398,
        997,
        598,
        998,
        399,
        999,
        599,
        1000,
        400,
        1001,
        401,
        1002,
        402,
    ]


def test_a_weight_too_small_to_be_counted_is_refused() -> None:
    with pytest.raises(UserError, match=r"corpus 1 .* less than a billionth"):
        Mixture([(0, [1.0, 1e-10])], seed=0)
