"""Which sequence each row of each step reads: a pure function of the corpora's sizes, the weights, the seed, the step.

A *sequence* is a number in ``range(N)`` of one pass (*epoch*) over one corpus; `stream.TokenStream` says which tokens
it holds. Rows are global, 0 to G-1: how many ranks share them is of no concern here, which is what makes a run elastic.

*Shuffled*: the rows of all steps form one line of positions, ``step * G + row`` (`sizes`, where G has changed). The
mixture deals positions to corpora; the i-th one of a corpus reads sequence ``i mod N``, permuted, of pass ``i div N``.
A step may straddle passes.
Version 2 permutes over the whole pass, version 3 within its windows (`windows`).

*Streaming*: a row goes through neighbouring sequences step after step, so what a model carried over from the last
sequence is the true past of the next. It does so for a *stretch* of steps; then the rows are dealt to the corpora anew,
which keeps the shares of a mixture that no division of G rows could keep.
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
"""The order that new runs get; a run keeps the one it began with (`orders.make_order`)."""

Segments = Sequence[tuple[int, Sequence[float]]]  # (first step, weights of the corpora from there on)
_BLOCK = 1024  # neighbouring positions are permuted together: one call to numpy for many
_STRETCH = 256  # steps that a row stays with its corpus: the carried state is dropped once in so many


class Assignments(NamedTuple):
    """What some rows of some steps read: step by step, within a step row by row."""

    corpus: np.ndarray  # (n,) int64
    epoch: np.ndarray  # (n,) int64
    sequence: np.ndarray  # (n,) int64, in range(N)
    continues: np.ndarray  # (n,) bool: the first token follows the last one the row was fed the step before


class Plan(Protocol):
    """A way to deal sequences to rows."""

    def assign(self, steps: range, rows: range) -> Assignments:
        """What these global rows read in these steps, both consecutive."""

    def consumed(self, step: int) -> np.ndarray:
        """(corpora,) int64: sequences of each corpus that are read before a step."""


class Positions(Protocol):
    """A mixture: what deals the positions of the shuffled order to corpora."""

    def locate(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """For increasing positions (n,): the corpus of each, and the index among all sequences drawn from it."""

    def counts(self, position: int) -> np.ndarray:
        """(corpora,) int64: sequences drawn from each corpus before a position."""


class Shuffled:
    """Every sequence of a pass once, in permuted order.

    Args:
        sequences: N of each corpus.
        mixture: deals positions to corpora.
        sizes: G, sequences in each step.
        seed: keys the permutations.
    """

    def __init__(self, sequences: Sequence[int], mixture: Positions, sizes: BatchSizes, seed: int) -> None:
        self._sequences = np.array(sequences)
        self._shift = np.zeros_like(self._sequences)  # from what the mixture counts to numbers of sequences
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
        """The places of a pass that are read: from the first, up to the second."""
        return 0, int(self._sequences[corpus])

    def _permuted(self, corpus: int, epoch: int, places: np.ndarray) -> np.ndarray:
        """The sequences (n,) int64 that are read at these places (n,) int64 of a pass, in increasing order."""
        permutation = Permutation(int(self._sequences[corpus]), "sequences", self._seed, corpus, epoch)
        return permutation(places).astype(np.int64)


class Part(NamedTuple):
    """Steps in which sequences have one length (`phases`)."""

    number: int
    start: int
    until: int | None
    before: np.ndarray  # (corpora,) sequences of each corpus, of whatever length, read before it
    shift: np.ndarray  # (corpora,) from the count of those read to the number of the next

    @classmethod
    def whole(cls, corpora: int) -> Part:
        """All steps."""
        return cls(0, 0, None, np.zeros(corpora, np.int64), np.zeros(corpora, np.int64))

    @property
    def key(self) -> tuple[int, ...]:
        """What later parts add to a key."""
        return (self.number,) if self.number else ()

    def own(self, segments: Segments) -> Segments:
        """The weights it begins with, and their changes in it."""
        first = [weights for step, weights in segments if step <= self.start][-1]
        last = self.until if self.until is not None else math.inf
        return [(self.start, first), *(each for each in segments if self.start < each[0] < last)]


@dataclass(frozen=True)
class _Segment:
    """Steps between two changes of the weights: whole stretches of `stretch` steps."""

    start: int  # first step
    stretch: int
    dealer: Dealer  # of the rows of the stretches, one after the other
    before: np.ndarray  # (corpora,) sequences read of each corpus before the segment
    until: int | None = None  # where the length changes: the last stretch ends there

    def end(self, asked: int) -> int:
        """The first end of a stretch that is not before a step; the segment's start, if that is later already."""
        return self.start + max(0, -(-(asked - self.start) // self.stretch)) * self.stretch

    def size(self, number: int) -> int:
        """Steps of a stretch."""
        rest = self.stretch if self.until is None else self.until - self.start - number * self.stretch
        return min(self.stretch, rest)

    def consumed(self, steps: int, rows: int) -> np.ndarray:
        """(corpora,) sequences read before `steps` steps of the segment were taken."""
        whole, rest = divmod(steps, self.stretch)
        first, last = (self.dealer.counts((whole + more) * rows) for more in (0, 1))
        return self.before + first * self.stretch + (last - first) * rest


class Streaming:
    """Every row reads on where it stopped, for a stretch of steps at a time.

    In a stretch of T steps a row reads T neighbouring sequences of one corpus, its *run*. The runs of a corpus follow
    each other without a gap, through the end of a pass into the next one, so nothing is skipped or repeated. Weights
    change at the end of the stretch that their step lies in.

    Args:
        sequences, rows: as for `Shuffled`.
        segments: weights of the corpora, and the steps where they change.
        seed: keys the dealing of rows to corpora; nothing is permuted here, for the documents of each pass already are.
        part: steps of one length, and what comes before them; None: all steps have the same.
    """

    streams = True

    def __init__(
        self, sequences: Sequence[int], segments: Segments, rows: int, seed: int, part: Part | None = None
    ) -> None:
        part = part or Part.whole(len(sequences))
        self._sequences, self._rows, self._shift = np.array(sequences), rows, part.shift
        self._segments: list[_Segment] = []
        start, before = part.start, part.before
        for number, (asked, weights) in enumerate(part.own(segments)):
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
        full = segment.dealer.counts(number * self._rows)[corpus]  # runs of the stretches before, which are whole
        index = segment.before[corpus] + full * segment.stretch + (run - full) * segment.size(number) + inside
        epoch, sequence = np.divmod(index + self._shift[corpus], self._sequences[corpus])
        return Assignments(corpus, epoch, sequence, (sequence > 0) & (inside > 0))

    def begun(self, step: int) -> list[list[int] | None]:
        """The stretch that is partly read before a step, as its first step and its steps."""
        segment = self._segment(step)
        number, inside = divmod(step - segment.start, segment.stretch)
        return [[segment.start + number * segment.stretch, segment.size(number)] if inside else None]


def _stretch(sequences: Sequence[int], weights: Sequence[float], rows: int) -> int:
    """Steps of a stretch: `_STRETCH`, or so many that the rows of no corpus read more than a pass of it in one."""
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


def dealt(segments: Segments, sizes: BatchSizes, seed: int) -> Mixture:
    """What deals the positions of the shuffled order to corpora, since version 2."""
    return Mixture([(sizes.first(step), weights) for step, weights in segments], seed)


def shuffled(sequences: Sequence[int], segments: Segments, sizes: BatchSizes, seed: int) -> Shuffled:
    """The shuffled order of version 2."""
    return Shuffled(sequences, dealt(segments, sizes, seed), sizes, seed)
