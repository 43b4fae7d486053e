"""Which corpus each position of a mixed order draws from, and which of that corpus's sequences: exact, by arithmetic.

Positions are dealt in blocks of 1024. In every block each corpus gets its weight's share, rounded by largest remainder
(Hamilton's method), so the mixture is exact over any whole block and never drifts. Weights may change at given
positions: a segment begins there, with its own blocks.
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from functools import lru_cache

import numpy as np

from bst_base.errors import UserError
from data_pipeline.serve.order import key_words

BLOCK = 1024  # positions in which the quotas are exact


def quotas(weights: Sequence[float], seats: int) -> list[int]:
    """`seats` divided in proportion to `weights` by largest remainder, ties to the earlier; sums to `seats`.

    Weights count as the decimal numbers they are written as, so the division is exact on every machine.
    """
    shares = [Fraction(repr(weight)) for weight in weights]
    total = sum(shares)
    exact = [share * seats / total for share in shares]
    seated = [int(value) for value in exact]
    by_remainder = sorted(range(len(exact)), key=lambda i: (seated[i] - exact[i], i))
    for i in by_remainder[: seats - sum(seated)]:
        seated[i] += 1
    return seated


def require_seats(weights: Sequence[float], seats: int, what: str) -> list[int]:
    """`quotas`, refusing weights of which one is positive and yet gets nothing."""
    seated = quotas(weights, seats)
    for number, (weight, seat) in enumerate(zip(weights, seated, strict=True)):
        if weight > 0 and seat == 0:
            raise UserError(
                f"mixture weights {list(weights)}: the weight of corpus {number} ({weight:g}) comes to none of "
                f"{seats} {what}; raise it, or set it to 0"
            )
    return seated


class Mixture:
    """Positions 0, 1, 2, … of an order dealt to corpora.

    Args:
        segments: (first position, weights) pairs; the first begins at 0 and the starts increase.
        seed: keys the order inside the blocks.
    """

    def __init__(self, segments: Sequence[tuple[int, Sequence[float]]], seed: int) -> None:
        self._starts = np.array([start for start, _ in segments])
        self._quotas = [np.array(require_seats(weights, BLOCK, "positions")) for _, weights in segments]
        self._seed = seed
        self._dealt = lru_cache(maxsize=16)(self._deal)
        self._before = [np.zeros_like(self._quotas[0])]  # sequences of each corpus dealt before each segment
        for number, stop in enumerate(self._starts[1:].tolist()):
            whole, rest = divmod(stop - int(self._starts[number]), BLOCK)
            used = self._before[-1] + whole * self._quotas[number]
            if rest:
                used = used + np.bincount(self._dealt(number, whole)[0][:rest], minlength=len(used))
            self._before.append(used)

    def locate(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """For increasing positions (n,): the corpus of each, and the index among all sequences drawn from it."""
        segments = np.searchsorted(self._starts, positions, side="right") - 1
        blocks, places = np.divmod(positions - self._starts[segments], BLOCK)
        corpora, indices = np.empty_like(positions), np.empty_like(positions)
        begin = 0
        for end in [*(np.flatnonzero(np.diff(blocks) | np.diff(segments)) + 1).tolist(), len(positions)]:
            segment, block, place = int(segments[begin]), int(blocks[begin]), places[begin:end]
            corpus, rank = self._dealt(segment, block)
            base = self._before[segment] + block * self._quotas[segment]
            corpora[begin:end] = corpus[place]
            indices[begin:end] = base[corpus[place]] + rank[place]
            begin = end
        return corpora, indices

    def _deal(self, segment: int, block: int) -> tuple[np.ndarray, np.ndarray]:
        """One block's corpora (1024,) and, for each place, how many earlier places of the block have the same."""
        quota = self._quotas[segment]
        # Raw Philox words are fixed for ever; Generator.permutation may change between numpy versions.
        words = np.random.Philox(key=key_words("mixture", self._seed, segment, count=2), counter=[0, block, 0, 0])
        corpora = np.repeat(np.arange(len(quota)), quota)[np.argsort(words.random_raw(BLOCK), kind="stable")]
        ranks = np.empty(BLOCK, np.int64)
        ranks[np.argsort(corpora, kind="stable")] = np.arange(BLOCK) - np.repeat(np.cumsum(quota) - quota, quota)
        return corpora, ranks
