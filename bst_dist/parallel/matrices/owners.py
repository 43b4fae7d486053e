"""Matrices whose elements are sharded over several ranks, and which rank works on each.

Some optimizers need whole matrices, but ZeRO gives each rank a flat shard. Under stages 1 and 2 the borders between
ranks cut a few matrices; under stage 3 every matrix is sharded over all ranks in equal parts. Each cut matrix gets an
owner among the ranks that hold a part of it, so that the work is spread evenly. All ranks compute the same owners from
the same layout, without communication.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Matrix:
    """How one matrix is sharded over the ranks."""

    runs: dict[int, tuple[int, int]]
    """Rank -> (first element, number of elements) that it holds, in the order of the elements."""
    work: float
    """Cost for the owner, in any unit."""


def owners(matrices: Sequence[Matrix]) -> list[int]:
    """Return the owner of each matrix: its only holder, or the holder with the least work so far.

    Cut matrices are assigned from the most to the least work. Of ranks with equal work, the lower one is the owner.
    """
    load: dict[int, float] = {}
    found = [next(iter(matrix.runs)) for matrix in matrices]
    for cut in (False, True):
        wanted = [place for place, matrix in enumerate(matrices) if (len(matrix.runs) > 1) == cut]
        for place in sorted(wanted, key=lambda place: -matrices[place].work):
            found[place] = min(matrices[place].runs, key=lambda rank: (load.get(rank, 0.0), rank))
            load[found[place]] = load.get(found[place], 0.0) + matrices[place].work
    return found
