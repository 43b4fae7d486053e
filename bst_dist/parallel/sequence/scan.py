"""The scan over ranks: computes the recurrent state before a slice from the state that each slice alone leaves.

For an affine recurrence ``x_out = T x_in + e`` every rank knows its own (T, e) at once, so ranks do not wait for each
other in turn. After one all-gather of the e, each rank combines those to its left. The backward pass is the mirrored
scan, from the right, after one all-gather of the gradients of the x_in. A message has the size of a state, at any
length.

The idea is LASP's (Sun et al. 2024, arXiv 2404.02882) and that of Mamba-2's section 8.2 (arXiv 2405.21060).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from bst_dist.parallel.sequence.group import SequenceGroup


def start_exclusive_scan(
    end: Tensor, transition: Tensor, group: SequenceGroup, kind: str
) -> Callable[[], tuple[Tensor, Tensor]]:
    """Start to send this slice's affine map. Return a function that waits for the maps of the other slices.

    Every rank must call both functions and use the first result, so that gradients flow back.

    Args:
        end: (B, *), the state that the slice leaves when it starts from zero.
        transition: (*) if it is the same for all slices and rows, and then it is not sent; otherwise (B, *).
        kind: the name under which the bytes are counted.

    Returns:
        Of the returned function: the state before this slice (B, *), zero on the first rank; and the state after the
        last slice (B, *). Both have gradients. That of the last state is taken from the first rank only, which leaves
        this state for the next call.
    """
    pending = _Pending(group, kind, own_transition=transition.dim() == end.dim())
    ticket = _Start.apply(pending, end, transition)
    return lambda: _Finish.apply(pending, ticket)


class _Pending:
    """The pending exchange between the two halves of the scan, forward or backward; empty otherwise."""

    def __init__(self, group: SequenceGroup, kind: str, own_transition: bool):
        self.group, self.kind, self.own_transition = group, kind, own_transition
        self.arrive: Callable[[], list[Tensor]] | None = None
        self.kept: tuple[Tensor, ...] = ()

    def send(self, message: Tensor, kind: str, *keep: Tensor) -> None:
        self.arrive = self.group.gather(message, kind)
        self.kept = keep

    def take(self) -> tuple[list[Tensor], tuple[Tensor, ...]]:
        """Wait for the messages. Return them in rank order, with the tensors that were kept."""
        messages = self.arrive()
        kept = self.kept
        self.arrive, self.kept = None, ()
        return messages, kept


class _Start(torch.autograd.Function):
    """First half of the forward pass, second half of the backward pass. The output only connects it with `_Finish`."""

    @staticmethod
    def forward(ctx, pending: _Pending, end: Tensor, transition: Tensor) -> Tensor:
        ctx.pending, ctx.shape = pending, transition.shape
        message = torch.stack((end, transition.expand_as(end))) if pending.own_transition else end
        pending.send(message, pending.kind, transition.detach())
        return end.new_zeros(())

    @staticmethod
    def backward(ctx, _: Tensor) -> tuple:
        pending, rank = ctx.pending, ctx.pending.group.rank
        gradients, (before, transitions) = pending.take()
        after = gradients[0]  # of the state after the last slice, then after slice q, then after this slice
        for q in range(pending.group.size - 1, rank, -1):
            t = transitions[q - rank - 1] if pending.own_transition else transitions
            after = gradients[q] + t.conj() * after
        return None, after, (before.conj() * after).sum_to_size(ctx.shape)


class _Finish(torch.autograd.Function):
    """Second half of the forward pass, first half of the backward pass."""

    @staticmethod
    def forward(ctx, pending: _Pending, ticket: Tensor) -> tuple[Tensor, Tensor]:
        maps, (transition,) = pending.take()
        if pending.own_transition:
            maps, transitions = zip(*maps, strict=True)
        else:
            transitions = [transition] * len(maps)
        state = torch.zeros_like(maps[0])
        before = None
        for q, (t, end) in enumerate(zip(transitions, maps, strict=True)):
            before = state if q == pending.group.rank else before
            state = t * state + end
        later = transitions[pending.group.rank + 1 :]
        ctx.pending = pending
        ctx.save_for_backward(before, torch.stack(later) if pending.own_transition and later else transition)
        return before, state

    @staticmethod
    def backward(ctx, gradient: Tensor, of_last: Tensor) -> tuple:
        # The zero before the first slice needs no gradient: the first rank sends that of the last state instead.
        message = of_last if ctx.pending.group.rank == 0 else gradient
        ctx.pending.send(message, f"{ctx.pending.kind} gradient", *ctx.saved_tensors)
        return None, gradient.new_zeros(())
