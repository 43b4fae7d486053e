"""The gradient of the learned bias of FlexAttention, in plain torch and in a fixed order.

Shapes: B rows, l queries, p positions before them, H heads of queries, G of keys and values, dh head width, n tiles of
t queries.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from bst_dist.model.attention.flex_mask import TILE
from bst_dist.model.attention.window import Window


class Attention(NamedTuple):
    """The inputs and outputs of attention with a learned bias."""

    out: Tensor
    """(B, H, l, dh)."""
    lse: Tensor
    """(B, H, l): the logarithm of the sum of each query's exponentials."""
    bias: Tensor
    """(H, distances)."""
    q: Tensor
    """(B, H, l, dh)."""
    k: Tensor
    """(B, G, p + l, dh)."""
    v: Tensor
    """(B, G, p + l, dh)."""
    begin: Tensor | None
    """(B, l): the first key of each query's document; None: no document begins."""
    window: Window


def with_bias_gradient(attention: Attention, sums: bool) -> tuple[Tensor, Tensor]:
    """Return the attention's output and its sums unchanged; their backward pass computes the gradient of the bias too.

    q, k and v get no gradient from here, and lse only if `sums`.
    """
    detached = attention._replace(q=attention.q.detach(), k=attention.k.detach(), v=attention.v.detach())
    return _BiasGradient.apply(*detached, sums)


class _BiasGradient(torch.autograd.Function):
    """The identity on the attention's output and its sums. Its backward pass computes the gradient of the bias."""

    @staticmethod
    def forward(ctx, out, lse, bias, q, k, v, begin, window, sums):
        ctx.save_for_backward(out, lse, bias, q, k, v, begin)
        ctx.window, ctx.sums = window, sums
        return out.view_as(out), lse.view_as(lse)

    @staticmethod
    def backward(ctx, d_out, d_lse):
        d_lse = d_lse if ctx.sums else None
        d_bias = bias_gradient(Attention(*ctx.saved_tensors, ctx.window), d_out, d_lse)
        return d_out, d_lse, d_bias, None, None, None, None, None, None


def bias_gradient(attention: Attention, d_out: Tensor, d_lse: Tensor | None = None) -> Tensor:
    """Return the gradient of the bias, (H, distances): the gradient of the scores, summed over all pairs of a distance.

    Distances below `varying` (near) are computed one by one; from `varying` on (far) all share one bias. Softmax gives
    a gradient that sums to zero over the keys of a query, so the far distances together have minus the sum of the near
    ones. With a gradient of `lse`, near and far sum to that gradient instead. Products are in the dtype of the inputs,
    sums in single precision at least. Diagonals are summed by a reshape, without atomics.

    `d_out`: (B, H, l, dh). `d_lse`: (B, H, l).
    """
    d_bias = _near_gradient(attention, d_out, d_lse)
    near, distances = attention.window.varying, attention.bias.shape[1]
    if near < distances:
        far = -d_bias.sum(1, keepdim=True)
        far = far if d_lse is None else far + d_lse.sum((0, 2)).unsqueeze(1)
        d_bias = F.pad(torch.cat((d_bias, far), dim=1), (0, distances - near - 1))
    return d_bias.to(attention.bias.dtype)


def _near_gradient(attention: Attention, d_out: Tensor, d_lse: Tensor | None) -> Tensor:
    """Return the gradient of the bias for the near distances, (H, varying), from the diagonals of pairs of tiles."""
    out, lse, bias, q, k, v, begin, window = attention
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    wide = torch.promote_types(lse.dtype, torch.float32)
    near, length, before = window.varying, q.shape[2], k.shape[2] - q.shape[2]
    more = -length % TILE
    inner = (d_out.to(wide) * out).sum(-1)
    inner = inner if d_lse is None else inner - d_lse
    q, d_out = (_tiles(F.pad(x, (0, 0, 0, more))) for x in (q, d_out))  # (B, H, n, t, dh)
    inner, lse = (F.pad(x.to(wide), (0, more)).unflatten(2, (-1, TILE)).unsqueeze(-1) for x in (inner, lse))
    begin = None if begin is None else F.pad(begin, (0, more)).view(len(begin), 1, -1, TILE, 1)
    place = torch.arange(TILE, device=q.device)
    query = (before + torch.arange(length + more, device=q.device)).view(-1, TILE, 1)  # positions among the keys
    d_near = bias.new_zeros(len(bias), 0, dtype=wide)
    for shift in range(-(-near // TILE) + 1):
        first = before - shift * TILE  # where the key tile of the first query tile begins
        keys, values = (_tiles(_shifted(x, first, length + more)) for x in (k, v))
        distance = shift * TILE + place.unsqueeze(1) - place
        key = query - distance
        seen = (distance >= (0 if window.include_self else 1)) & (distance < near)
        seen = seen & (distance < window.size + (0 if window.include_self else 1))
        seen = seen & (key >= (0 if begin is None else begin)) & (query < before + length)
        scores = (q @ keys.mT).to(wide) + bias.to(wide)[:, distance.clamp(0, bias.shape[1] - 1)].unsqueeze(1)
        weights = torch.where(seen, torch.exp(scores - lse), 0.0)
        d_scores = ((d_out @ values.mT).to(wide) - inner) * weights
        sums = _by_distance(d_scores.sum((0, 2)))  # (H, 2 t - 1): distances from shift t - (t - 1) on
        d_near = sums[:, TILE - 1 :] if shift == 0 else _add_overlapping(d_near, sums)
    return d_near[:, :near]


def _tiles(x: Tensor) -> Tensor:
    """(B, H, n t, dh) -> (B, H, n, t, dh)."""
    return x.unflatten(2, (-1, TILE))


def _shifted(x: Tensor, first: int, length: int) -> Tensor:
    """Return positions first ... first + length - 1 of (B, H, keys, dh), zeros outside of the keys."""
    return F.pad(x, (0, 0, -first, first + length - x.shape[2]))


def _by_distance(x: Tensor) -> Tensor:
    """Return the sums of a tile's diagonals, by query - key from 1 - t to t - 1: (H, t, t) -> (H, 2 t - 1)."""
    side = x.shape[1]
    skewed = F.pad(x.flip(2), (0, side)).flatten(1)[:, : side * (2 * side - 1)]  # shifts each row by one more place
    return skewed.view(len(x), side, 2 * side - 1).sum(1)


def _add_overlapping(sums: Tensor, following: Tensor) -> Tensor:
    """Add the sums by distance of the next tile further back. Its first t - 1 distances overlap with the last sums."""
    shared = following.shape[1] // 2
    return torch.cat((sums[:, :-shared], sums[:, -shared:] + following[:, :shared], following[:, shared:]), dim=1)
