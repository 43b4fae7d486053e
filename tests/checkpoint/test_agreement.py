"""Work that fails on one rank of several ends on all of them in the same way."""

from __future__ import annotations

import pytest

from bst_base.errors import StorageError, UserError
from bst_base.stopping import Stopped
from bst_dist.checkpoint.agreement import each_or_raise
from bst_dist.checkpoint.config import CheckpointConfig
from bst_dist.checkpoint.directory import directory
from bst_dist.checkpoint.layout import Layout, Rows
from bst_dist.checkpoint.snapshot import Identity, Snapshots
from bst_dist.parallel.mesh import Mesh
from bst_dist.tools.bench.lockstep import World
from tests.checkpoint.test_saving import Tensors, save, snapshots


def test_each_rank_gets_its_own_result():
    assert World(3).run(lambda rank: each_or_raise(rank, lambda: rank.rank))[0] == [0, 1, 2]


@pytest.mark.parametrize(
    ("errors", "kind"),
    [({1: Stopped("interrupted")}, Stopped), ({0: Stopped("interrupted"), 2: StorageError("no disk")}, StorageError)],
)
def test_an_error_of_one_rank_is_raised_on_all_and_a_stop_only_without_an_error(errors, kind):
    def on_rank(rank):
        def work():
            if rank.rank in errors:
                raise errors[rank.rank]

        try:
            each_or_raise(rank, work)
        except UserError as error:
            return type(error)
        return None

    assert World(3).run(on_rank)[0] == [kind] * 3


def test_a_listing_that_is_behind_rank_0_s_ends_a_run_only_at_a_start(tmp_path):
    """Right after a commit another host may still list the directory as it was; at a start it may lack a mount."""
    state = Tensors()
    save(snapshots(tmp_path / "run", state), state, 3)

    def on_rank(rank):
        seen = tmp_path / ("run" if rank.first else "stale")
        identity = Identity("recipe", {}, 0, Layout(2, 1, 0), Rows(1, 1, Mesh(2, rank.rank)))
        run = Snapshots(seen, Tensors(), rank, identity, CheckpointConfig(every=3))
        found = run.reached(ending=True), run.newest(scheduled=True)[0]
        for work in (run.reached, run.newest):
            with pytest.raises(StorageError, match="sees no checkpoint"):
                work()
        return found

    assert World(2).run(on_rank)[0] == [((0, 3), directory(tmp_path / "run", 3))] * 2
