from __future__ import annotations

import pytest
import torch

from bst_dist.checkpoint.layout import Carried, Layout, Rows, redistribute
from bst_dist.parallel.mesh import Mesh
from data_pipeline.serve.spread import MASKED

SEQUENCES = 8


def carried(world: int, sp: int, micro: int, rank: int) -> Carried:
    """Return a rank's carried state; each row's state contains the row's number."""
    rows = Rows(SEQUENCES, micro, Mesh(world, rank, sp))
    first = rows.mesh.sp_rank == 0
    return [
        {
            "rows": batch,
            "position": 96,
            "state": {"a": torch.tensor([[row, -row] for row in batch]), "b": torch.tensor(batch) * 1.5}
            if first
            else {},
        }
        for batch in rows.of_micro_batches()
    ]


LAYOUTS = [(1, 1, 1), (1, 1, 8), (2, 1, 3), (2, 2, 4), (3, 1, 1), (4, 2, 1), (6, 2, 2), (4, 4, 2), (5, 1, 4), (8, 1, 1)]


@pytest.mark.parametrize("saved", LAYOUTS, ids=str)
@pytest.mark.parametrize("now", LAYOUTS, ids=str)
def test_every_rank_gets_the_carried_state_of_its_rows(saved, now):
    world, sp, micro = now
    for rank in range(world):
        rows = Rows(SEQUENCES, micro, Mesh(world, rank, sp))
        found = redistribute(rows, Layout(saved[0], saved[1], 1), lambda other: carried(*saved, other))
        wanted = carried(world, sp, micro, rank)
        assert len(found) == len(wanted)
        for one, other in zip(found, wanted, strict=True):
            assert (one["rows"], one["position"], one["state"].keys()) == (
                other["rows"],
                other["position"],
                other["state"].keys(),
            )
            own = torch.tensor(one["rows"]) != MASKED
            assert all(torch.equal(one["state"][name][own], other["state"][name][own]) for name in one["state"])
            assert all(one["state"][name].shape == other["state"][name].shape for name in one["state"])


def test_only_the_ranks_that_hold_the_rows_are_read():
    read = []

    def load(rank: int) -> Carried:
        read.append(rank)
        return carried(8, 2, 1, rank)

    redistribute(Rows(SEQUENCES, 2, Mesh(4, 3, 2)), Layout(8, 2, 1), load)  # rows 4 to 7 were on ranks 4 and 6
    assert read == [4, 6]


def test_redistributing_no_carried_state_gives_none():
    assert redistribute(Rows(SEQUENCES, 2, Mesh(2, 0)), Layout(4, 1, 3), lambda _: []) == []


def test_layout_text_names_ranks_dp_sp_and_stage():
    assert str(Layout(4, 2, 3)) == "4 ranks (dp 2 x sp 2, ZeRO-3)"
    assert str(Layout(1, 1, 0)) == "1 rank (dp 1 x sp 1, ZeRO-0)"
