"""Causal attention in tiles of queries. The backward pass recomputes the same tiles.

A tile of t queries meets only the keys that some of its queries may see: the window before them and their own. Scores
exist for one tile at a time, so memory is linear in the length. They stay in the cache of a CPU core, where this takes
half the time of attention over whole blocks. It works like the fused kernels of a GPU, on any device.

Shapes: B rows, l queries, p positions before them, H heads, dh head width, t queries of a tile, K keys it meets.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

QUERY_TILE = 128
"""Queries per tile: few enough to waste little on masked keys, many enough for an efficient matmul."""

# Subtracted from hidden scores. Far above any sum of normalised scores and biases, so that exp underflows to an exact
# zero; finite, so that a row without visible keys gives no NaN; a power of two, so that it is exact in bfloat16.
HIDDEN = 16384.0


class Tile(NamedTuple):
    """Queries first ... last - 1 against keys begin ... end - 1."""

    first: int
    last: int
    begin: int
    end: int


def sliding_tiles(queries: int, before: int, window: int) -> Iterator[Tile]:
    """Yield the tiles. Each meets the `window` positions before its first query, and its own positions."""
    for first in range(0, queries, QUERY_TILE):
        last = min(first + QUERY_TILE, queries)
        yield Tile(first, last, max(0, before + first - window), before + last)


def tiled_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, tiles: Iterable[Tile], empty_rows: bool = False):
    """Softmax attention without scaling of the scores: (B, l, H, dh), (B, p + l, H, dh) twice -> (B, l, H, dh).

    Args:
        mask: (H or 1, t, M), added to the scores of the last M keys up to a tile's own end: column M - t + i meets
            the key at query i's own position. Keys before those M are seen by all queries of the tile.
        tiles: the keys that each run of t queries meets; the last run may be shorter.
        empty_rows: whether the mask can hide every key of a query; the output of such a query is zero.
    """
    return tiled_attention_and_sums(q, k, v, mask, tiles, empty_rows)[0]


def tiled_attention_and_sums(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor, tiles: Iterable[Tile], empty_rows: bool = False
) -> tuple[Tensor, Tensor]:
    """Return the output of `tiled_attention`, and the logarithm of the sum of each query's exponentials, (B, l, H)."""
    return _TiledAttention.apply(q, k, v, mask, tuple(tiles), empty_rows)


class _TiledAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor, mask: Tensor, tiles: tuple[Tile, ...], empty_rows: bool):
        out = torch.empty(*q.shape[:-1], v.shape[-1], dtype=v.dtype, device=v.device)
        sums = out.new_empty(q.shape[:-1], dtype=torch.promote_types(q.dtype, torch.float32))
        for row in range(len(q)):
            for tile in tiles:
                heads = _heads(q[row], k[row], v[row], tile)
                weights, logarithm = _weights(heads.q, heads.k, mask, tile, k.shape[1] - q.shape[1], empty_rows)
                _by_head(out[row], tile.first, tile.last).copy_(weights.to(v.dtype) @ heads.v)
                sums[row, tile.first : tile.last] = logarithm.mT
        ctx.save_for_backward(q, k, v, mask)
        ctx.tiles, ctx.empty_rows = tiles, empty_rows
        ctx.set_materialize_grads(False)
        return out, sums

    @staticmethod
    def backward(ctx, d_out: Tensor | None, d_sums: Tensor | None):
        q, k, v, mask = ctx.saved_tensors
        d_out = v.new_zeros(*q.shape[:-1], v.shape[-1]) if d_out is None else d_out
        before = k.shape[1] - q.shape[1]
        wide = torch.promote_types(q.dtype, torch.float32)
        dq = torch.empty_like(q)
        dk, dv = (x.new_zeros(x.shape[0], x.shape[2], x.shape[1], x.shape[3], dtype=wide) for x in (k, v))
        d_mask = torch.zeros_like(mask, dtype=wide)
        for row in range(len(q)):
            for tile in ctx.tiles:
                heads = _heads(q[row], k[row], v[row], tile)
                keys = slice(tile.begin, tile.end)
                weights, _ = _weights(heads.q, heads.k, mask, tile, before, ctx.empty_rows)
                d = _by_head(d_out[row], tile.first, tile.last)
                dv[row, :, keys] += weights.to(v.dtype).mT @ d
                d_weights = (d @ heads.v.mT).to(wide)
                d_scores = torch.ops.aten._softmax_backward_data(d_weights, weights, -1, wide)
                if d_sums is not None:
                    d_scores += weights * d_sums[row, tile.first : tile.last].mT.unsqueeze(-1)
                if ctx.needs_input_grad[3]:
                    covered, columns = _covered(mask, tile, before)
                    d_bias = d_scores[..., covered:]
                    d_mask[:, : d_bias.shape[1], columns] += d_bias if len(mask) > 1 else d_bias.sum(0, keepdim=True)
                d_scores = d_scores.to(q.dtype)
                _by_head(dq[row], tile.first, tile.last).copy_(d_scores @ heads.k)
                dk[row, :, keys] += d_scores.mT @ heads.q
        return dq, dk.transpose(1, 2).to(k.dtype), dv.transpose(1, 2).to(v.dtype), d_mask.to(mask.dtype), None, None


class _Heads(NamedTuple):
    """One row's part of a tile, with heads as the first dimension."""

    q: Tensor  # (H, t, dh)
    k: Tensor  # (H, K, dh)
    v: Tensor  # (H, K, dh)


def _heads(q: Tensor, k: Tensor, v: Tensor, tile: Tile) -> _Heads:
    return _Heads(
        _by_head(q, tile.first, tile.last), _by_head(k, tile.begin, tile.end), _by_head(v, tile.begin, tile.end)
    )


def _by_head(x: Tensor, begin: int, end: int) -> Tensor:
    """Return positions of (l, H, dh) as (H, positions, dh), without a copy."""
    return x[begin:end].transpose(0, 1)


def _weights(q: Tensor, k: Tensor, mask: Tensor, tile: Tile, before: int, empty_rows: bool) -> tuple[Tensor, Tensor]:
    """Return a tile's attention weights, (H, t, K), and the logarithm of each query's sum of exponentials, (H, t).

    Both are in single precision at least.
    """
    scores = (q @ k.mT).to(torch.promote_types(q.dtype, torch.float32))
    covered, columns = _covered(mask, tile, before)
    scores[..., covered:] += mask[:, : scores.shape[1], columns]
    weights = torch.softmax(scores, dim=-1)
    highest = scores.amax(-1, keepdim=True)
    # The highest score has the weight exp(highest) / sum.
    logarithm = (highest - weights.amax(-1, keepdim=True).log()).squeeze(-1)
    return weights * (highest > -HIDDEN / 2) if empty_rows else weights, logarithm


def _covered(mask: Tensor, tile: Tile, before: int) -> tuple[int, slice]:
    """Return the index of the tile's first key that the mask covers, and the mask's columns from there on."""
    origin = before + tile.first - (mask.shape[2] - mask.shape[1])  # position of the mask's first column
    begin = max(tile.begin, origin)
    return begin - tile.begin, slice(begin - origin, tile.end - origin)
