"""Matrices whose elements lie on several ranks, and which rank works on which.

Some optimizers work on whole matrices, and ZeRO gives each rank a flat share: under stages 1 and 2 the borders between
ranks cut a few matrices, under stage 3 every one lies on all ranks in equal parts. Each cut matrix gets an owner among
the ranks that hold some of it, so that the work is spread evenly. All ranks derive the same owners from the same
layout, without asking each other.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Matrix:
    """How one matrix lies over the ranks."""

    runs: dict[int, tuple[int, int]]
    """Rank -> first element that it holds, and how many; in the order of the elements."""
    work: float
    """What it costs its owner, in any unit."""


def owners(matrices: Sequence[Matrix]) -> list[int]:
    """The rank that each matrix is put together on: its only holder, or the one of its holders that has least to do.

    Cut ones are given out from the largest to the smallest; of equal ranks the lower one takes it.
    """
    load: dict[int, float] = {}
    found = [next(iter(matrix.runs)) for matrix in matrices]
    for cut in (False, True):
        wanted = [place for place, matrix in enumerate(matrices) if (len(matrix.runs) > 1) == cut]
        for place in sorted(wanted, key=lambda place: -matrices[place].work):
            found[place] = min(matrices[place].runs, key=lambda rank: (load.get(rank, 0.0), rank))
            load[found[place]] = load.get(found[place], 0.0) + matrices[place].work
    return found
