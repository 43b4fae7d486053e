"""The rows of each step over a run: where each step begins in the endless series of rows.

The number of rows may change when a run is resumed, and at planned steps. Earlier steps keep their number, so that no
row is read twice and none is left out. The order stays a pure function of the step and of these changes, which every
checkpoint stores.
"""

from __future__ import annotations

import bisect
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

STREAMED = "each streaming row reads its own part of the corpus, so their number cannot change"


@dataclass(frozen=True)
class BatchSizes:
    """G of every step. `Loader` uses the same class for the sequence length of every step."""

    changes: tuple[tuple[int, int], ...]
    """(first step, rows from that step on); the first entry is for step 0."""

    @classmethod
    def of(cls, rows: int) -> BatchSizes:
        """Return the same number of rows for every step."""
        return cls(((0, rows),))

    @classmethod
    def kept(cls, state: Mapping[str, Any]) -> BatchSizes:
        """Return the sizes that `state` has stored in a checkpoint."""
        return cls(tuple((step, rows) for step, rows in state.get("batches") or [(0, state.get("rows", 0))]))

    def then(self, step: int, rows: int) -> BatchSizes:
        """Return these sizes with `rows` from `step` on. The step must not be before the last change."""
        before = self.changes[:-1] if self.changes[-1][0] == step else self.changes
        if before and before[-1][1] == rows:
            return BatchSizes(before)
        return BatchSizes((*before, (step, rows)))

    def until(self, step: int) -> BatchSizes:
        """Return these sizes without the changes after a step."""
        return BatchSizes(tuple(change for change in self.changes if change[0] <= step))

    def planned(self, step: int, plan: BatchSizes) -> BatchSizes:
        """Return these sizes up to a step, and those of `plan` from there on.

        The step must not be before the last change.
        """
        sizes = self.then(step, plan.at(step))
        for start, rows in plan.changes:
            sizes = sizes.then(start, rows) if start > step else sizes
        return sizes

    def at(self, step: int) -> int:
        """Return the rows of a step."""
        return self.changes[bisect.bisect_right(self.changes, step, key=lambda change: change[0]) - 1][1]

    @property
    def rows(self) -> int:
        """The rows of a step from the last change on."""
        return self.changes[-1][1]

    @property
    def since(self) -> int:
        """The step of the last change; 0 if there was none."""
        return self.changes[-1][0]

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
        return {"rows": self.rows} | changed
