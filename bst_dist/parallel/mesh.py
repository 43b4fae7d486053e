"""The dp x sp mesh: which rows of a batch, and which slice of them, a rank holds.

Ranks of one sequence are neighbours (rank = dp_rank * sp + sp_rank), so exchanges between slices stay within a node
when possible. ZeRO shards over the whole world: for ZeRO, every rank is data-parallel.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch.distributed as dist

from bst_dist.parallel.config import data_parallel
from bst_dist.parallel.phases import Phases
from bst_dist.parallel.sequence.group import SequenceGroup


@dataclass(frozen=True)
class Mesh:
    """This rank's position in the mesh."""

    world: int
    rank: int
    sp: int = 1

    def __post_init__(self) -> None:
        data_parallel(self.world, self.sp)

    @property
    def dp(self) -> int:
        """Data-parallel degree."""
        return data_parallel(self.world, self.sp)

    @property
    def dp_rank(self) -> int:
        """Index of this rank's group of rows."""
        return self.rank // self.sp

    @property
    def sp_rank(self) -> int:
        """Index of this rank's slice of the rows."""
        return self.rank % self.sp

    def sp_group(self, phases: Phases | None = None) -> SequenceGroup | None:
        """Return the group of ranks that share this rank's sequence; None if sp is 1.

        It creates process groups, so every rank of the world must call it once. They are created one after the other,
        and with NCCL each takes all ranks: `phases` records each as an exchange, so that the watchdog sees progress.
        """
        if self.sp == 1:
            return None
        phases = phases or Phases()
        for first in range(0, self.world, self.sp):
            with phases.exchanging("process groups"):
                group = dist.new_group(list(range(first, first + self.sp)))
            if first == self.rank - self.sp_rank:
                own = group
        return SequenceGroup(own)
