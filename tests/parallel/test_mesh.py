"""The process groups of the ranks that share a sequence."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from bst_dist.parallel.mesh import Mesh
from bst_dist.parallel.phases import Phases
from bst_dist.train.building import recorded_group


@pytest.mark.parametrize("rank", [0, 5])
def test_the_watchdog_sees_each_group_that_is_created(rank: int, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[list[int], str, int]] = []
    create, phases = dist.new_group, Phases()

    def new_group(ranks: list[int], **others: Any) -> Any:
        seen.append((ranks, phases.exchange, phases.exchanges))
        return create(ranks, **others)

    monkeypatch.setattr(dist, "new_group", new_group)
    monkeypatch.setattr(dist.distributed_c10d, "new_group", new_group)
    dist.init_process_group("fake", rank=rank, world_size=6, store=FakeStore())
    try:
        ranks = SimpleNamespace(world=6, rank=rank, phases=phases)
        group = recorded_group(SimpleNamespace(mesh=lambda ranks: Mesh(ranks.world, ranks.rank, 2)), ranks)
        assert seen == [([0, 1], "process groups", 1), ([2, 3], "process groups", 2), ([4, 5], "process groups", 3)]
        assert dist.get_process_group_ranks(group.process_group) == ([0, 1] if rank == 0 else [4, 5])
    finally:
        dist.destroy_process_group()
