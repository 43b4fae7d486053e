"""Sliding attention on a GPU: FlexAttention, compiled to one fused kernel with its mask and bias (arXiv 2412.05496).

It skips whole tiles outside the band, keeps no scores, and differentiates the bias. It has no backward pass on a CPU.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, lru_cache

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

Mask = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
TILE = 128
"""Queries, and keys, of a tile: FlexAttention's own default."""


def flex_sliding_attention(
    q: Tensor, k: Tensor, v: Tensor, window: int, bias: Tensor | None, include_self: bool, documents: Tensor | None
) -> Tensor:
    """As `attention.sliding_attention`, with documents (B, p + l) int: which document each position belongs to."""
    length, keys = q.shape[1], k.shape[1]
    before = keys - length
    band = Band(length, keys, window, include_self)
    seen = band.mask()

    def same_document(b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return seen(b, h, query, key) & (documents[b, query + before] == documents[b, key])

    def add_bias(score: Tensor, b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return score + bias[h, (query + before - key).clamp(0, window)]

    blocks = block_mask(band, str(q.device), None if documents is None else same_document)
    attend = _compiled() if q.is_cuda else flex_attention
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    out = attend(q, k, v, score_mod=None if bias is None else add_bias, block_mask=blocks, scale=1.0)
    return out.transpose(1, 2)


@dataclass(frozen=True)
class Band:
    """Which keys each query sees: the last ones up to its own, in whichever document."""

    length: int
    """Queries l."""
    keys: int
    """p + l, of which the last l are at the queries' own positions."""
    window: int
    include_self: bool

    def mask(self) -> Mask:
        """The same in FlexAttention's form, which must be a plain function."""
        before, nearest, window = self.keys - self.length, self.nearest, self.window

        def seen(b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
            distance = query + before - key
            return (distance >= nearest) & (distance < window + nearest)

        return seen

    @property
    def nearest(self) -> int:
        """The smallest distance seen."""
        return 0 if self.include_self else 1


def block_mask(band: Band, device: str, finer: Mask | None = None) -> BlockMask:
    """Which tiles FlexAttention visits, from the band's arithmetic; `finer` is a mask that hides more of them.

    torch's `create_block_mask` would make the whole (l, p + l) mask first: 16 GB for a slice of 128k tokens.
    """
    touched, inside = _tiles_of(band, device)
    if finer is not None:
        return _of_tiles(touched, None, finer, band)
    return _of_tiles(touched & ~inside, inside, band.mask(), band)


@lru_cache(maxsize=8)
def _tiles_of(band: Band, device: str) -> tuple[Tensor, Tensor]:
    """Tiles of which some pair is seen, and those of which all pairs are, (tiles of queries, tiles of keys) bool."""
    first_query = torch.arange(0, band.length, TILE, device=device).unsqueeze(1) + band.keys - band.length
    first_key = torch.arange(0, band.keys, TILE, device=device)
    last_query = (first_query + TILE - 1).clamp(max=band.keys - 1)
    last_key = (first_key + TILE - 1).clamp(max=band.keys - 1)
    nearest, furthest = first_query - last_key, last_query - first_key
    touched = (furthest >= band.nearest) & (nearest < band.window + band.nearest)
    inside = (nearest >= band.nearest) & (furthest < band.window + band.nearest)
    whole = (last_query - first_query == TILE - 1) & (last_key - first_key == TILE - 1)
    return touched, inside & whole


def _of_tiles(partial: Tensor, full: Tensor | None, mask: Mask, band: Band) -> BlockMask:
    visited = [*_in_order(partial), *((None, None) if full is None else _in_order(full))]
    return BlockMask.from_kv_blocks(*visited, BLOCK_SIZE=TILE, mask_mod=mask, seq_lengths=(band.length, band.keys))


def _in_order(tiles: Tensor) -> tuple[Tensor, Tensor]:
    """How many tiles of keys each tile of queries visits, (1, 1, rows), and all of them, those first."""
    order = tiles.int().argsort(dim=1, descending=True, stable=True).int()
    return tiles.sum(1, dtype=torch.int32)[None, None], order[None, None].contiguous()


@cache
def _compiled() -> Callable[..., Tensor]:
    return torch.compile(flex_attention, dynamic=False)
