"""What a rank finds out before a model is built."""

from __future__ import annotations

import os
import subprocess
import sys

import torch

from bst_base.host import free_port
from bst_dist.cluster import collective
from bst_dist.cluster.processes import Share


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


def test_ranks_that_can_talk_end_in_order():
    share = Share(0, 2, 2, "127.0.0.1", free_port())
    command = [sys.executable, "-m", "bst_dist.cluster.collective"]
    ranks = [subprocess.Popen(command, env={**os.environ, **share.environment(rank)}) for rank in range(2)]
    assert [rank.wait(120) for rank in ranks] == [0, 0]
