"""The checks of a rank before a model is built."""

from __future__ import annotations

import os
import subprocess
import sys
from datetime import timedelta

import pytest
import torch
from torch.distributed import TCPStore

from bst_base.host import free_port
from bst_dist.cluster import collective
from bst_dist.cluster.processes import HostRanks


def test_a_device_that_computes_wrongly_is_found(monkeypatch):
    assert collective.multiplies(torch.device("cpu"))
    product = torch.Tensor.__matmul__

    def wrong(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        found = product(left, right)
        if found.is_floating_point():
            found[300, 7] += 1  # one element of many
        return found

    monkeypatch.setattr(torch.Tensor, "__matmul__", wrong)
    assert not collective.multiplies(torch.device("cpu"))


def test_ranks_that_can_communicate_exit_with_status_0():
    share = HostRanks(0, 2, 2, "127.0.0.1", free_port())
    command = [sys.executable, "-m", "bst_dist.cluster.collective"]
    ranks = [subprocess.Popen(command, env={**os.environ, **share.environment(rank)}) for rank in range(2)]
    assert [rank.wait(120) for rank in ranks] == [0, 0]


@pytest.mark.parametrize("program", ["collective", "train"])
def test_rank_0_has_room_for_the_connections_of_many_ranks(program, recipe, tmp_path):
    """200 connections, as of other ranks, to a rank 0 whose shell allows 100 files and lets it allow itself more."""
    share = HostRanks(0, 2, 2, "127.0.0.1", free_port())
    options = {"collective": [], "train": [str(recipe(2)), "--run-dir", str(tmp_path / "run")]}[program]
    where = {"collective": "bst_dist.cluster.collective", "train": "bst_dist.train"}[program]
    command = [sys.executable, "-m", where, *options]

    def start(rank: int) -> subprocess.Popen[bytes]:
        limited = ["bash", "-c", 'ulimit -Sn 100 && exec "$@"', "bash", *command]
        return subprocess.Popen(limited, env={**os.environ, **share.environment(rank)})

    first = start(0)
    others = []
    for number in range(200):
        others.append(TCPStore(share.address, share.port, is_master=False, timeout=timedelta(seconds=60)))
        others[-1].set(f"other {number}", "here")
    second = start(1)
    assert [first.wait(120), second.wait(120)] == [0, 0]


@pytest.mark.parametrize(("words", "statuses"), [([], [0, 0, 1]), (["--any-speed"], [0, 0, 0])])
def test_a_device_much_slower_than_the_median_is_named(words, statuses):
    share = HostRanks(0, 3, 3, "127.0.0.1", free_port())
    program = """
import os, sys
from bst_dist.cluster import collective
collective.is_timed = lambda device: True
collective.seconds_of_product = lambda device: (0.010, 0.011, 0.021)[int(os.environ["RANK"])]
sys.exit(collective.main())
"""
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", program, *words],
            env={**os.environ, **share.environment(rank)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(3)
    ]
    said = [rank.communicate(timeout=120)[1] for rank in ranks]
    assert [rank.returncode for rank in ranks] == statuses, said
    assert "cpu takes 1.9 times as long as the median rank for a matrix product" in said[2]
    assert "(check: speed)" in said[2]
    assert not any("speed" in one for one in said[:2])


def test_products_are_timed_after_the_warm_up_time(monkeypatch):
    monkeypatch.setattr(collective, "is_timed", lambda device: False)
    now = iter([0.0, *(float(number) for number in range(100))])
    monkeypatch.setattr(collective.time, "monotonic", lambda: next(now))
    assert collective.seconds_of_product(torch.device("cpu"), size=8, warm_s=40.0) == 1.0
    assert next(now) > 40, "it must go on for as long as that"
