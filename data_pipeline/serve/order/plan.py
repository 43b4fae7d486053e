"""Which sequence each row of each step reads: a pure function of the corpora's sizes, the weights, the seed, the step.

A *sequence* is a number in ``range(N)`` of one pass (*epoch*) over one corpus. `stream.TokenStream` knows its tokens.
Rows are numbered globally, 0 to G-1. The order does not depend on how many ranks share them, so the number of ranks may
change during a run.

*Shuffled*: the rows of all steps form one series of positions, ``step * G + row`` (`sizes`, if G changes). The mixture
deals positions to corpora. The i-th position of a corpus reads sequence ``i mod N``, permuted, of pass ``i div N``. So
a step may lie in two passes. Version 2 permutes over the whole pass, version 3 within its windows (`windows`).

*Streaming*: a row reads consecutive sequences step after step, so the state that a model carries over from the last
sequence is the true past of the next one. It does so for a *stretch* of steps. Then the rows are dealt to the corpora
anew: this keeps mixture shares that no fixed division of G rows could give.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import NamedTuple, Protocol

import numpy as np

from bst_base.errors import UserError
from data_pipeline.serve.order.mixture import Dealer, Mixture, whole_weights
from data_pipeline.serve.order.permutation import Permutation
from data_pipeline.serve.order.sizes import BatchSizes

ORDER_VERSION = 3
"""The order of new runs. A run keeps the version it began with (`versions.make_order`)."""

Segments = Sequence[tuple[int, Sequence[float]]]  # (first step, weights of the corpora from there on)
_BLOCK = 1024  # so many neighbouring positions are permuted with one call to numpy
_STRETCH = 256  # steps that a row stays with its corpus; the carried state is dropped after each stretch


class Assignments(NamedTuple):
    """What some rows of some steps read, ordered by step, then by row."""

    corpus: np.ndarray  # (n,) int64
    epoch: np.ndarray  # (n,) int64
    sequence: np.ndarray  # (n,) int64, in range(N)
    continues: np.ndarray  # (n,) bool: the first token follows the last token of the row in the step before


class Plan(Protocol):
    """Deals sequences to rows."""

    def assign(self, steps: range, rows: range) -> Assignments:
        """Return what these global rows read in these steps. Both ranges are consecutive."""

    def consumed(self, step: int) -> np.ndarray:
        """Return (corpora,) int64: the sequences of each corpus that are read before a step."""


class Positions(Protocol):
    """A mixture: deals the positions of the shuffled order to corpora."""

    def locate(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the corpus of each increasing position (n,), and its index among all sequences of that corpus."""

    def counts(self, position: int) -> np.ndarray:
        """Return (corpora,) int64: the sequences drawn from each corpus before a position."""


class Shuffled:
    """Reads every sequence of a pass once, in permuted order.

    Args:
        sequences: N of each corpus.
        mixture: deals positions to corpora.
        sizes: G, the sequences of each step.
        seed: keys the permutations.
    """

    def __init__(self, sequences: Sequence[int], mixture: Positions, sizes: BatchSizes, seed: int) -> None:
        self._sequences = np.array(sequences)
        self._shift = np.zeros_like(self._sequences)  # added to the mixture's index to give the number of a sequence
        self._sizes = sizes
        self._seed = seed
        self._mixture = mixture
        self._block = lru_cache(maxsize=64)(self._permuted_block)

    def assign(self, steps: range, rows: range) -> Assignments:
        """See `Plan`."""
        positions = (self._sizes.firsts(steps)[:, None] + np.array(rows)).reshape(-1)
        corpus, index = self._mixture.locate(positions)
        epoch, place = np.divmod(index + self._shift[corpus], self._sequences[corpus])
        block, inside = np.divmod(place, _BLOCK)
        sequence = np.empty_like(place)
        for key in set(zip(corpus.tolist(), epoch.tolist(), block.tolist(), strict=True)):
            own = (corpus == key[0]) & (epoch == key[1]) & (block == key[2])
            sequence[own] = self._block(*key)[inside[own]]
        return Assignments(corpus, epoch, sequence, np.zeros(len(place), bool))

    def consumed(self, step: int) -> np.ndarray:
        """See `Plan`."""
        return self._mixture.counts(self._sizes.first(step))

    def _permuted_block(self, corpus: int, epoch: int, block: int) -> np.ndarray:
        low, stop = self._range(corpus, epoch)
        places = np.arange(max(block * _BLOCK, low), min((block + 1) * _BLOCK, stop))
        sequences = np.full(_BLOCK, -1, np.int64)
        sequences[places - block * _BLOCK] = self._permuted(corpus, epoch, places)
        return sequences

    def _range(self, corpus: int, epoch: int) -> tuple[int, int]:
        """Return the range (start, stop) of the places of a pass that are read."""
        return 0, int(self._sequences[corpus])

    def _permuted(self, corpus: int, epoch: int, places: np.ndarray) -> np.ndarray:
        """Return the sequences (n,) int64 at these places (n,) int64 of a pass; the places increase."""
        permutation = Permutation(int(self._sequences[corpus]), "sequences", self._seed, corpus, epoch)
        return permutation(places).astype(np.int64)


class Part(NamedTuple):
    """Steps with the same sequence length (`phases`)."""

    number: int
    start: int
    until: int | None
    before: np.ndarray  # (corpora,) sequences of each corpus, of any length, read before this part
    shift: np.ndarray  # (corpora,) added to the count of sequences read to give the number of the next one

    @classmethod
    def whole(cls, corpora: int) -> Part:
        """Return the part with all steps."""
        return cls(0, 0, None, np.zeros(corpora, np.int64), np.zeros(corpora, np.int64))

    @property
    def key(self) -> tuple[int, ...]:
        """The numbers that later parts add to a key; empty for the first part."""
        return (self.number,) if self.number else ()

    def weights_within(self, segments: Segments) -> Segments:
        """Return the weights with which the part begins, and their changes within it."""
        first = [weights for step, weights in segments if step <= self.start][-1]
        last = self.until if self.until is not None else math.inf
        return [(self.start, first), *(each for each in segments if self.start < each[0] < last)]


@dataclass(frozen=True)
class _Segment:
    """The steps between two changes of the weights, in whole stretches of `stretch` steps."""

    start: int  # first step
    stretch: int
    dealer: Dealer  # deals the rows of all stretches, one after the other, to corpora
    before: np.ndarray  # (corpora,) sequences of each corpus read before the segment
    until: int | None = None  # the step at which the length changes; the last stretch ends there

    def end(self, asked: int) -> int:
        """Return the first end of a stretch at or after step `asked`; the segment's start, if that is later."""
        return self.start + max(0, -(-(asked - self.start) // self.stretch)) * self.stretch

    def size(self, number: int) -> int:
        """Return the number of steps of a stretch."""
        rest = self.stretch if self.until is None else self.until - self.start - number * self.stretch
        return min(self.stretch, rest)

    def consumed(self, steps: int, rows: int) -> np.ndarray:
        """Return (corpora,) sequences of each corpus read up to `steps` steps after the segment's start."""
        whole, rest = divmod(steps, self.stretch)
        first, last = (self.dealer.counts((whole + more) * rows) for more in (0, 1))
        return self.before + first * self.stretch + (last - first) * rest


class Streaming:
    """Every row continues where it stopped, for a stretch of steps at a time.

    In a stretch of T steps a row reads T consecutive sequences of one corpus, its *run*. The runs of a corpus follow
    each other without gaps, across the end of a pass into the next one. So nothing is skipped or repeated. A change of
    weights takes effect at the end of the stretch that its step lies in.

    Args:
        sequences, rows: N of each corpus, and G.
        segments: weights of the corpora, and the steps at which they change.
        seed: keys the dealing of rows to corpora. Sequences are not permuted, since the documents of each pass already
            are.
        part: the steps with one length, and the state before them; None: all steps have the same length.
    """

    streams = True

    def __init__(
        self, sequences: Sequence[int], segments: Segments, rows: int, seed: int, part: Part | None = None
    ) -> None:
        part = part or Part.whole(len(sequences))
        self._sequences = np.array(sequences)
        self._rows, self._shift = rows, part.shift
        self._segments: list[_Segment] = []
        start, before = part.start, part.before
        for number, (asked, weights) in enumerate(part.weights_within(segments)):
            if number:
                last = self._segments[-1]
                if part.until is not None and last.end(asked) >= part.until:
                    break
                start = last.end(asked)
                before = last.consumed(start - last.start, rows)
            dealer = Dealer(weights, "streaming2", seed, number, *part.key)
            self._segments.append(_Segment(start, _stretch(sequences, weights, rows), dealer, before))
        self._segments[-1] = replace(self._segments[-1], until=part.until)
        self._starts = [segment.start for segment in self._segments]

    def assign(self, steps: range, rows: range) -> Assignments:
        """See `Plan`."""
        found = [self._assign(step, np.array(rows, np.int64)) for step in steps]
        return Assignments(*(np.concatenate(column) for column in zip(*found, strict=True)))

    def consumed(self, step: int) -> np.ndarray:
        """See `Plan`."""
        segment = self._segment(step)
        return segment.consumed(step - segment.start, self._rows)

    def _segment(self, step: int) -> _Segment:
        return self._segments[bisect.bisect_right(self._starts, step) - 1]

    def _assign(self, step: int, rows: np.ndarray) -> Assignments:
        segment = self._segment(step)
        number, inside = divmod(step - segment.start, segment.stretch)
        corpus, run = segment.dealer.locate(number * self._rows + rows)
        full = segment.dealer.counts(number * self._rows)[corpus]  # runs of earlier stretches, all of full length
        index = segment.before[corpus] + full * segment.stretch + (run - full) * segment.size(number) + inside
        epoch, sequence = np.divmod(index + self._shift[corpus], self._sequences[corpus])
        return Assignments(corpus, epoch, sequence, (sequence > 0) & (inside > 0))

    def begun(self, step: int) -> list[list[int] | None]:
        """Return the stretch that is partly read before a step, as [[first step, number of steps]], else [None]."""
        segment = self._segment(step)
        number, inside = divmod(step - segment.start, segment.stretch)
        return [[segment.start + number * segment.stretch, segment.size(number)] if inside else None]


def _stretch(sequences: Sequence[int], weights: Sequence[float], rows: int) -> int:
    """Return the steps of a stretch: `_STRETCH`, or fewer, so that no corpus is read more than one pass in a stretch.

    Raises UserError when a corpus has fewer sequences than rows that read it.
    """
    whole = whole_weights(weights)
    longest = [_STRETCH]
    for count, units in zip(sequences, whole, strict=True):
        own = math.ceil(rows * units / sum(whole))
        if own > count:
            raise UserError(
                f"streaming mode: {own} rows, but only {count} sequences: every row needs at least one; use fewer "
                "rows or shorter sequences, prepare more text, or use shuffled mode"
            )
        if units:
            longest.append(count // own)
    return min(longest)


def make_mixture(segments: Segments, sizes: BatchSizes, seed: int) -> Mixture:
    """Return the mixture that deals the positions of the shuffled order to corpora, since version 2."""
    return Mixture([(sizes.first(step), weights) for step, weights in segments], seed)


def make_shuffled(sequences: Sequence[int], segments: Segments, sizes: BatchSizes, seed: int) -> Shuffled:
    """Return the shuffled order of version 2."""
    return Shuffled(sequences, make_mixture(segments, sizes, seed), sizes, seed)
