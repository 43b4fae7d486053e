"""How a run lies over its ranks, and what a checkpoint of another layout becomes under this one.

Weights and optimizer states are read by parameter and element (`shards`), data follows from the step (the loader). What
is left is what one rank alone knows: its random generators, and the past that its rows carry to the next step.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from bst_dist.parallel.mesh import Mesh
from data_pipeline.serve.spread import MASKED, Spread

Carried = list[dict[str, Any]]
"""An entry a micro-batch: its global `rows`, the `position` they are at, and their `state`, (rows, ...) by name."""


@dataclass(frozen=True)
class Layout:
    """Ranks, and what lies where on them."""

    ranks: int
    sp: int
    zero_stage: int

    def __str__(self) -> str:
        ranks = "1 rank" if self.ranks == 1 else f"{self.ranks} ranks"
        return f"{ranks} (dp {self.ranks // self.sp} x sp {self.sp}, ZeRO-{self.zero_stage})"


@dataclass(frozen=True)
class Rows:
    """The rows of a step that one rank has, micro-batch by micro-batch."""

    sequences: int
    """Of a step, over all ranks."""
    micro_sequences: int
    mesh: Mesh

    def of_micro_batches(self) -> list[list[int]]:
        """Global row numbers, `MASKED` for rows that only fill a micro-batch."""
        spread = Spread(self.sequences, self.mesh.dp, self.micro_sequences)
        return [numbers.tolist() for numbers in spread.of_micro_batches(self.mesh.dp_rank)]


def redistribute(rows: Rows, saved: Layout, load: Callable[[int], Carried]) -> Carried:
    """The past carried by this rank's rows, from what the ranks of another layout carried.

    `load` gives what one of those ranks carried. The first rank of those that shared a sequence holds the state of
    its rows, whatever their number; the others hold none (`bst_dist.parallel.sequence.neighbour`).
    """
    wanted, spread = rows.of_micro_batches(), Spread(rows.sequences, saved.ranks // saved.sp, 1)
    sources = {spread.owner(row) * saved.sp for batch in wanted for row in batch if row != MASKED}
    found = {row: (entry, place) for rank in sorted(sources) for entry in load(rank)
             for place, row in enumerate(entry["rows"]) if row != MASKED}  # fmt: skip
    if not found:
        return []
    found[MASKED] = next(iter(found.values()))  # any state will do: nothing of a masked row counts
    return [_entry(batch, [found[row] for row in batch], holds_state=rows.mesh.sp_rank == 0) for batch in wanted]


def _entry(rows: list[int], found: Sequence[tuple[dict[str, Any], int]], holds_state: bool) -> dict[str, Any]:
    (position,) = {entry["position"] for entry, _ in found}  # every row has been fed the same number of tokens
    names = found[0][0]["state"] if holds_state else ()
    state = {name: torch.stack([entry["state"][name][place] for entry, place in found]) for name in names}
    return {"rows": rows, "position": position, "state": state}
