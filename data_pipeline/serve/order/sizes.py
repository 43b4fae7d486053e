"""The rows and the sequence length of each step of a run, and where each step begins in the endless series of rows.

Both may change when a run is resumed, and at planned steps. Earlier steps keep their values, so that no row is read
twice and none is left out. The order stays a pure function of the step and of these changes, which every checkpoint
stores.
"""

from __future__ import annotations

import bisect
from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, Self

import numpy as np

STREAMED = "each streaming row reads its own part of the corpus, so their number cannot change"


@dataclass(frozen=True)
class StepValues:
    """A number for every step of a run, which changes at some steps: L, the sequence length, or G (`BatchSizes`)."""

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
    def last(self) -> int:
        """The value from the last change on."""
        return self.changes[-1][1]

    @property
    def since(self) -> int:
        """The step of the last change; 0 if there was none."""
        return self.changes[-1][0]


class BatchSizes(StepValues):
    """G, the rows of every step."""

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> BatchSizes:
        """Return the sizes that `state` has stored in a checkpoint."""
        return cls(tuple((step, rows) for step, rows in state.get("batches") or [(0, state.get("rows", 0))]))

    def first(self, step: int) -> int:
        """Return the position of a step's first row in the series of all rows."""
        last = bisect.bisect_right(self.changes, step, key=lambda change: change[0])
        ends = [start for start, _ in self.changes[1:last]] + [step]
        return sum((end - start) * rows for (start, rows), end in zip(self.changes[:last], ends, strict=True))

    def firsts(self, steps: range) -> np.ndarray:
        """Return `first` of several steps, int64."""
        number = np.array(steps, np.int64)
        found = number * self.changes[0][1]
        for (_, before), (start, rows) in pairwise(self.changes):
            found += np.maximum(number - start, 0) * (rows - before)
        return found

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint stores."""
        changed = {"batches": [list(change) for change in self.changes]} if len(self.changes) > 1 else {}
        return {"rows": self.last} | changed
