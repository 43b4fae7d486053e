"""How a recipe's batch is distributed over the remaining hosts."""

from __future__ import annotations

import pytest

from bst_base.settings import parse
from bst_dist.cluster.elastic import choose, idle, shares, usable
from bst_dist.cluster.hosts import Host
from bst_dist.config import Recipe


def recipe(sequences: int, sp: int = 1, micro: int = 1, rows: int = 0) -> Recipe:
    settings = {
        "name": "small",
        "data": {"corpus": "none"},
        "model": {"width": 16, "heads": 2, "ffn": 16, "block": 8, "depth": 1, "mixer": "bst", "ssm": {"chunk": 4}},
        "train": {"steps": 1, "sequence_length": 96, "sequences": sequences, "micro_sequences": micro},
        "evaluation": {"sequences": rows or sequences},
        "parallel": {"sp": sp},
    }
    return parse(Recipe, settings)


@pytest.mark.parametrize(
    ("made", "most", "found"),
    [
        (recipe(64), 16, (16, 1)),
        (recipe(64), 15, (15, 1)),  # 15 ranks do not divide 64 sequences
        (recipe(512), 63 * 8, (63 * 8, 1)),  # a host of 64 was lost
        (recipe(6), 2, (2, 1)),
        (recipe(6), 9, (6, 1)),  # no rank without a sequence
        (recipe(64, sp=4), 16, (16, 4)),
        (recipe(64, sp=4), 15, (12, 4)),  # whole groups of sp; dp 3 does not divide 64
        (recipe(64, sp=4), 3, (2, 2)),  # fewer ranks than share a sequence: a divisor of sp
        (recipe(64, sp=4), 1, (1, 1)),
        (recipe(8, micro=4), 8, (8, 1)),  # micro-batches of four do not limit the ranks
    ],
)
def test_the_largest_useful_number_of_ranks_is_chosen(made, most, found):
    shape = choose(made, most)
    assert (shape.world, shape.sp) == found


def test_unequal_work_of_ranks_is_reported():
    assert choose(recipe(512), 504).imbalance.startswith("8 of 504 ranks have 2 sequences, 496 of 504 ranks have 1")
    assert choose(recipe(64, sp=4), 15).imbalance.startswith("1 of 3 groups of 4 ranks has 22 sequences, 2 of 3 groups")
    assert choose(recipe(512), 512).imbalance == ""


def test_a_spare_host_is_accepted():
    """65 hosts of 8 slots for a batch of 512 sequences: one is a spare, and replaces the first host that is lost."""
    hosts = [Host(f"n{i}", 8) for i in range(65)]
    assert usable(recipe(512), 65 * 8) == 512
    assert usable(recipe(512), 64 * 8) == 512
    assert idle(hosts, shares(hosts, 512, "address", 1)) == "8 slots of n64"
    assert usable(recipe(64, sp=4), 3) == 3  # the later check of the recipe explains the error


def test_hosts_are_filled_in_order_and_spare_slots_stay_idle():
    hosts = [Host("a", 4), Host("b", 4), Host("c", 1)]
    placed = shares(hosts, 6, "address", 1)
    assert idle(hosts, placed) == "2 slots of b, 1 slot of c"
    assert idle(hosts[:1], placed) == ""
    assert {host: (share.first, share.count) for host, share in placed.items()} == {"a": (0, 4), "b": (4, 2)}
    assert placed["b"].environment(5) == {
        "RANK": "5",
        "LOCAL_RANK": "1",
        "WORLD_SIZE": "6",
        "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "address",
        "MASTER_PORT": "1",
    }
