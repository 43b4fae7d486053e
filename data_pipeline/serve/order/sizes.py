"""The rows and the sequence length of each step of a run, and where each step begins in the endless series of rows.

Both may change when a run is resumed, and at planned steps. Earlier steps keep their values, so that no row is read
twice and none is left out. The order stays a pure function of the step and of these changes, which every checkpoint
stores.
"""

from __future__ import annotations

import bisect
from collections.abc import Mapping
from itertools import pairwise
from typing import Any

import numpy as np

from data_pipeline.serve.order.step_values import StepValues

STREAMED = "each streaming row reads its own part of the corpus, so their number cannot change"


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
