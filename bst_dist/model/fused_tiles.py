"""Sliding attention on a CPU: torch's fused attention kernel, a tile of queries at a time, with a learned bias.

As in `tiles`, a tile of t queries meets the window before it and its own keys, and scores never leave the kernel. The
kernel has no gradient for what is added to the scores. That of a bias by distance is made here, from a narrow band:
beyond `varying` positions all distances share one bias, and a softmax gives back a gradient that sums to zero over the
keys of a query, so the far ones together have minus what the near ones have. Where the sums of the exponentials are
asked for as well, a query's gradients sum to the gradient of its sum instead.

Shapes: B rows, l queries, p positions before them, H heads, dh head width, W window, t queries of a tile, K keys a tile
meets, M keys in the band.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

_attend = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_attend_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward

TILES_AT_ONCE = 16
"""Tiles of one call: work for many cores, and a bound on the gradients of tiles, in which keys stand several times."""

BAND_TILES_AT_ONCE = 4
"""The same for the band, whose scores should stay in a core's cache."""


def fused_tile(window: int) -> int:
    """Queries of a tile: 256 waste few keys on the mask and keep the kernel busy; a divisor of the window."""
    return next((tile for tile in (256, 128) if window % tile == 0), window)


def fused_sliding_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor, bias: Tensor | None, varying: int, sums: bool = False
) -> tuple[Tensor, Tensor | None]:
    """Softmax attention, scores not scaled: (B, l, H, dh), (B, p + l, H, dh), (B, p + l, H, <= dh) -> (B, l, H, <= dh).

    Returns also the logarithm of the sum of each query's exponentials, (B, l, H), if asked for.

    Args:
        mask: (H or 1, t, W + t), added to the scores of a tile, the bias included; l is a multiple of t, and t of it or
            less than W.
        bias: (H, W + 1) by distance, for its gradient; None when there is none.
        varying: from which distance on the bias is the same.
        sums: whether the sums are wanted.
    """
    width = v.shape[-1]
    if sums:  # one more channel, of zeros: the gradient of the sums goes to the kernel in it
        q, k = F.pad(q, (0, 1)), F.pad(k, (0, 1))
    v = F.pad(v, (0, q.shape[-1] - width))  # the kernel wants one width
    out, normalizer = _FusedTiles.apply(q, k, v, mask, bias, varying)
    return out[..., :width], normalizer if sums else None


class _Run(NamedTuple):
    """Tiles one after the other that meet equally many keys."""

    first: int
    """First query of the first tile."""
    tiles: int
    begin: int
    """First key of the first tile."""
    keys: int
    """Keys of each."""


def _runs(queries: int, before: int, window: int, tile: int, at_once: int) -> Iterator[_Run]:
    """All tiles, each meeting the `window` positions before it and its own; fewer where the stream begins."""
    first = 0
    while first < queries:
        begin = before + first - window
        tiles = 1 if begin < 0 else min(at_once, (queries - first) // tile)
        yield _Run(first, tiles, max(0, begin), window + tile + min(0, begin))
        first += tiles * tile


class _FusedTiles(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor, mask: Tensor, bias: Tensor | None, varying: int):
        tile, window = mask.shape[1], mask.shape[2] - mask.shape[1]
        out = torch.empty_like(q, memory_format=torch.contiguous_format)
        normalizer = q.new_empty(*q.shape[:-1], dtype=torch.promote_types(q.dtype, torch.float32))  # (B, l, H)
        for row in range(len(q)):
            for run in _runs(q.shape[1], k.shape[1] - q.shape[1], window, tile, TILES_AT_ONCE):
                tiles = _queries(q[row], run, tile), _keys(k[row], run, tile), _keys(v[row], run, tile)
                attended, sums = _attend(*tiles, 0.0, False, attn_mask=_last(mask, run.keys, q.dtype), scale=1.0)
                _queries(out[row], run, tile).copy_(attended)
                _queries(normalizer[row], run, tile).copy_(sums)
        ctx.save_for_backward(q, k, v, mask, out, normalizer)
        ctx.distances, ctx.varying = (None if bias is None else bias.shape[1]), varying
        ctx.set_materialize_grads(False)
        return out, normalizer

    @staticmethod
    def backward(ctx, d_out: Tensor | None, d_sums: Tensor | None):
        q, k, v, mask, out, normalizer = ctx.saved_tensors
        d_out = torch.zeros_like(out) if d_out is None else d_out
        if d_sums is not None:
            d_out, out = _with_gradient_of_sums(d_out, out, d_sums)
        tile, window = mask.shape[1], mask.shape[2] - mask.shape[1]
        dq = torch.empty_like(q)
        dk, dv = (torch.zeros(x.shape, dtype=normalizer.dtype, device=x.device) for x in (k, v))
        for row in range(len(q)):
            for run in _runs(q.shape[1], k.shape[1] - q.shape[1], window, tile, TILES_AT_ONCE):
                tiles = [_queries(x[row], run, tile) for x in (d_out, q)]
                tiles += [_keys(k[row], run, tile), _keys(v[row], run, tile)]
                tiles += [_queries(x[row], run, tile) for x in (out, normalizer)]
                mine = _attend_backward(*tiles, 0.0, False, attn_mask=_last(mask, run.keys, q.dtype), scale=1.0)
                _queries(dq[row], run, tile).copy_(mine[0])
                for whole, parts in ((dk[row], mine[1]), (dv[row], mine[2])):
                    for index, part in enumerate(parts.transpose(1, 2)):  # (K, H, dh)
                        whole[run.begin + index * tile :][: run.keys] += part
        d_bias = None
        if ctx.needs_input_grad[4]:
            d_bias = _bias_gradient(d_out, q, k, v, mask, out, normalizer, d_sums, ctx.distances, ctx.varying)
        return dq, dk.to(k.dtype), dv.to(v.dtype), None, d_bias, None


def _with_gradient_of_sums(d_out: Tensor, out: Tensor, d_sums: Tensor) -> tuple[Tensor, Tensor]:
    """Output and its gradient with the gradient of the sums in their last channel, (B, l, H, dh) each.

    The gradient of a score is its weight times (d_out . v - d_out . out + d_sums). The kernel makes d_out . out of what
    it is given, over all channels; the last one of v is zero.
    """
    d_sums = d_sums.unsqueeze(-1).to(d_out.dtype)
    return torch.cat((d_out[..., :-1], -d_sums), dim=-1), torch.cat((out[..., :-1], torch.ones_like(d_sums)), dim=-1)


def _bias_gradient(d_out: Tensor, q: Tensor, k: Tensor, v: Tensor, mask: Tensor, out: Tensor, normalizer: Tensor,
                   d_sums: Tensor | None, distances: int, varying: int) -> Tensor:  # fmt: skip
    """(H, W + 1): the gradient of the scores, summed over all pairs of a distance, near ones one by one."""
    tile, near, wide = _band_tile(mask.shape[1]), min(varying, distances), normalizer.dtype
    window = mask.shape[2] - mask.shape[1]
    mask = mask[:, :tile, window - near + 1 : window + tile].to(wide)  # of distance near - 1 + query - key
    band = torch.zeros(q.shape[2], *mask.shape[1:], dtype=wide, device=q.device)
    inner = (d_out.to(wide) * out).sum(-1)  # (B, l, H)
    for row in range(len(q)):
        for run in _runs(q.shape[1], k.shape[1] - q.shape[1], near - 1, tile, BAND_TILES_AT_ONCE):
            queries, gradient = (_queries(x[row], run, tile).to(wide) for x in (q, d_out))
            keys, values = (_keys(x[row], run, tile).to(wide) for x in (k, v))
            scores = (queries @ keys.mT).add_(_last(mask, run.keys, wide))  # (tiles, H, t, M)
            weights = scores.sub_(_queries(normalizer[row], run, tile).unsqueeze(-1)).exp_()
            d_scores = (gradient @ values.mT).sub_(_queries(inner[row], run, tile).unsqueeze(-1)).mul_(weights)
            band[..., -run.keys :] += d_scores.sum(0)
    query, key = (torch.arange(count, device=q.device) for count in mask.shape[1:])
    # No weight lies on what is masked; what lies beyond the near distances comes out of their sum.
    distance = (near - 1 + query.unsqueeze(1) - key).clamp_(0, min(near, distances - 1))
    d_bias = band.new_zeros(len(band), distances).index_add_(1, distance.flatten(), band.flatten(1))
    if near < distances:
        d_bias[:, near] = (0 if d_sums is None else d_sums.sum((0, 1))) - d_bias[:, :near].sum(1)
    return d_bias


def _band_tile(tile: int) -> int:
    """Queries of a tile where only the keys nearest to them count: fewer, since no window is to be shared."""
    return 64 if tile % 64 == 0 else tile


def _queries(x: Tensor, run: _Run, tile: int) -> Tensor:
    """(l, H, ...) -> (tiles, H, t, ...), without a copy."""
    return x[run.first : run.first + run.tiles * tile].unflatten(0, (run.tiles, tile)).transpose(1, 2)


def _keys(x: Tensor, run: _Run, tile: int) -> Tensor:
    """(p + l, H, dh) -> (tiles, H, K, dh), overlapping, without a copy."""
    stop = run.begin + (run.tiles - 1) * tile + run.keys
    return x[run.begin : stop].unfold(0, run.keys, tile).transpose(2, 3)


def _last(mask: Tensor, keys: int, dtype: torch.dtype) -> Tensor:
    """What is added to the scores of a tile's last keys, (1, H or 1, t, keys)."""
    return mask[None, ..., mask.shape[2] - keys :].to(dtype)
