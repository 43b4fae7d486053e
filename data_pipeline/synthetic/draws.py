"""Random numbers that are the same on every machine and in every version of numpy.

numpy only guarantees that its raw Philox words do not change. Everything else is computed from them with integers and
exact products, so a row of a task is the same wherever it is computed.
"""

from __future__ import annotations

import numpy as np

from data_pipeline.serve.order.permutation import key_words

_UNIT = 2.0**-53


class Draws:
    """An endless series of random numbers, keyed by a purpose and integers as in `key_words`."""

    def __init__(self, purpose: str, *numbers: int) -> None:
        self._bits = np.random.Philox(key=key_words(purpose, *numbers, count=2))

    def uniforms(self, count: int) -> np.ndarray:
        """Return (count,) float64 in [0, 1), multiples of 2^-53."""
        return (self._bits.random_raw(count) >> np.uint64(11)) * _UNIT

    def below(self, limit: int | np.ndarray, count: int) -> np.ndarray:
        """Return (count,) int64, each uniform in ``range(limit)``.

        Limits go up to 2^31: one for all, or one for each.
        """
        return (self.uniforms(count) * limit).astype(np.int64)

    def one(self, limit: int) -> int:
        """Return one number in ``range(limit)``."""
        return int(self.below(limit, 1)[0])

    def chosen(self, population: int, count: int) -> np.ndarray:
        """Return (count,) int64: distinct numbers of ``range(population)`` in random order."""
        return np.argsort(self.uniforms(population), kind="stable")[:count]
