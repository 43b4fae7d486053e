"""The dp x sp mesh: which rows and which slice of them a rank holds.

Ranks of one sequence are neighbours (rank = dp_rank * sp + sp_rank), so what crosses a slice boundary stays inside a
node where it can. ZeRO shards over the whole world: for it, every rank is data-parallel.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch.distributed as dist

from bst_dist.parallel.config import data_parallel
from bst_dist.parallel.sequence.group import SequenceGroup


@dataclass(frozen=True)
class Mesh:
    """This rank's place."""

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
        """Which rows."""
        return self.rank // self.sp

    @property
    def sp_rank(self) -> int:
        """Which slice of them."""
        return self.rank % self.sp

    def sp_group(self) -> SequenceGroup | None:
        """The ranks that share this rank's sequence; None when it shares it with nobody.

        Makes process groups, so every rank of the world calls it, once.
        """
        if self.sp == 1:
            return None
        sequences = [list(range(first, first + self.sp)) for first in range(0, self.world, self.sp)]
        own, _ = dist.new_subgroups_by_enumeration(sequences)
        return SequenceGroup(own)
