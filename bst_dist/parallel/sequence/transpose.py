"""From some tokens of all channels to all tokens of some channels, and back: one all-to-all each way.

Other schemes of sequence parallelism for long convolutions and attention are built on it (DeepSpeed-Ulysses, arXiv
2309.14509). The whole activation is sent, so the bytes that a rank sends grow with the length of its slice.

Shapes: B rows, l tokens of the slice, L = sp l tokens of the sequence, channels (or heads) in any later dimension.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bst_dist.parallel.sequence.group import SequenceGroup


def to_channels(x: Tensor, dim: int, group: SequenceGroup, kind: str) -> Tensor:
    """Return all tokens of this rank's share of dimension `dim`: (B, l, .., C, ..) -> (B, L, .., C / sp, ..).

    sp must divide the dimension.
    """
    shares = x.unflatten(dim, (group.size, -1)).movedim(dim, 0)
    return _AllToAll.apply(shares, group, kind).movedim(0, 1).flatten(1, 2)


def to_tokens(x: Tensor, dim: int, group: SequenceGroup, kind: str) -> Tensor:
    """Return this rank's tokens of all channels: (B, L, .., C / sp, ..) -> (B, l, .., C, ..)."""
    slices = x.unflatten(1, (group.size, -1)).movedim(1, 0)
    return _AllToAll.apply(slices, group, kind).movedim(0, dim).flatten(dim, dim + 1)


class _AllToAll(torch.autograd.Function):
    """All-to-all of (sp, ...): part r goes to rank r, and its gradient comes back from there."""

    @staticmethod
    def forward(ctx, parts: Tensor, group: SequenceGroup, kind: str) -> Tensor:
        ctx.group, ctx.kind = group, kind
        return group.exchange(parts, kind)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple:
        return ctx.group.exchange(gradient, f"{ctx.kind} gradient"), None, None
