"""Sliding attention on a GPU: FlexAttention, compiled to one fused kernel with its mask and bias (arXiv 2412.05496).

It skips whole tiles outside the band, keeps no scores, and differentiates the bias. It has no backward pass on a CPU.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, lru_cache

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

Mask = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def flex_sliding_attention(
    q: Tensor, k: Tensor, v: Tensor, window: int, bias: Tensor | None, include_self: bool, documents: Tensor | None
) -> Tensor:
    """As `attention.sliding_attention`, with documents (B, p + l) int: which document each position belongs to."""
    length, keys = q.shape[1], k.shape[1]
    before, device = keys - length, str(q.device)
    if documents is None:
        blocks = _band(length, keys, window, include_self, device)
    else:
        seen = _in_band(before, window, include_self)

        def same_document(b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
            return seen(b, h, query, key) & (documents[b, query + before] == documents[b, key])

        blocks = create_block_mask(same_document, len(q), None, length, keys, device=device)

    def add_bias(score: Tensor, b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return score + bias[h, (query + before - key).clamp(0, window)]

    attend = _compiled() if q.is_cuda else flex_attention
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    out = attend(q, k, v, score_mod=None if bias is None else add_bias, block_mask=blocks, scale=1.0)
    return out.transpose(1, 2)


@lru_cache(maxsize=8)
def _band(length: int, keys: int, window: int, include_self: bool, device: str) -> BlockMask:
    return create_block_mask(_in_band(keys - length, window, include_self), None, None, length, keys, device=device)


def _in_band(before: int, window: int, include_self: bool) -> Mask:
    nearest = 0 if include_self else 1

    def seen(b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
        distance = query + before - key
        return (distance >= nearest) & (distance < window + nearest)

    return seen


@cache
def _compiled() -> Callable[..., Tensor]:
    return torch.compile(flex_attention, dynamic=False)
