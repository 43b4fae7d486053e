"""The order in which documents and sequences are served: keyed permutations that need no memory.

`Permutation` is a bijection of ``range(n)`` that is evaluated at any position by arithmetic, so nothing is stored and
nothing is replayed when a run resumes. It is an alternating Feistel network (Luby and Rackoff 1988) over the smallest
power of two that holds n, restricted to ``range(n)`` by cycle walking (Black and Rogaway 2002).

Every constant here is part of every order that a run has been promised (`plan.ORDER_VERSION`) and may not change.
"""

from __future__ import annotations

import hashlib

import numpy as np

KEY_VERSION = 1
"""Part of every key, so that other permutations could one day stand beside these."""

ROUNDS = 6  # three rounds leave visible stripes when neighbouring positions are plotted
_MIN_BITS = 6  # a few spare bits keep the permutations of tiny ranges from being nearly linear
_BLOCK = 1 << 14  # values worked on at a time: the temporaries stay in the cache
_MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)  # odd, 2^64 divided by the golden ratio
_HIGH = np.uint64(32)


def key_words(purpose: str, *numbers: int, count: int) -> np.ndarray:
    """`count` uint64 words that are a pure function of the version of keys, a purpose and integers.

    The same on every machine, Python and numpy; different purposes give unrelated words.
    """
    name = "/".join([f"order{KEY_VERSION}", purpose, *map(str, numbers)])
    digest = hashlib.shake_256(name.encode()).digest(8 * count)
    return np.frombuffer(digest, dtype="<u8").astype(np.uint64)


class Permutation:
    """A keyed bijection of ``range(n)``: ``permutation(positions)`` gives the values at those positions.

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
        """Values (uint64) at an array of positions in ``range(n)``."""
        positions = np.asarray(positions)
        values = positions.astype(np.uint64).reshape(-1)
        for begin in range(0, len(values), _BLOCK):
            block = values[begin : begin + _BLOCK]
            block[:] = self._walk(block)
        return values.reshape(positions.shape)

    def all(self, dtype: np.dtype | type = np.int64) -> np.ndarray:
        """The whole permutation (n,), built block by block: no temporary of its size."""
        values = np.empty(self.n, dtype)
        for begin in range(0, self.n, _BLOCK):
            stop = min(begin + _BLOCK, self.n)
            values[begin:stop] = self._walk(np.arange(begin, stop, dtype=np.uint64))
        return values

    def _walk(self, values: np.ndarray) -> np.ndarray:
        """Apply the network until every value is back in ``range(n)``; at most a few times, as 2n covers its range."""
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
    """The round function: any function will do for a bijection; this one spreads every bit of `half` and `key`."""
    mixed = (half + key) * _MULTIPLIER
    mixed ^= mixed >> _HIGH
    mixed *= _MULTIPLIER
    mixed >>= _HIGH
    return mixed
