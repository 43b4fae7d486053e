"""The layout of a run over its ranks, and how the carried past of one layout is redistributed to another.

Weights and optimizer states are read by parameter and element (`shards`), and the loader computes the data from the
step. Only the state that a single rank has depends on the layout: random generators, and the past that its rows carry
to the next step.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from bst_dist.parallel.mesh import Mesh
from data_pipeline.serve.spread import MASKED, Spread

Carried = list[dict[str, Any]]
"""One entry per micro-batch: its global `rows`, their `position`, and their `state`: tensors (rows, ...) by name."""


@dataclass(frozen=True)
class Layout:
    """Number of ranks, sequence-parallel degree and ZeRO stage."""

    ranks: int
    sp: int
    zero_stage: int

    def __str__(self) -> str:
        ranks = "1 rank" if self.ranks == 1 else f"{self.ranks} ranks"
        return f"{ranks} (dp {self.ranks // self.sp} x sp {self.sp}, ZeRO-{self.zero_stage})"


@dataclass(frozen=True)
class Rows:
    """The rows of a step that one rank has, by micro-batch."""

    sequences: int
    """Sequences per step, over all ranks."""
    micro_sequences: int
    mesh: Mesh

    def of_micro_batches(self) -> list[list[int]]:
        """Return the global row numbers of each micro-batch; `MASKED` for rows that only fill it."""
        spread = Spread(self.sequences, self.mesh.dp, self.micro_sequences)
        return [numbers.tolist() for numbers in spread.of_micro_batches(self.mesh.dp_rank)]


def redistribute(rows: Rows, saved: Layout, load: Callable[[int], Carried]) -> Carried:
    """Return the past carried by this rank's rows, collected from the ranks of another layout.

    `load`: returns what one of those ranks carried. Of the ranks that shared a sequence, only the first one holds the
    state of its rows (`bst_dist.parallel.sequence.neighbour`).
    """
    wanted, spread = rows.of_micro_batches(), Spread(rows.sequences, saved.ranks // saved.sp, 1)
    sources = {spread.owner(row) * saved.sp for batch in wanted for row in batch if row != MASKED}
    found = {
        row: (entry, place)
        for rank in sorted(sources)
        for entry in load(rank)
        for place, row in enumerate(entry["rows"])
        if row != MASKED
    }
    if not found:
        return []
    found[MASKED] = next(iter(found.values()))  # any state will do: masked rows have no labels
    return [_entry(batch, [found[row] for row in batch], holds_state=rows.mesh.sp_rank == 0) for batch in wanted]


def _entry(rows: list[int], found: Sequence[tuple[dict[str, Any], int]], holds_state: bool) -> dict[str, Any]:
    (position,) = {entry["position"] for entry, _ in found}  # every row has read the same number of tokens
    names = found[0][0]["state"] if holds_state else ()
    state = {name: torch.stack([entry["state"][name][place] for entry, place in found]) for name in names}
    return {"rows": rows, "position": position, "state": state}
