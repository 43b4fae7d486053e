"""Which corpus each position of a mixed order reads from, and which of that corpus's sequences, by arithmetic alone.

Shares are kept by error diffusion: after any number of positions, the count of a corpus differs from its weight's share
by a few positions only, however small the weight and however long the run. Of two corpora, the first gets ``floor(m p +
phase)`` of the first m positions, where p is its share. With more corpora, a balanced tree of such divisions decides.
So the corpus of a position, and how many positions a corpus got before it, are found without looking at any other
position. Weights may change at given positions. A segment with its own divisions begins there.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction
from typing import NamedTuple

import numpy as np

from bst_base.errors import UserError
from data_pipeline.serve.order.permutation import key_words

_FINEST = 1 << 30  # units to which weights with many digits are rounded, so that a product of two fits into 64 bits


def whole_weights(weights: Sequence[float]) -> list[int]:
    """Return the weights as integers in the same proportion, without a common divisor: 0.7 and 0.3 become 7 and 3.

    Weights count as the decimal numbers they are written as. Raises UserError for a weight that is positive but less
    than a billionth of the sum.
    """
    exact = [Fraction(repr(weight)) for weight in weights]
    scale = math.lcm(*(each.denominator for each in exact))
    whole = [int(each * scale) for each in exact]
    if sum(whole) > _FINEST:
        whole = [round(each * _FINEST / sum(whole)) for each in whole]
    for number, (weight, units) in enumerate(zip(weights, whole, strict=True)):
        if weight > 0 and units == 0:
            raise UserError(
                f"mixture weights {list(weights)}: the weight of corpus {number} ({weight:g}) is less than a billionth "
                "of their sum; raise it, or set it to 0"
            )
    divisor = math.gcd(*whole)
    return [units // divisor for units in whole]


class _Division(NamedTuple):
    """A node of the tree: of every `total` positions that reach it, `left` go to the corpora on the left."""

    left: int
    total: int
    phase: int  # in range(total): the offset at which the division begins
    sides: tuple[_Division | int, _Division | int]  # the left and right child: another division, or a corpus

    def left_of(self, m: np.ndarray) -> np.ndarray:
        """Return how many of the first `m` positions go to the left."""
        whole, rest = np.divmod(m, self.total)
        return whole * self.left + (rest * self.left + self.phase) // self.total


class Dealer:
    """Deals the positions 0, 1, 2, … to corpora in proportion to their weights.

    Args:
        weights: of each corpus. A corpus of weight 0 is left out, so adding one changes nothing.
        key: purpose and numbers that key the phases (`permutation.key_words`).
    """

    def __init__(self, weights: Sequence[float], *key: str | int) -> None:
        whole = whole_weights(weights)
        drawn = [corpus for corpus, units in enumerate(whole) if units]
        self._corpora = len(whole)
        phases = iter(key_words(*key, count=max(len(drawn) - 1, 1)).tolist())

        def tree(corpora: list[int]) -> _Division | int:
            if len(corpora) == 1:
                return corpora[0]
            half = len(corpora) // 2
            left, total = (sum(whole[corpus] for corpus in part) for part in (corpora[:half], corpora))
            phase = next(phases) % total
            return _Division(left, total, phase, (tree(corpora[:half]), tree(corpora[half:])))

        self._tree = tree(drawn)

    def locate(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return (corpus, how many earlier positions that corpus got) of each position (n,) int64."""
        corpus, index = np.empty_like(positions), np.empty_like(positions)
        pending = [(self._tree, np.arange(len(positions)), positions)]
        while pending:
            node, which, m = pending.pop()
            if isinstance(node, int):
                corpus[which], index[which] = node, m
                continue
            before = node.left_of(m)
            is_left = node.left_of(m + 1) > before
            for side, chosen, inside in zip(node.sides, (is_left, ~is_left), (before, m - before), strict=True):
                if chosen.any():
                    pending.append((side, which[chosen], inside[chosen]))
        return corpus, index

    def counts(self, positions: int) -> np.ndarray:
        """Return (corpora,) int64: how many of the first `positions` each corpus gets."""
        found = np.zeros(self._corpora, np.int64)
        pending = [(self._tree, np.int64(positions))]
        while pending:
            node, m = pending.pop()
            if isinstance(node, int):
                found[node] = m
            else:
                left = node.left_of(m)
                pending += [(node.sides[0], left), (node.sides[1], m - left)]
        return found


class Mixture:
    """Deals the positions of an order to corpora, through every change of weights.

    Args:
        segments: (first position, weights) pairs. The first begins at 0 and the starts increase.
        seed: keys the offset of each division.
    """

    def __init__(self, segments: Sequence[tuple[int, Sequence[float]]], seed: int) -> None:
        self._starts = np.array([start for start, _ in segments])
        self._dealers = [Dealer(weights, "mixture2", seed, number) for number, (_, weights) in enumerate(segments)]
        self._before = [np.zeros(len(segments[0][1]), np.int64)]  # sequences of each corpus dealt before each segment
        for number, length in enumerate(np.diff(self._starts).tolist()):
            self._before.append(self._before[-1] + self._dealers[number].counts(length))

    def locate(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the corpus of each of the positions (n,), and its index among all sequences of that corpus."""
        segments = np.searchsorted(self._starts, positions, side="right") - 1
        corpora, indices = np.empty_like(positions), np.empty_like(positions)
        for segment in np.unique(segments).tolist():
            own = segments == segment
            corpora[own], index = self._dealers[segment].locate(positions[own] - self._starts[segment])
            indices[own] = index + self._before[segment][corpora[own]]
        return corpora, indices

    def counts(self, position: int) -> np.ndarray:
        """Return (corpora,) int64: the sequences drawn from each corpus before a position."""
        segment = int(np.searchsorted(self._starts, position, side="right")) - 1
        return self._before[segment] + self._dealers[segment].counts(position - int(self._starts[segment]))
