"""Which corpus each position of a mixed order draws from, and which of that corpus's sequences: by arithmetic alone.

Shares are kept by error diffusion: after any number of positions, what a corpus has been given differs from its
weight's share by a few positions, however small the weight and however long the run. Of two corpora the first has been
given ``floor(m p + phase)`` of the first m positions, p being its share; of more, a balanced tree of such divisions
decides. So the corpus of a position, and how many positions a corpus was given before it, are found without looking at
any other position. Weights may change at given positions: a segment begins there, with its own divisions.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction
from typing import NamedTuple

import numpy as np

from bst_base.errors import UserError
from data_pipeline.serve.order.permutation import key_words

_FINEST = 1 << 30  # units in which weights of many digits are rounded: products of two fit into 64 bits


def whole_weights(weights: Sequence[float]) -> list[int]:
    """Weights as whole numbers in the same proportion, without a common divisor: 7 and 3 are 0.7 and 0.3.

    They count as the decimal numbers they are written as. Raises UserError for one that is positive but less than a
    billionth of the sum.
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
    """A place of the tree: of every `total` positions that come here, `left` go to the corpora on the left."""

    left: int
    total: int
    phase: int  # in range(total): where in the first `total` positions the division begins
    sides: tuple[_Division | int, _Division | int]  # what stands on each side: another division, or a corpus

    def left_of(self, m: np.ndarray) -> np.ndarray:
        """How many of the first `m` positions go to the left."""
        whole, rest = np.divmod(m, self.total)
        return whole * self.left + (rest * self.left + self.phase) // self.total


class Dealer:
    """Positions 0, 1, 2, … dealt to corpora in proportion to their weights.

    Args:
        weights: of each corpus; those of weight 0 have no part in it, so that adding one changes nothing.
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
        """(corpus, how many earlier positions it was given) of each position (n,) int64."""
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
        """(corpora,) int64: how many of the first `positions` each corpus is given."""
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
    """Positions of an order dealt to corpora, through every change of weights.

    Args:
        segments: (first position, weights) pairs; the first begins at 0 and the starts increase.
        seed: keys where in each division the order begins.
    """

    def __init__(self, segments: Sequence[tuple[int, Sequence[float]]], seed: int) -> None:
        self._starts = np.array([start for start, _ in segments])
        self._dealers = [Dealer(weights, "mixture2", seed, number) for number, (_, weights) in enumerate(segments)]
        self._before = [np.zeros(len(segments[0][1]), np.int64)]  # sequences of each corpus dealt before each segment
        for number, length in enumerate(np.diff(self._starts).tolist()):
            self._before.append(self._before[-1] + self._dealers[number].counts(length))

    def locate(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """For positions (n,): the corpus of each, and the index among all sequences drawn from it."""
        segments = np.searchsorted(self._starts, positions, side="right") - 1
        corpora, indices = np.empty_like(positions), np.empty_like(positions)
        for segment in np.unique(segments).tolist():
            own = segments == segment
            corpora[own], index = self._dealers[segment].locate(positions[own] - self._starts[segment])
            indices[own] = index + self._before[segment][corpora[own]]
        return corpora, indices

    def counts(self, position: int) -> np.ndarray:
        """(corpora,) int64: sequences drawn from each corpus before a position."""
        segment = int(np.searchsorted(self._starts, position, side="right")) - 1
        return self._before[segment] + self._dealers[segment].counts(position - int(self._starts[segment]))
