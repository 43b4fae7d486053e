"""Numbers that are constant between some steps of a run: the sequence length, the number of rows."""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol, Self


class Change(Protocol):
    """A setting that holds from a step on."""

    step: int


def require_increasing(field: str, changes: Sequence[Change]) -> None:
    """Raise ValueError, naming the field, unless each change is at a later step than the one before."""
    steps = [change.step for change in changes]
    if steps != sorted(set(steps)):
        raise ValueError(f"{field}: their steps must increase, found {steps}")


@dataclass(frozen=True)
class StepValues:
    """A number for every step of a run, which changes at some steps: L, the sequence length, or G, the
    rows of a step."""

    changes: tuple[tuple[int, int], ...]
    """(first step, value from that step on); the first entry is for step 0."""

    @classmethod
    def of(cls, value: int) -> Self:
        """Return the same value for every step."""
        return cls(((0, value),))

    def then(self, step: int, value: int) -> Self:
        """Return these values with `value` from `step` on. The step must not be before the last change."""
        before = self.changes[:-1] if self.changes[-1][0] == step else self.changes
        if before and before[-1][1] == value:
            return replace(self, changes=before)
        return replace(self, changes=(*before, (step, value)))

    def until(self, step: int) -> Self:
        """Return these values without the changes after a step."""
        return replace(self, changes=tuple(change for change in self.changes if change[0] <= step))

    def planned(self, step: int, plan: Self) -> Self:
        """Return these values up to a step, and those of `plan` from there on.

        The step must not be before the last change.
        """
        values = self.then(step, plan.at(step))
        for start, value in plan.changes:
            values = values.then(start, value) if start > step else values
        return values

    def at(self, step: int) -> int:
        """Return the value of a step."""
        return self.changes[bisect.bisect_right(self.changes, step, key=lambda change: change[0]) - 1][1]

    @property
    def values(self) -> tuple[int, ...]:
        """The value after each change, in order; the first one is that of step 0."""
        return tuple(value for _, value in self.changes)

    @property
    def last(self) -> int:
        """The value from the last change on."""
        return self.changes[-1][1]

    @property
    def since(self) -> int:
        """The step of the last change; 0 if there was none."""
        return self.changes[-1][0]
