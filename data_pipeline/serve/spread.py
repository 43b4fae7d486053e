"""How the rows of a step are distributed over data-parallel ranks. Their number need not divide the rows.

Every rank takes the same number of micro-batches with the same number of rows each, so that the collectives inside a
model match. A rank holds consecutive rows, and the numbers of rows of two ranks differ by at most one. Missing rows are
filled with masked rows: they are computed, but their labels do not count.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from bst_base.sizes import counted

MASKED = -1
"""The row number of a masked row."""


@dataclass(frozen=True)
class Spread:
    """The distribution of the rows of a step over all ranks."""

    rows: int
    """G, the rows of a step."""
    dp: int
    """Data-parallel ranks. With more ranks than rows, some have masked rows only."""
    max_micro_rows: int
    """Maximum number of rows of a micro-batch."""

    @property
    def micro_batches(self) -> int:
        """Micro-batches of each rank, computed one after the other."""
        return -(-self._most_of_a_rank // self.max_micro_rows)

    @property
    def micro_rows(self) -> int:
        """Rows of a micro-batch, masked ones included: the smallest number that suffices."""
        return -(-self._most_of_a_rank // self.micro_batches)

    def rows_of(self, dp_rank: int) -> range:
        """Return the rows of a rank."""
        return range(-(-dp_rank * self.rows // self.dp), -(-(dp_rank + 1) * self.rows // self.dp))

    def owner(self, row: int) -> int:
        """Return the rank that holds a row."""
        return row * self.dp // self.rows

    def of_micro_batches(self, dp_rank: int) -> list[np.ndarray]:
        """Return the rows of each micro-batch of a rank, (micro_rows,) int64 each; `MASKED` after its last row."""
        rows = self.rows_of(dp_rank)
        filled = np.full(self.micro_batches * self.micro_rows, MASKED, np.int64)
        filled[: len(rows)] = rows
        return list(filled.reshape(self.micro_batches, self.micro_rows))

    @property
    def masked(self) -> int:
        """Masked rows of a step, over all ranks."""
        return self.dp * self.micro_batches * self.micro_rows - self.rows

    def imbalance_message(self, sp: int = 1) -> str:
        """Return a message about the uneven rows per rank and the wasted computation; empty when nothing is wasted.

        `sp`: ranks that share a row.
        """
        if not self.masked:
            return ""
        who = "ranks" if sp == 1 else f"groups of {sp} ranks"
        slots, few = self.micro_batches * self.micro_rows, self.rows // self.dp
        more = self.rows % self.dp
        counts = [(more, few + 1), (self.dp - more, few)] if more else [(self.dp, few)]
        parts = [
            f"{ranks} of {self.dp} {who} {'has' if ranks == 1 else 'have'} {counted(rows, 'sequence')}"
            + (f" and {slots - rows} masked" if slots > rows else "")
            for ranks, rows in counts
        ]
        return f"{', '.join(parts)}: {self._wasted_fraction:.0%} of the computation is wasted{self._advice()}"

    def better_micro_sizes(self) -> list[int]:
        """Return the nearest values of `max_micro_rows` with the fewest masked rows, at most one below and one above.

        The list is empty when `max_micro_rows` has that number already.
        """
        others = [replace(self, max_micro_rows=most) for most in range(1, self._most_of_a_rank + 1)]
        least = min(other.masked for other in others)
        if self.masked == least:
            return []
        sizes = [other.max_micro_rows for other in others if other.masked == least]
        smaller = [size for size in sizes if size < self.max_micro_rows]
        larger = [size for size in sizes if size > self.max_micro_rows]
        return smaller[-1:] + larger[:1]

    def _advice(self) -> str:
        if not (better := self.better_micro_sizes()):
            return ""
        left = replace(self, max_micro_rows=better[0])._wasted_fraction
        of = "or ".join(f"{most} " for most in better)
        return f"; train.micro_sequences {of}would waste {f'{left:.0%}' if left else 'nothing'}"

    @property
    def _wasted_fraction(self) -> float:
        """The fraction of the rows of a step that is masked."""
        return self.masked / (self.dp * self.micro_batches * self.micro_rows)

    @property
    def _most_of_a_rank(self) -> int:
        return -(-self.rows // self.dp)
