"""How the rows of a step are spread over data-parallel ranks, also over a number that does not divide them.

Every rank takes as many micro-batches, each of as many rows, so that the collectives inside a model match. Ranks have
neighbouring rows, and their numbers of rows differ by one at most. What a rank lacks is filled with masked rows: they
are computed, and none of their labels counts.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

MASKED = -1
"""The number of a masked row."""


@dataclass(frozen=True)
class Spread:
    """The rows of a step over all ranks."""

    rows: int
    """G, rows of a step."""
    dp: int
    """Data-parallel ranks; beyond G, some have masked rows alone."""
    most: int
    """Rows that a rank may take at once."""

    @property
    def micro_batches(self) -> int:
        """Of a rank, one after the other."""
        return -(-self._most_of_a_rank // self.most)

    @property
    def micro_rows(self) -> int:
        """Rows of a micro-batch, the masked ones included: no more than are needed."""
        return -(-self._most_of_a_rank // self.micro_batches)

    def own(self, dp_rank: int) -> range:
        """The rows of a rank."""
        return range(-(-dp_rank * self.rows // self.dp), -(-(dp_rank + 1) * self.rows // self.dp))

    def owner(self, row: int) -> int:
        """The rank that has a row."""
        return row * self.dp // self.rows

    def of_micro_batches(self, dp_rank: int) -> list[np.ndarray]:
        """(micro_rows,) int64 each: the rows of every micro-batch of a rank, `MASKED` where it has none left."""
        own, filled = self.own(dp_rank), np.full(self.micro_batches * self.micro_rows, MASKED, np.int64)
        filled[: len(own)] = own
        return list(filled.reshape(self.micro_batches, self.micro_rows))

    @property
    def masked(self) -> int:
        """Masked rows of a step, over all ranks."""
        return self.dp * self.micro_batches * self.micro_rows - self.rows

    def unequal(self, sp: int = 1) -> str:
        """How the rows differ from rank to rank and what is computed in vain, for people; empty when nothing is.

        `sp`: ranks that share a row.
        """
        if not self.masked:
            return ""
        who = "ranks" if sp == 1 else f"groups of {sp} ranks"
        slots, few = self.micro_batches * self.micro_rows, self.rows // self.dp
        more = self.rows % self.dp
        counts = [(more, few + 1), (self.dp - more, few)] if more else [(self.dp, few)]
        parts = [
            f"{ranks} of {self.dp} {who} {'has' if ranks == 1 else 'have'} {_sequences(rows)}"
            + (f" and {slots - rows} masked" if slots > rows else "")
            for ranks, rows in counts
        ]
        return f"{', '.join(parts)}: {self._vain:.0%} of what is computed does not count{self._advice()}"

    def sparing(self) -> list[int]:
        """The nearest values of `most`, at most one below and one above, with which as little is computed in vain as
        the ranks allow; empty when that is so already."""
        others = [replace(self, most=most) for most in range(1, self._most_of_a_rank + 1)]
        least = min(other.masked for other in others)
        if self.masked == least:
            return []
        found = [other.most for other in others if other.masked == least]
        return [*[most for most in found if most < self.most][-1:], *[most for most in found if most > self.most][:1]]

    def _advice(self) -> str:
        if not (better := self.sparing()):
            return ""
        left = replace(self, most=better[0])._vain
        of = "or ".join(f"{most} " for most in better)
        return f"; train.micro_sequences {of}would waste {f'{left:.0%}' if left else 'nothing'}"

    @property
    def _vain(self) -> float:
        """The share of the rows of a step that is masked."""
        return self.masked / (self.dp * self.micro_batches * self.micro_rows)

    @property
    def _most_of_a_rank(self) -> int:
        return -(-self.rows // self.dp)


def _sequences(count: int) -> str:
    return f"{count} sequence{'s' * (count != 1)}"
