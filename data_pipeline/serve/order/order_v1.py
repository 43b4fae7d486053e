"""Version 1 of the order, kept for runs that began with it: which corpus a position or a row reads from.

Positions are dealt in blocks of 1024, and the rows of streaming mode once for each set of weights, both by largest
remainder (Hamilton's method). Every block is rounded in the same way, so small shares stay wrong for the whole run
(0.0015 becomes 0.00195). Version 2 fixes that. Nothing here may change, so that those runs can be resumed.
"""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache

import numpy as np

from bst_base.errors import UserError
from data_pipeline.serve.order.permutation import key_words
from data_pipeline.serve.order.plan import Assignments, Segments

BLOCK = 1024  # number of positions in which every corpus gets exactly its quota


def quotas(weights: Sequence[float], seats: int) -> list[int]:
    """Divide `seats` in proportion to `weights` by largest remainder.

    Ties go to the earlier corpus; the sum is `seats`. Weights count as the decimal numbers they are written as, so the
    division is exact on every machine.
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
    """Return `quotas`. Raises UserError when a positive weight gets no seat."""
    seated = quotas(weights, seats)
    for number, (weight, seat) in enumerate(zip(weights, seated, strict=True)):
        if weight > 0 and seat == 0:
            raise UserError(
                f"mixture weights {list(weights)}: the weight of corpus {number} ({weight:g}) is too small for any of "
                f"{seats} {what}; raise it, or set it to 0"
            )
    return seated


class QuotaMixture:
    """Deals the positions 0, 1, 2, … of an order to corpora.

    Args:
        segments: (first position, weights) pairs. The first begins at 0 and the starts increase.
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
        """Return the corpus of each increasing position (n,), and its index among all sequences of that corpus."""
        segments = np.searchsorted(self._starts, positions, side="right") - 1
        blocks, places = np.divmod(positions - self._starts[segments], BLOCK)
        corpora, indices = np.empty_like(positions), np.empty_like(positions)
        begin = 0
        for end in [*(np.flatnonzero(np.diff(blocks) | np.diff(segments)) + 1).tolist(), len(positions)]:
            segment = int(segments[begin])
            block = int(blocks[begin])
            place = places[begin:end]
            corpus, rank = self._dealt(segment, block)
            base = self._before[segment] + block * self._quotas[segment]
            corpora[begin:end] = corpus[place]
            indices[begin:end] = base[corpus[place]] + rank[place]
            begin = end
        return corpora, indices

    def counts(self, position: int) -> np.ndarray:
        """Return (corpora,) int64: the sequences drawn from each corpus before a position."""
        segment = int(np.searchsorted(self._starts, position, side="right")) - 1
        whole, rest = divmod(position - int(self._starts[segment]), BLOCK)
        used = self._before[segment] + whole * self._quotas[segment]
        return used + np.bincount(self._dealt(segment, whole)[0][:rest], minlength=len(used))

    def _deal(self, segment: int, block: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the corpora (1024,) of one block, and for each place how many earlier places have the same corpus."""
        quota = self._quotas[segment]
        # Raw Philox words never change; Generator.permutation may change between numpy versions.
        words = np.random.Philox(key=key_words("mixture", self._seed, segment, count=2), counter=[0, block, 0, 0])
        corpora = np.repeat(np.arange(len(quota)), quota)[np.argsort(words.random_raw(BLOCK), kind="stable")]
        ranks = np.empty(BLOCK, np.int64)
        ranks[np.argsort(corpora, kind="stable")] = np.arange(BLOCK) - np.repeat(np.cumsum(quota) - quota, quota)
        return corpora, ranks


class LaneStreaming:
    """Every row continues where it stopped.

    Where the weights change, the rows are dealt anew. The rows of a corpus first divide the unread rest of its begun
    passes, then begin a new pass. So nothing is skipped or repeated. `Assignments.continues` is false where a row is
    cut like that.

    Args: as for `plan.Streaming`. Sequences are not permuted, since the documents of each pass already are.
    """

    def __init__(self, sequences: Sequence[int], segments: Segments, rows: int) -> None:
        self._steps = [step for step, _ in segments]
        self._shares: list[list[int]] = []
        self._lanes: list[list[Lanes]] = []  # by segment, by corpus
        self._lane_of: list[list[tuple[int, int]]] = []  # by segment, by row: (corpus, lane)
        backlogs = [Backlog.none() for _ in sequences]
        for number, (step, weights) in enumerate(segments):
            shares = require_seats(weights, rows, "rows of a streaming step")
            self._shares.append(shares)
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

    def consumed(self, step: int) -> np.ndarray:
        """See `Plan`."""
        read = np.zeros(len(self._shares[0]), np.int64)
        for number, (start, shares) in enumerate(zip(self._steps, self._shares, strict=True)):
            end = self._steps[number + 1] if number + 1 < len(self._steps) else step
            read += max(0, min(end, step) - start) * np.array(shares)
        return read


@dataclass(frozen=True)
class Backlog:
    """The unread rest of a corpus from earlier segments: runs of sequences of begun passes, and the next pass."""

    epoch: np.ndarray  # (k,) the pass of each run
    first: np.ndarray  # (k,) the first sequence of each run
    count: np.ndarray  # (k,) the number of sequences of each run, at least 1
    next_epoch: int

    @classmethod
    def none(cls) -> Backlog:
        """Return the backlog of a corpus that nothing has been read from."""
        empty = np.empty(0, np.int64)
        return cls(empty, empty, empty, 0)


class Lanes:
    """The rows (*lanes*) that read one corpus during one segment: first shares of a backlog, then pass after pass.

    Lane j of R reads sequences ``[(j+e) N div R - d, (j+e+1) N div R - d)`` of the e-th pass, with d = ``e N div R``.
    It is an even division that shifts from pass to pass, so that lanes are never more than one step apart.
    """

    def __init__(self, lanes: int, sequences: int, backlog: Backlog) -> None:
        if lanes > sequences:
            raise UserError(
                f"streaming mode: {lanes} rows, but only {sequences} sequences: every row needs at least one; use "
                "fewer rows or shorter sequences, prepare more text, or use shuffled mode"
            )
        self._count = lanes
        self._sequences = sequences
        self._backlog = backlog
        self._ends = np.cumsum(backlog.count)
        total = int(backlog.count.sum())
        self._shares = [lane * total // lanes for lane in range(lanes + 1)] if lanes else [0]

    def locate(self, lane: int, steps: int) -> tuple[int, int, bool]:
        """Return (epoch, sequence, whether it continues the lane's last one), `steps` after the segment's start."""
        begin, stop = self._shares[lane : lane + 2]
        if steps < stop - begin:
            run = int(np.searchsorted(self._ends, begin + steps, side="right"))
            inside = int(begin + steps - self._ends[run] + self._backlog.count[run])
            epoch, first = int(self._backlog.epoch[run]), int(self._backlog.first[run])
            return epoch, first + inside, steps > 0 and inside > 0
        passes, first, inside, _ = self._in_pass(lane, steps - (stop - begin))
        return self._backlog.next_epoch + passes, first + inside, inside > 0

    def left_over(self, steps: int) -> Backlog:
        """Return the unread rest of all begun passes after `steps`."""
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
        """Return where a lane is after `steps` in its new passes: (pass, first sequence there, steps inside,
        sequences)."""
        n, lanes = self._sequences, self._count
        place = lane * n // lanes + steps
        part = ((place + 1) * lanes - 1) // n  # the last part that starts, at part * n // lanes, not after `place`
        passes, begin = part - lane, part * n // lanes
        return passes, begin - passes * n // lanes, place - begin, (part + 1) * n // lanes - begin

    def _backlog_between(self, begin: int, stop: int) -> list[tuple[int, int, int]]:
        """Return the runs of the backlog's places ``begin..stop``, as (epoch, first sequence, count)."""
        runs = []
        while begin < stop:
            run = int(np.searchsorted(self._ends, begin, side="right"))
            count = min(stop, int(self._ends[run])) - begin
            inside = begin - int(self._ends[run] - self._backlog.count[run])
            runs.append((int(self._backlog.epoch[run]), int(self._backlog.first[run]) + inside, count))
            begin += count
        return runs


def _merged(runs: list[tuple[int, int, int]]) -> list[tuple[int, int, int]]:
    """Return the same sequences in the same order, with adjacent runs merged."""
    merged: list[tuple[int, int, int]] = []
    for epoch, first, count in runs:
        if merged and merged[-1][0] == epoch and sum(merged[-1][1:]) == first:
            merged[-1] = (epoch, merged[-1][1], merged[-1][2] + count)
        else:
            merged.append((epoch, first, count))
    return merged
