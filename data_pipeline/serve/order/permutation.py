"""Keyed permutations that need no memory: the order in which documents and sequences are served.

`Permutation` is a bijection of ``range(n)`` that is evaluated at any position by arithmetic. Nothing is stored, and
nothing is replayed when a run resumes. It is an alternating Feistel network (Luby and Rackoff 1988) over a power of two
that is at least n and at least 64, restricted to ``range(n)`` by cycle walking (Black and Rogaway 2002).

Every version of the order (`plan.ORDER_VERSION`) depends on every constant here. They must not change, or runs could
not be resumed in their order.
"""

from __future__ import annotations

import hashlib

import numpy as np

KEY_VERSION = 1
"""Part of every key. Another value would give a second, unrelated set of permutations."""

ROUNDS = 6  # after three rounds, a plot of neighbouring positions still shows stripes
_MIN_BITS = 6  # with fewer bits, the permutations of tiny ranges would be nearly linear
_BLOCK = 1 << 14  # values computed at a time: the temporaries stay in the cache
_MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)  # odd, 2^64 divided by the golden ratio
_HIGH = np.uint64(32)


def key_words(purpose: str, *numbers: int, count: int) -> np.ndarray:
    """Return `count` uint64 words, a pure function of the key version, a purpose and integers.

    They are the same on every machine and with every version of Python and numpy. Different purposes give unrelated
    words.
    """
    name = "/".join([f"order{KEY_VERSION}", purpose, *map(str, numbers)])
    digest = hashlib.shake_256(name.encode()).digest(8 * count)
    return np.frombuffer(digest, dtype="<u8").astype(np.uint64)


class Permutation:
    """A keyed bijection of ``range(n)``: ``permutation(positions)`` returns the values at those positions.

    Args:
        n: size of the range, at least 1.
        purpose, numbers: the key, as in `key_words`.
    """

    def __init__(self, n: int, purpose: str, *numbers: int) -> None:
        if n < 1:
            raise ValueError(f"a permutation of {n} values: at least 1 is needed")
        self.n = n
        bits = max((n - 1).bit_length(), _MIN_BITS)
        low = bits // 2
        self._low_bits = np.uint64(low)
        self._low_mask = np.uint64((1 << low) - 1)
        self._high_mask = np.uint64((1 << (bits - low)) - 1)
        self._keys = key_words(purpose, *numbers, count=ROUNDS)

    def __call__(self, positions: np.ndarray) -> np.ndarray:
        """Return the values (uint64) at an array of positions in ``range(n)``."""
        positions = np.asarray(positions)
        values = positions.astype(np.uint64).reshape(-1)
        for begin in range(0, len(values), _BLOCK):
            block = values[begin : begin + _BLOCK]
            block[:] = self._walk(block)
        return values.reshape(positions.shape)

    def all(self, dtype: np.dtype | type = np.int64) -> np.ndarray:
        """Return the whole permutation (n,). It is built block by block, so that no temporary has its size."""
        values = np.empty(self.n, dtype)
        for begin in range(0, self.n, _BLOCK):
            stop = min(begin + _BLOCK, self.n)
            values[begin:stop] = self._walk(np.arange(begin, stop, dtype=np.uint64))
        return values

    def _walk(self, values: np.ndarray) -> np.ndarray:
        """Apply the network until every value is back in ``range(n)``.

        From n = 33 on, the network's range is less than 2n, so a value needs fewer than two applications on average.
        """
        values = self._network(values)
        outside = np.flatnonzero(values >= self.n)
        while len(outside):
            again = self._network(values[outside])
            values[outside] = again
            outside = outside[again >= self.n]
        return values

    def _network(self, values: np.ndarray) -> np.ndarray:
        low = values & self._low_mask
        high = values >> self._low_bits
        for number, key in enumerate(self._keys):
            if number % 2 == 0:
                low ^= _scramble(high, key) & self._low_mask
            else:
                high ^= _scramble(low, key) & self._high_mask
        return (high << self._low_bits) | low


def _scramble(half: np.ndarray, key: np.uint64) -> np.ndarray:
    """Compute the round function. Any function gives a bijection; this one spreads every bit of `half` and `key`."""
    mixed = (half + key) * _MULTIPLIER
    mixed ^= mixed >> _HIGH
    mixed *= _MULTIPLIER
    mixed >>= _HIGH
    return mixed
