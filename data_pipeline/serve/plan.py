"""Which sequence each row of each step reads: a pure function of the corpora's sizes, the weights, the seed, the step.

A *sequence* is a number in ``range(N)`` of one pass (*epoch*) over one corpus; `stream.TokenStream` says which tokens
it holds. Rows are global, 0 to G-1: how many ranks share them is of no concern here, which is what makes a run elastic.

*Shuffled*: the rows of all steps form one line of positions, ``step * G + row``. The mixture deals positions to
corpora; the i-th one of a corpus reads sequence ``i mod N``, permuted, of pass ``i div N``. A step may straddle passes.

*Streaming*: a row goes through neighbouring sequences step after step, so what a model carried over from the last
sequence is the true past of the next. Rows are dealt to corpora; the rows of one corpus divide each pass evenly.
"""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple, Protocol

import numpy as np

from bst_base.errors import UserError
from data_pipeline.serve.mixture import Mixture, require_seats
from data_pipeline.serve.order import Permutation

Segments = Sequence[tuple[int, Sequence[float]]]  # (first step, weights of the corpora from there on)
_BLOCK = 1024  # neighbouring positions are permuted together: one call to numpy for many


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


class Shuffled:
    """Every sequence of a pass once, in permuted order.

    Args:
        sequences: N of each corpus.
        segments: weights of the corpora, and the steps where they change.
        rows: G, sequences in a step.
        seed: keys the permutations and the mixture.
    """

    def __init__(self, sequences: Sequence[int], segments: Segments, rows: int, seed: int) -> None:
        self._sequences = np.array(sequences)
        self._rows = rows
        self._seed = seed
        self._mixture = Mixture([(step * rows, weights) for step, weights in segments], seed)
        self._block = lru_cache(maxsize=64)(self._permuted)

    def assign(self, steps: range, rows: range) -> Assignments:
        """See `Plan`."""
        positions = (np.array(steps)[:, None] * self._rows + np.array(rows)).reshape(-1)
        corpus, index = self._mixture.locate(positions)
        epoch, place = np.divmod(index, self._sequences[corpus])
        block, inside = np.divmod(place, _BLOCK)
        sequence = np.empty_like(place)
        for key in set(zip(corpus.tolist(), epoch.tolist(), block.tolist(), strict=True)):
            own = (corpus == key[0]) & (epoch == key[1]) & (block == key[2])
            sequence[own] = self._block(*key)[inside[own]]
        return Assignments(corpus, epoch, sequence, np.zeros(len(place), bool))

    def _permuted(self, corpus: int, epoch: int, block: int) -> np.ndarray:
        count = int(self._sequences[corpus])
        permutation = Permutation(count, "sequences", self._seed, corpus, epoch)
        return permutation(np.arange(block * _BLOCK, min((block + 1) * _BLOCK, count))).astype(np.int64)


class Streaming:
    """Every row reads on where it stopped.

    Where the weights change, the rows are dealt anew: each corpus's rows divide what is left of its unfinished passes
    before they begin a new one, so nothing is skipped or repeated; `Assignments.continues` is false at those cuts.

    Args: as for `Shuffled`; nothing is permuted here, for the documents of each pass already are.
    """

    def __init__(self, sequences: Sequence[int], segments: Segments, rows: int) -> None:
        self._steps = [step for step, _ in segments]
        self._lanes: list[list[Lanes]] = []  # by segment, by corpus
        self._lane_of: list[list[tuple[int, int]]] = []  # by segment, by row: (corpus, lane)
        backlogs = [Backlog.none() for _ in sequences]
        for number, (step, weights) in enumerate(segments):
            shares = require_seats(weights, rows, "rows of a streaming step")
            lanes = [Lanes(*each) for each in zip(shares, sequences, backlogs, strict=True)]
            self._lanes.append(lanes)
            self._lane_of.append([(c, lane) for c, share in enumerate(shares) for lane in range(share)])
            if number + 1 < len(segments):
                backlogs = [each.left_over(self._steps[number + 1] - step) for each in lanes]

    def assign(self, steps: range, rows: range) -> Assignments:
        """See `Plan`."""
        found = []
        for step in steps:
            segment = bisect.bisect_right(self._steps, step) - 1
            for corpus, lane in self._lane_of[segment][rows.start : rows.stop]:
                found.append((corpus, *self._lanes[segment][corpus].locate(lane, step - self._steps[segment])))
        return Assignments(*(np.array(column) for column in zip(*found, strict=True)))


@dataclass(frozen=True)
class Backlog:
    """What earlier segments have left of a corpus: runs of sequences of begun passes, and the next pass to begin."""

    epoch: np.ndarray  # (k,) of each run
    first: np.ndarray  # (k,) its first sequence
    count: np.ndarray  # (k,) its sequences, at least 1
    next_epoch: int

    @classmethod
    def none(cls) -> Backlog:
        """Nothing read yet."""
        empty = np.empty(0, np.int64)
        return cls(empty, empty, empty, 0)


class Lanes:
    """The rows that read one corpus during one segment: first their shares of a backlog, then pass after pass.

    Lane j of R reads sequences ``[(j+e) N div R - d, (j+e+1) N div R - d)`` of the e-th pass, d being ``e N div R``:
    an even division that shifts from pass to pass, so that lanes never get more than a step apart.
    """

    def __init__(self, lanes: int, sequences: int, backlog: Backlog) -> None:
        if lanes > sequences:
            raise UserError(
                f"streaming mode: {lanes} rows would divide {sequences} sequences: every row needs one of its own; "
                "take fewer rows or shorter sequences, prepare more text, or use shuffled mode"
            )
        self._count = lanes
        self._sequences = sequences
        self._backlog = backlog
        self._ends = np.cumsum(backlog.count)
        total = int(backlog.count.sum())
        self._shares = [lane * total // lanes for lane in range(lanes + 1)] if lanes else [0]

    def locate(self, lane: int, steps: int) -> tuple[int, int, bool]:
        """(epoch, sequence, whether it continues the lane's last) for a lane, `steps` after the segment's begin."""
        begin, stop = self._shares[lane : lane + 2]
        if steps < stop - begin:
            run = int(np.searchsorted(self._ends, begin + steps, side="right"))
            inside = int(begin + steps - self._ends[run] + self._backlog.count[run])
            epoch, first = int(self._backlog.epoch[run]), int(self._backlog.first[run])
            return epoch, first + inside, steps > 0 and inside > 0
        passes, first, inside, _ = self._in_pass(lane, steps - (stop - begin))
        return self._backlog.next_epoch + passes, first + inside, inside > 0

    def left_over(self, steps: int) -> Backlog:
        """What is unread of all begun passes after `steps`."""
        if not self._count:
            return self._backlog
        runs: list[tuple[int, int, int]] = []
        unread: dict[int, list[tuple[int, int]]] = {}  # by pass: (first sequence, count)
        fresh = [max(0, steps - (self._shares[lane + 1] - self._shares[lane])) for lane in range(self._count)]
        begun = max(self._in_pass(lane, own - 1)[0] + 1 if own else 0 for lane, own in enumerate(fresh))
        for lane, own in enumerate(fresh):
            begin, stop = self._shares[lane : lane + 2]
            runs += self._backlog_between(min(begin + steps, stop), stop)
            while (at := self._in_pass(lane, own))[0] < begun:
                passes, first, inside, size = at
                unread.setdefault(passes, []).append((first + inside, size - inside))
                own += size - inside
        for passes, parts in sorted(unread.items()):
            runs += [(self._backlog.next_epoch + passes, first, count) for first, count in parts]
        columns = np.array(_merged(runs), np.int64).reshape(-1, 3).T
        return Backlog(*columns, next_epoch=self._backlog.next_epoch + begun)

    def _in_pass(self, lane: int, steps: int) -> tuple[int, int, int, int]:
        """Where a lane is `steps` into its fresh passes: (pass, its first sequence there, steps inside, sequences)."""
        n, lanes = self._sequences, self._count
        place = lane * n // lanes + steps
        part = ((place + 1) * lanes - 1) // n  # the last whose begin, part n div lanes, is not after `place`
        passes, begin = part - lane, part * n // lanes
        return passes, begin - passes * n // lanes, place - begin, (part + 1) * n // lanes - begin

    def _backlog_between(self, begin: int, stop: int) -> list[tuple[int, int, int]]:
        """The runs of the backlog's places ``begin..stop``, as (epoch, first sequence, count)."""
        runs = []
        while begin < stop:
            run = int(np.searchsorted(self._ends, begin, side="right"))
            count = min(stop, int(self._ends[run])) - begin
            inside = begin - int(self._ends[run] - self._backlog.count[run])
            runs.append((int(self._backlog.epoch[run]), int(self._backlog.first[run]) + inside, count))
            begin += count
        return runs


def _merged(runs: list[tuple[int, int, int]]) -> list[tuple[int, int, int]]:
    """The same sequences in the same order, with runs that continue each other made one."""
    merged: list[tuple[int, int, int]] = []
    for epoch, first, count in runs:
        if merged and merged[-1][0] == epoch and sum(merged[-1][1:]) == first:
            merged[-1] = (epoch, merged[-1][1], merged[-1][2] + count)
        else:
            merged.append((epoch, first, count))
    return merged
