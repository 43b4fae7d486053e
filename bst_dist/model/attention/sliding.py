"""Sliding attention as a function of queries, keys and values, computed by the implementation that fits the device.

Shapes: B rows, l queries, p <= W positions before them, H heads of queries, G of keys and values, dh head width, W
block.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from bst_dist.model.attention.documents import Documents, separate_documents
from bst_dist.model.attention.flex import flex_sliding_attention, uses_flex_tiles
from bst_dist.model.attention.fused_tiles import fused_sliding_attention, fused_tile
from bst_dist.model.attention.tiles import HIDDEN, QUERY_TILE, sliding_tiles, tiled_attention_and_sums
from bst_dist.model.attention.window import Window


def attention_path(device: torch.device) -> str:
    """Return what computes sliding attention on this device: "flex" (FlexAttention), "fused-tiles" (torch's CPU kernel,
    or plain tiles for cases that it does not support), or "tiles"."""
    return {"cuda": "flex", "cpu": "fused-tiles"}.get(device.type, "tiles")


def trains_with_flex(q: Tensor) -> bool:
    """Whether FlexAttention computes these queries (B, l, ...), with gradients."""
    return attention_path(q.device) == "flex" and uses_flex_tiles(q.shape[1]) and torch.is_grad_enabled()


def for_heads(x: Tensor, heads: int) -> Tensor:
    """Repeat keys or values for each query head that shares them: (B, n, G, dh) -> (B, n, H, dh)."""
    return x if x.shape[2] == heads else x.repeat_interleave(heads // x.shape[2], dim=2)


class PartialAttention(NamedTuple):
    """Attention to some of the keys, as a part of one softmax over all of them."""

    out: Tensor
    """(B, l, H, dh): attention to these keys only."""
    sums: Tensor
    """(B, l, H): the logarithm of the sum of the exponentials of their scores."""


def one_softmax(a: PartialAttention, b: PartialAttention) -> Tensor:
    """Return attention to the keys of both shares under one softmax, (B, l, H, dh).

    The weight of each share is proportional to the sum of its exponentials.
    """
    weight = torch.sigmoid(a.sums - b.sums).unsqueeze(-1)
    return (weight * a.out + (1 - weight) * b.out).to(a.out.dtype)


def sliding_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    window: Window,
    bias: Tensor | None = None,
    documents: Documents | None = None,
    tiles: tuple[Tensor, ...] | None = None,
) -> Tensor:
    """Attend from each query to the keys of its window: (B, l, H, dh), (B, p + l, G, *) -> (B, l, H, dh).

    Args:
        bias: (H, window + 1), added by distance q - k; None: no bias. FlexAttention also accepts fewer columns: larger
            distances use the last one.
        documents: the document of each key; keys of other documents are hidden.
        tiles: the result of `flex_mask.visited_tiles` for these queries and keys; None: computed when needed.
    """
    return _sliding(q, k, v, window, bias, documents, tiles, sums=False)[0]


def sliding_share(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    window: Window,
    bias: Tensor | None = None,
    documents: Documents | None = None,
    tiles: tuple[Tensor, ...] | None = None,
) -> PartialAttention:
    """Return the output of `sliding_attention`, and the sums that one softmax over more keys needs.

    Gradients flow through both.
    """
    return PartialAttention(*_sliding(q, k, v, window, bias, documents, tiles, sums=True))


def _sliding(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    window: Window,
    bias: Tensor | None,
    documents: Documents | None,
    tiles: tuple[Tensor, ...] | None,
    sums: bool,
) -> tuple[Tensor, Tensor | None]:
    k, v = k.to(q.dtype), v.to(q.dtype)
    path = attention_path(q.device)
    if path == "flex":
        begin = None if documents is None else documents.begin
        return flex_sliding_attention(q, k, v, window, bias, begin, tiles, sums)
    k, v = for_heads(k, q.shape[2]), for_heads(v, q.shape[2])
    if documents is not None:
        q, k = separate_documents(q, k, documents)
    tile = fused_tile(window.size)
    if path == "fused-tiles" and window.include_self and q.shape[1] % tile == 0:
        mask = band_mask(tile, window, None if bias is None else bias.detach(), q.device)
        return fused_sliding_attention(q, k, v, mask, bias, window.varying or window.size + 1, sums)
    mask = band_mask(min(QUERY_TILE, q.shape[1]), window, bias, q.device)
    tiles = sliding_tiles(q.shape[1], k.shape[1] - q.shape[1], window.size)
    return tiled_attention_and_sums(q, k, v, mask, tiles, empty_rows=not window.include_self)


def band_mask(tile: int, window: Window, bias: Tensor | None, device: torch.device) -> Tensor:
    """Return what is added to a tile's scores for the window before it and its own keys, (H or 1, t, W + t)."""
    size, nearest = window.size, 0 if window.include_self else 1
    distance = torch.arange(size, size + tile, device=device).unsqueeze(1)
    distance = distance - torch.arange(size + tile, device=device)
    seen = (distance >= nearest) & (distance < size + nearest)
    mask = torch.zeros(1, *distance.shape, device=device) if bias is None else bias[:, distance.clamp(0, size)]
    return mask.masked_fill(~seen, -HIDDEN)
