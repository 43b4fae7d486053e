"""Phases of a run in which sequences have one length each: where every corpus is when the length changes.

A phase reads the stream of each corpus from where the one before it stopped, and cuts it into its own length from
there on. So no token is read twice and none is left out, whatever the two lengths are. That needs a phase to end with
everything read before a place of the stream, and nothing after it: how many sequences it reads is known from the plan
of the run, and the shuffled order of its last window is one of these sequences alone.

What is shuffled together, and begun, is fixed: a change that would lay it out otherwise is refused (`Phase.begun`).
"""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import NamedTuple, Protocol

import numpy as np

from bst_base.errors import UserError
from data_pipeline.serve.order.plan import Assignments, Plan

_FOREVER = 1 << 40  # as many steps as a run may have


class Place(NamedTuple):
    """Where reading a corpus goes on."""

    epoch: int
    position: int
    """In the stream of the pass."""


@dataclass(frozen=True)
class Cuts:
    """How the corpora are cut in a phase.

    The sequences of the pass that is begun are numbered as if the ones before it had this length too: they end with the
    last of the pass, and begin with the first that is left.
    """

    length: int
    inputs: np.ndarray  # (corpora,) int64: positions of a pass that are an input
    begins: tuple[Place, ...]  # of each corpus

    @property
    def sequences(self) -> np.ndarray:
        """(corpora,) int64: of a whole pass; the last one may be padded."""
        return -(-self.inputs // self.length)

    @property
    def skipped(self) -> np.ndarray:
        """(corpora,) int64: numbers of the pass that is begun which no sequence has, the first ones."""
        places = np.array([place.position for place in self.begins], np.int64)
        return self.sequences - -(-(self.inputs - places) // self.length)

    @property
    def offsets(self) -> np.ndarray:
        """(corpora,) int64: the number of the first sequence, counted from the beginning of the first pass."""
        return np.array([place.epoch for place in self.begins], np.int64) * self.sequences + self.skipped

    def base(self, corpus: int, epoch: int) -> int:
        """The stream position of sequence 0 of a pass, which may lie before its beginning."""
        begin = self.begins[corpus]
        return begin.position - int(self.skipped[corpus]) * self.length if epoch == begin.epoch else 0

    def number(self, corpus: int, count: int) -> tuple[int, int]:
        """The pass and the number of the next sequence, after so many of the phase."""
        return divmod(int(self.offsets[corpus]) + count, int(self.sequences[corpus]))

    def place(self, corpus: int, count: int) -> Place:
        """Where a corpus is after so many sequences of the phase."""
        epoch, sequence = self.number(corpus, count)
        return Place(epoch, sequence * self.length + self.base(corpus, epoch))


@dataclass(frozen=True)
class Phase:
    """Steps of one length."""

    start: int
    cuts: Cuts
    before: np.ndarray  # (corpora,) int64: sequences of each corpus, of whatever length, read before it
    plan: PhasePlan

    def places(self, step: int) -> list[Place]:
        """Where each corpus is before a step."""
        counts = self.plan.consumed(step) - self.before
        return [self.cuts.place(corpus, int(count)) for corpus, count in enumerate(counts)]


class PhasePlan(Plan, Protocol):
    """What deals the sequences of a phase to rows."""

    streams: bool
    """Whether rows read on where they stopped."""

    def begun(self, step: int) -> list[list[int] | None]:
        """What is laid out and partly read before a step, of each corpus or of all rows; None where nothing is."""


class Phases:
    """All phases of a run; a `Plan`, for steps that lie in one phase together."""

    def __init__(self, phases: Sequence[Phase]) -> None:
        self._phases, self._starts = phases, [phase.start for phase in phases]

    def assign(self, steps: range, rows: range) -> Assignments:
        """See `Plan`."""
        return self.at(steps.start).plan.assign(steps, rows)

    def consumed(self, step: int) -> np.ndarray:
        """See `Plan`; sequences of whatever length."""
        return self.at(step).plan.consumed(step)

    def at(self, step: int) -> Phase:
        """The phase of a step."""
        return self._phases[bisect.bisect_right(self._starts, step) - 1]

    def passes(self, step: int) -> list[float]:
        """Passes over each corpus that are made before a step."""
        phase = self.at(step)
        numbers = phase.cuts.offsets + phase.plan.consumed(step) - phase.before
        return [int(number) / int(count) for number, count in zip(numbers, phase.cuts.sequences, strict=True)]

    def fit(self, corpus: int, epoch: int, begin: int) -> tuple[int, int]:
        """For a window that begins at a position of a pass: the length of the sequences that its documents are fitted
        into, which is that of the phase that reads its first token, and what is left there of the one before."""
        window = (epoch, begin)
        cuts = self._phases[0].cuts
        for phase in self._phases[1:]:
            place = phase.cuts.begins[corpus]
            if place < window or (not begin and place == window):
                cuts = phase.cuts
        return cuts.length, cuts.length - (begin - cuts.base(corpus, epoch)) % cuts.length

    def require_laid_out(self, before: Phases, begun: Sequence[list[int] | None] | None, step: int) -> None:
        """Raise UserError unless what is begun before a step stays as it is; `before`: the order up to there, in which
        the length changes no more, `begun`: what a checkpoint says of it."""
        theirs = before.at(step).plan.begun(step) if begun is None else begun
        if all(a == b for a, b in zip_longest(self.at(step).plan.begun(step), theirs)):
            return
        raise UserError(
            f"train.length_changes: at step {step} a shuffle window is partly read, and it cannot be cut differently "
            "without repeating or losing tokens: keep the planned lengths, batch and weights up to its end; "
            f"{_first_legal(before.at(step), theirs, step)}, or start a new run from the weights (initial_weights.run)"
        )


def _first_legal(phase: Phase, begun: Sequence[list[int] | None], step: int) -> str:
    """The first step at which all that is begun has been read, or what must be for there to be one."""
    low, high = step, _FOREVER
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if all(_done(phase, begun, middle)) else (middle + 1, high)
    if low < _FOREVER:
        return f"let the length change at a step from {low} on"
    left = [str(number) for number, done in enumerate(_done(phase, begun, low), 1) if not done]
    return (
        f"no step can change the length while corpus {', '.join(left)} of data.corpus has no weight and a partly read "
        "window: give it a weight again (data.weight_changes)"
    )


def _done(phase: Phase, begun: Sequence[list[int] | None], step: int) -> list[bool]:
    """Of each that is begun, whether it has been read before a step."""
    if phase.plan.streams:
        return [each is None or step >= sum(each) for each in begun]
    return [each is None or place >= tuple(each)
            for place, each in zip(phase.places(step), begun, strict=False)]  # fmt: skip
