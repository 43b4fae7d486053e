"""Work that fails on one rank of several ends on all of them in the same way."""

from __future__ import annotations

import pytest

from bst_base.errors import StorageError, UserError
from bst_base.stopping import Stopped
from bst_dist.checkpoint.agreement import each_or_raise
from bst_dist.tools.bench.lockstep import World


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
