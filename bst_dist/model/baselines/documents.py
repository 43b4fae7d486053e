"""Isolated documents for attention whose window spans several blocks."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from bst_dist.model.tiles import HIDDEN


def mark_documents(q: Tensor, k: Tensor, starts: Tensor, kinds: int) -> tuple[Tensor, Tensor]:
    """More channels that hide keys of another document from each query, exactly and without a mask.

    Documents are told apart by their number modulo `kinds`, which must exceed the document starts inside any window:
    a query's channel of its own kind meets 0 in keys of that kind, and -HIDDEN in all others. Positions before the
    slice belong to the document that the slice begins in.

    Args:
        q: (B, l, H, dh).
        k: (B, p + l, H, dh).
        starts: (B, l / W) bool, blocks that begin a document.

    Returns:
        q and k with `kinds` more channels.
    """
    kind = (starts.cumsum(1) % kinds).repeat_interleave(q.shape[1] // starts.shape[1], dim=1)  # (B, l)
    own = F.one_hot(kind, kinds)
    other = 1 - F.one_hot(F.pad(kind, (k.shape[1] - q.shape[1], 0)), kinds)
    q = torch.cat((q, _all_heads(own, q)), dim=-1)
    return q, torch.cat((k, _all_heads(other, k) * -HIDDEN), dim=-1)


def _all_heads(channels: Tensor, like: Tensor) -> Tensor:
    return channels.to(like.dtype).unsqueeze(2).expand(-1, -1, like.shape[2], -1)
