"""Phases of a run, each with one sequence length: how the data order continues when the length changes.

A phase reads the stream of each corpus from where the previous phase stopped, and cuts it into its own length. So no
token is read twice and none is left out, for any two lengths. That requires that a phase ends at one place of each
stream, with everything before it read and nothing after it. So the number of sequences that a phase reads is taken from
the plan of the run, and in its last window only these sequences are shuffled.

A window or stretch that is partly read must stay as it is. A change that would lay it out differently is refused
(`PhasePlan.begun`).
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

_FOREVER = 1 << 40  # maximum number of steps of a run


class Place(NamedTuple):
    """The place where reading a corpus continues."""

    epoch: int
    position: int
    """The position in the stream of the pass."""


@dataclass(frozen=True)
class Cuts:
    """How the corpora are cut into sequences in a phase.

    In the pass where the phase begins, sequences get the numbers that they would have if the whole pass had this
    length, counted from its end. So the last number is that of any pass, and the first ones are not used.
    """

    length: int
    inputs: np.ndarray  # (corpora,) int64: positions of a pass that are inputs
    begins: tuple[Place, ...]  # where the phase begins in each corpus

    @property
    def sequences(self) -> np.ndarray:
        """(corpora,) int64: sequences of a whole pass. The last one may be padded."""
        return -(-self.inputs // self.length)

    @property
    def skipped(self) -> np.ndarray:
        """(corpora,) int64: how many of the first numbers are not used in the pass where the phase begins."""
        places = np.array([place.position for place in self.begins], np.int64)
        return self.sequences - -(-(self.inputs - places) // self.length)

    @property
    def offsets(self) -> np.ndarray:
        """(corpora,) int64: the number of the phase's first sequence, counted from the beginning of the first pass."""
        return np.array([place.epoch for place in self.begins], np.int64) * self.sequences + self.skipped

    def base(self, corpus: int, epoch: int) -> int:
        """Return the stream position of sequence 0 of a pass. It may lie before the beginning of the stream."""
        begin = self.begins[corpus]
        return begin.position - int(self.skipped[corpus]) * self.length if epoch == begin.epoch else 0

    def number(self, corpus: int, count: int) -> tuple[int, int]:
        """Return the pass and the number of the next sequence, after `count` sequences of the phase."""
        return divmod(int(self.offsets[corpus]) + count, int(self.sequences[corpus]))

    def place(self, corpus: int, count: int) -> Place:
        """Return where a corpus is after `count` sequences of the phase."""
        epoch, sequence = self.number(corpus, count)
        return Place(epoch, sequence * self.length + self.base(corpus, epoch))


@dataclass(frozen=True)
class LengthPhase:
    """The steps with one sequence length."""

    start: int
    cuts: Cuts
    before: np.ndarray  # (corpora,) int64: sequences of each corpus, of any length, read before the phase
    plan: PhasePlan

    def places(self, step: int) -> list[Place]:
        """Return where each corpus is before a step."""
        counts = self.plan.consumed(step) - self.before
        return [self.cuts.place(corpus, int(count)) for corpus, count in enumerate(counts)]


class PhasePlan(Plan, Protocol):
    """Deals the sequences of a phase to rows."""

    streams: bool
    """Whether rows continue where they stopped (streaming mode)."""

    def begun(self, step: int) -> list[list[int] | None]:
        """Return what is partly read before a step: a window of each corpus, or the one stretch of all rows.

        An entry is None where nothing is partly read.
        """


class LengthPhases:
    """All phases of a run. It is a `Plan` for steps that lie in one phase."""

    def __init__(self, phases: Sequence[LengthPhase]) -> None:
        self._phases = phases
        self._starts = [phase.start for phase in phases]

    def assign(self, steps: range, rows: range) -> Assignments:
        """See `Plan`."""
        return self.at(steps.start).plan.assign(steps, rows)

    def consumed(self, step: int) -> np.ndarray:
        """See `Plan`; counts sequences of any length."""
        return self.at(step).plan.consumed(step)

    def at(self, step: int) -> LengthPhase:
        """Return the phase of a step."""
        return self._phases[bisect.bisect_right(self._starts, step) - 1]

    def passes(self, step: int) -> list[float]:
        """Return the number of passes over each corpus before a step."""
        phase = self.at(step)
        numbers = phase.cuts.offsets + phase.plan.consumed(step) - phase.before
        return [int(number) / int(count) for number, count in zip(numbers, phase.cuts.sequences, strict=True)]

    def fit(self, corpus: int, epoch: int, begin: int) -> tuple[int, int]:
        """Return the arguments for best fit in a window that begins at a position of a pass.

        They are the length of the sequences, in the phase that reads the window's first token, and the room that is
        left for the window in the sequence in which it begins.
        """
        window = (epoch, begin)
        cuts = self._phases[0].cuts
        for phase in self._phases[1:]:
            place = phase.cuts.begins[corpus]
            if place < window or (not begin and place == window):
                cuts = phase.cuts
        return cuts.length, cuts.length - (begin - cuts.base(corpus, epoch)) % cuts.length

    def require_same_layout(self, before: LengthPhases, begun: Sequence[list[int] | None] | None, step: int) -> None:
        """Raise UserError unless everything that is partly read before a step keeps its layout.

        `before`: the order up to that step, without later changes of the length. `begun`: the partly read windows or
        stretches from the checkpoint; None: they are computed from `before`.
        """
        theirs = before.at(step).plan.begun(step) if begun is None else begun
        if all(a == b for a, b in zip_longest(self.at(step).plan.begun(step), theirs)):
            return
        raise UserError(
            f"train.length_changes: at step {step} a shuffle window is partly read, and it cannot be cut differently "
            "without repeating or losing tokens: keep the planned lengths, batch and weights up to its end; "
            f"{_first_legal(before.at(step), theirs, step)}, or start a new run from the weights (initial_weights.run)"
        )


def _first_legal(phase: LengthPhase, begun: Sequence[list[int] | None], step: int) -> str:
    """Return advice on when the length may change.

    It is the first step at which all that is partly read has been read, or what must change so that there is such a
    step.
    """
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


def _done(phase: LengthPhase, begun: Sequence[list[int] | None], step: int) -> list[bool]:
    """Return, for each partly read window or stretch, whether it has been read completely before a step."""
    if phase.plan.streams:
        return [each is None or step >= sum(each) for each in begun]
    return [each is None or place >= tuple(each) for place, each in zip(phase.places(step), begun, strict=False)]
