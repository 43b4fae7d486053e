"""The scan over ranks equals the recurrence slice by slice, and so do its gradients."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st

from bst_dist.parallel.mesh import Mesh
from bst_dist.parallel.sequence.scan import start_exclusive_scan


class Recorded:
    """Stub of a group with given messages: rank `rank` of `len(maps)`, without other processes."""

    def __init__(self, rank: int, maps: list[torch.Tensor], gradients: list[torch.Tensor]):
        self.rank, self.size = rank, len(maps)
        self.messages = {"state": maps, "state gradient": gradients}
        self.sent: dict[str, torch.Tensor] = {}

    def gather(self, x: torch.Tensor, kind: str):
        self.sent[kind] = x.detach()
        return lambda: self.messages[kind]


def serial(ends: torch.Tensor, transitions: torch.Tensor) -> torch.Tensor:
    """Return the state before each slice, and after the last: (ranks + 1, B, n)."""
    state, before = torch.zeros_like(ends[0]), []
    for end, transition in zip(ends, transitions, strict=True):
        before.append(state)
        state = transition * state + end
    return torch.stack([*before, state])


@settings(deadline=None, max_examples=60)
@given(size=st.integers(2, 9), rows=st.integers(1, 3), own=st.booleans(), real=st.booleans(), seed=st.integers(0, 99))
def test_every_rank_gets_the_state_and_the_gradients_of_the_serial_recurrence(size, rows, own, real, seed):
    torch.manual_seed(seed)
    dtype = torch.float64 if real else torch.complex128
    ends = torch.randn(size, rows, 3, dtype=dtype, requires_grad=True)
    shared = torch.randn(3, dtype=dtype, requires_grad=True)
    keep = (torch.rand(size, rows, 1) < 0.6) if own else torch.ones(size, rows, 1)
    transitions = shared * keep  # a row in which a document begins forgets what came before
    # Gradients of the states. The state before the first slice is 0, so entry 0 belongs to the state after the last.
    gradients = torch.randn(size, rows, 3, dtype=dtype)
    states = serial(ends, transitions)
    asked = torch.cat((states[-1:], states[1:-1]))
    wanted = torch.autograd.grad((asked * gradients.conj()).real.sum(), (ends, shared))
    d_shared = torch.zeros_like(shared)
    for rank in range(size):
        maps = [torch.stack((e, t)) for e, t in zip(ends, transitions, strict=True)] if own else list(ends)
        group = Recorded(rank, [m.detach() for m in maps], list(gradients))
        end = ends[rank].detach().requires_grad_()
        transition = shared.detach().requires_grad_()
        finish = start_exclusive_scan(end, transition * keep[rank] if own else transition, group, "state")
        state, last = finish()
        torch.testing.assert_close(state, states[rank])
        torch.testing.assert_close(last, states[-1])
        torch.testing.assert_close(group.sent["state"], maps[rank].detach())
        torch.autograd.backward((state, last), (gradients[rank], gradients[0] if rank == 0 else 0 * gradients[0]))
        torch.testing.assert_close(group.sent["state gradient"], gradients[rank])
        torch.testing.assert_close(end.grad, wanted[0][rank])
        d_shared += transition.grad
    torch.testing.assert_close(d_shared, wanted[1])


@pytest.mark.ranks
def test_two_exchanges_may_be_pending_at_once(on_ranks):
    """Two exchanges are started before either is finished; gradients also if one result is multiplied by zero."""

    def check() -> tuple[float, float, float]:
        group = Mesh(3, dist.get_rank(), sp=3).sp_group()
        one, two = (torch.full((1, 1), value, requires_grad=True) for value in (1.0, 10.0))
        first = start_exclusive_scan(one, torch.tensor([0.5]), group, "first")
        second = start_exclusive_scan(two, torch.tensor([0.5]), group, "second")
        used = second()[0] + (first()[0] if group.rank != 1 else 0 * first()[0])
        used.sum().backward()
        return float(used), float(one.grad), float(two.grad)

    assert on_ranks(3, check) == [(0, 0.5, 1.5), (10, 1, 1), (16.5, 0, 0)]
