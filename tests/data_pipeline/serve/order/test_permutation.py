"""Permutations of documents and sequences."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_pipeline.serve.order.permutation import KEY_VERSION, Permutation, key_words


@given(n=st.integers(1, 5000), seed=st.integers(0, 2**63), epoch=st.integers(0, 1000))
def test_permutation_contains_every_value_exactly_once(n: int, seed: int, epoch: int) -> None:
    assert sorted(Permutation(n, "documents", seed, epoch).all().tolist()) == list(range(n))


@given(n=st.integers(1, 2**40), data=st.data())
def test_value_does_not_depend_on_positions_computed_together(n: int, data: st.DataObject) -> None:
    positions = data.draw(st.lists(st.integers(0, n - 1), min_size=1, max_size=20))
    permutation = Permutation(n, "sequences", 7)
    together = permutation(np.array(positions))
    alone = [int(permutation(np.array([position]))[0]) for position in positions]
    assert together.tolist() == alone
    assert together.max() < n


def feistel_in_python(n: int, position: int, keys: list[int]) -> int:
    """Return the same permutation, computed with Python's unbounded integers."""
    bits = max((n - 1).bit_length(), 6)
    low_bits = bits // 2
    value = position
    while True:
        low, high = value % 2**low_bits, value // 2**low_bits
        for number, key in enumerate(keys):
            mixed = ((low if number % 2 else high) + key) * 0x9E3779B97F4A7C15 % 2**64
            mixed = (mixed ^ mixed >> 32) * 0x9E3779B97F4A7C15 % 2**64 >> 32
            if number % 2:
                high ^= mixed % 2 ** (bits - low_bits)
            else:
                low ^= mixed % 2**low_bits
        value = high * 2**low_bits + low
        if value < n:
            return value


@given(n=st.integers(1, 2**50), data=st.data(), seed=st.integers(0, 100))
def test_permutation_equals_a_python_integer_implementation(n: int, data: st.DataObject, seed: int) -> None:
    position = data.draw(st.integers(0, n - 1))
    keys = key_words("documents", seed, count=6).tolist()
    assert int(Permutation(n, "documents", seed)(np.array([position]))[0]) == feistel_in_python(n, position, keys)


def test_the_permutations_are_pinned() -> None:
    """The data order of existing runs depends on them."""
    assert KEY_VERSION == 1
    assert key_words("documents", 1, 2, count=2).tolist() == [5092798414525274126, 3445206045729722407]
    assert Permutation(20, "documents", 0, 0, 0).all().tolist() == [
        3,
        5,
        15,
        2,
        8,
        14,
        10,
        7,
        18,
        4,
        0,
        19,
        17,
        11,
        13,
        16,
        12,
        6,
        1,
        9,
    ]
    assert Permutation(10_000_000, "sequences", 17, 0, 3)(np.arange(6)).tolist() == [
        857504,
        6677701,
        7729539,
        5732316,
        1270936,
        4028686,
    ]


@pytest.mark.parametrize("n", [4096, 100_003])
def test_neighbouring_positions_get_uncorrelated_values(n: int) -> None:
    """On a 32 x 32 grid, the points (position, value) and (value, next value) are as uniform as random ones."""
    values = Permutation(n, "documents", 5).all()
    for x, y in ((np.arange(n), values), (values[:-1], values[1:])):
        cells, *_ = np.histogram2d(x, y, bins=32)
        expected = n / 1024
        chi_square = ((cells - expected) ** 2 / expected).sum() / 1023
        assert chi_square == pytest.approx(1.0, abs=0.2)


def test_different_keys_give_unrelated_orders() -> None:
    orders = [Permutation(1000, "documents", seed, epoch).all() for seed in (0, 1) for epoch in (0, 1)]
    orders.append(Permutation(1000, "sequences", 0, 0).all())
    for i, first in enumerate(orders):
        for second in orders[i + 1 :]:
            assert (first == second).sum() < 10  # 1 expected by chance


def test_an_empty_range_is_refused() -> None:
    with pytest.raises(ValueError, match="at least 1"):
        Permutation(0, "documents")
