"""Rotary position embedding (RoFormer, arXiv 2104.09864).

Shapes: B rows, l tokens, H heads, dh head width.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Angles(NamedTuple):
    """RoPE's tables for the two halves of a head's channels."""

    cos: Tensor
    """(l, 1, 1, dh / 2)."""
    sin: Tensor
    """(l, 1, 2, dh / 2): negative for the first half."""

    def last(self, count: int) -> Angles:
        """Return the tables of the last positions."""
        return Angles(*(table[len(table) - count :] for table in self))


def angles(base: float, half: int, first: int, count: int, like: Tensor) -> Angles:
    """Return the tables of `count` positions from `first` on, computed in double precision, in the dtype of `like`."""
    rates = base ** (-torch.arange(half, device=like.device, dtype=torch.float64) / half)
    angle = torch.arange(first, first + count, device=like.device).outer(rates)[:, None, None]
    return Angles(angle.cos().to(like.dtype), torch.cat((-angle.sin(), angle.sin()), dim=2).to(like.dtype))


def rotate(x: Tensor, by: Angles) -> Tensor:
    """Apply the rotary embedding to (B, l, H, dh) (RoFormer, arXiv 2104.09864).

    It does not concatenate: a compiled layer would write the gradient of a concatenation to memory before it computes
    the gradient of `unit`.
    """
    halves = x.unflatten(-1, (2, -1))
    return (halves * by.cos + halves.flip(-2) * by.sin).flatten(-2)
