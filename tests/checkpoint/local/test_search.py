"""Copies that a rank's own node has lost are fetched from the node that keeps them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from bst_dist.checkpoint.layout import Layout
from bst_dist.checkpoint.local.file import Key, LocalCopy
from bst_dist.checkpoint.local.search import Found, fetch_copies
from tests.checkpoint.damage import flip
from tests.checkpoint.local.written_copy import write


def lend(ranks: Any, roots: list[Path]) -> tuple[tuple[list[int], str | None], str | None, int]:
    """Fetch copies when rank 1's node has lost its copy and rank 0's node has it; rank 2's node has its own."""
    key, root = Key(0, 7, 1), roots[ranks.rank]
    root.mkdir(exist_ok=True)
    for rank in {0: (0, 1), 1: (), 2: (2,)}[ranks.rank]:
        write(key.path(root, rank))
    ranks.barrier()
    found = Found(key, Layout(3, 1, 1), {0: [0], 1: [0], 2: [2]})
    taken = fetch_copies(ranks, root, [0, 1, 2], found)
    assert LocalCopy(key.path(root, ranks.rank)).intact()
    if ranks.rank == 1:  # it cannot be read any more
        flip(key.path(root, 1), 40)
    found.holders[1] = [1]
    return taken, fetch_copies(ranks, root, [0, 1, 2], found)[1], ranks.phases.exchanges


@pytest.mark.ranks
def test_a_lost_copy_is_fetched_from_the_node_that_keeps_it(on_ranks, tmp_path):
    ended = on_ranks(3, lend, [tmp_path / "a", tmp_path / "b", tmp_path / "c"])
    for taken, damaged, _ in ended:
        assert taken == ([1], None)
        assert damaged.startswith("rank 1's: damaged on ")
    assert len({exchanges for *_, exchanges in ended}) == 1  # the watchdog compares them at a later hang
