"""Bytes that operations move, compared with known sizes."""

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from bst_dist.plan.memory.memory_traffic import MovedBytes


def test_operations_read_their_inputs_and_write_their_outputs():
    with FakeTensorMode():
        x, y = torch.empty(10, 100), torch.empty(100, 10)
        with MovedBytes() as moved:
            x.view(100, 10)[2:]
            assert moved.total == 0
            x + 1
            assert moved.total == 2 * 4000
            x @ y  # reads while it computes
            assert moved.total == 2 * 4000 + 400
            x.logsumexp(-1)
            assert moved.total == 8 * 4000 + 400
            x.gather(1, torch.empty(10, 1, dtype=torch.long))
            assert moved.total == 8 * 4000 + 400 + 0
