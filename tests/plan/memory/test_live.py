"""Bytes of live tensors, compared with known sizes."""

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from bst_dist.plan.memory.live import LiveBytes


def test_storages_are_counted_once_while_referenced():
    with FakeTensorMode(), LiveBytes() as live:
        a = torch.zeros(1000)
        view = a.view(10, 100)[2:]
        assert live.now == 4000
        b = a + 1
        assert live.now == 8000
        del a
        assert live.now == 8000  # the view still holds it
        del view, b
        assert live.now == 0
        assert live.peak == 8000


def test_saved_tensors_count_until_the_backward_pass_uses_them():
    with FakeTensorMode(), LiveBytes() as live:
        x = torch.zeros(1000, requires_grad=True)
        loss = x.exp().sum()  # keeps its result
        assert live.now == 4000 + 4000 + 4
        loss.backward()
        assert live.now == 4000 + 4000 + 4  # the result is freed, the gradient is new
        assert live.mark() == live.peak


def test_tensors_larger_than_any_machine_need_no_memory():
    with FakeTensorMode(), LiveBytes() as live:
        torch.zeros(10**6, 10**6)
        assert live.peak == 4 * 10**12
