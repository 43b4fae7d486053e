"""Which rank keeps each copy, and files of any size sent between ranks."""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bst_dist.checkpoint.local import exchange
from bst_dist.checkpoint.local.exchange import Exchange, keepers


def test_a_copy_is_kept_by_the_same_local_rank_of_the_next_node():
    assert keepers(["a", "a", "b", "b", "c", "c"]) == [2, 3, 4, 5, 0, 1]
    assert keepers(["b", "a", "b", "a"]) == [1, 0, 3, 2]  # ranks of a node are not consecutive
    assert keepers(["a"] * 4) == [None] * 4


@given(st.lists(st.integers(1, 6), min_size=2, max_size=7))
def test_no_rank_keeps_two_copies_or_one_of_its_own_node(sizes):
    nodes = [str(node) for node, size in enumerate(sizes) for _ in range(size)]
    found = keepers(nodes)
    kept = [keeper for keeper in found if keeper is not None]
    assert len(kept) == len(set(kept))
    assert all(nodes[keeper] != nodes[rank] for rank, keeper in enumerate(found) if keeper is not None)
    if 2 * max(Counter(nodes).values()) <= len(nodes):
        assert len(kept) == len(nodes)


def send_to_the_next_node(ranks: Any, folder: Path, sizes: list[int], nodes: list[str]) -> None:
    """Let every rank send its file to the next node; some files are larger than one message."""
    exchange.CHUNK = 1000
    own, kept = folder / f"own-{ranks.rank}", folder / f"kept-{ranks.rank}"
    if sizes[ranks.rank]:
        own.write_bytes(os.urandom(sizes[ranks.rank]))
    around = Exchange(ranks.rank, nodes)
    for _ in range(2):
        around.swap(own, kept)
    ranks.barrier()
    if around.kept is not None:
        there = folder / f"own-{around.kept}"
        assert (kept.read_bytes() if kept.exists() else b"") == (there.read_bytes() if there.exists() else b"")
    assert [path.name for path in folder.glob("*.partial")] == []


@pytest.mark.ranks
def test_copies_of_any_size_reach_the_neighbour(on_ranks, tmp_path):
    on_ranks(3, send_to_the_next_node, tmp_path, [2500, 0, 999], ["a", "b", "b"])
