"""Sliding attention on a CPU: torch's fused attention kernel on one tile of queries at a time, with a learned bias.

As in `tiles`, a tile of t queries meets the window before it and its own keys. Scores stay inside the kernel. The
kernel has no gradient for the tensor added to the scores, so this module computes the gradient of a bias by distance,
from a narrow band. From distance `varying` on (far) all distances share one bias. Softmax gives a gradient that sums to
zero over the keys of a query, so the far distances together have minus the sum of the near ones. If the sums of the
exponentials are returned too, a query's gradients sum to the gradient of its sum instead.

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

QUERIES_AT_ONCE = 4096
"""Queries per kernel call: work for many cores, and a bound on the memory of the gradients of tiles, which hold keys
several times. Short rows share a call, because one call costs as much as many small tiles."""

BAND_SCORES_AT_ONCE = 50_000
"""Scores of the band per call and head: few enough to stay in a core's cache."""

SMALLEST = -80.0
"""Lower bound on the logarithm of a weight; exp(-80) is 2e-35. MKL's exponential is ten times slower when its result
underflows, as it would for masked scores."""


def fused_tile(window: int) -> int:
    """Return the queries per tile, a divisor of the window. 256 waste few keys on the mask and keep the kernel busy."""
    return next((tile for tile in (256, 128) if window % tile == 0), window)


def fused_sliding_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor, bias: Tensor | None, varying: int, sums: bool = False
) -> tuple[Tensor, Tensor | None]:
    """Unscaled softmax attention: (B, l, H, dh), (B, p + l, H, dh), (B, p + l, H, <= dh) -> (B, l, H, <= dh).

    Return also the logarithm of the sum of each query's exponentials, (B, l, H), if `sums`, else None.

    Args:
        mask: (H or 1, t, W + t), added to the scores of a tile; includes the bias. l and W are multiples of t.
        bias: (H, W + 1) by distance, used only for its gradient; None: no bias.
        varying: the bias is constant from this distance on.
        sums: whether to return the sums.
    """
    width = v.shape[-1]
    if sums:  # one more channel of zeros; it carries the gradient of the sums to the kernel
        q, k = F.pad(q, (0, 1)), F.pad(k, (0, 1))
    v = F.pad(v, (0, q.shape[-1] - width))  # the kernel requires equal widths
    out, normalizer = _FusedTiles.apply(q, k, v, mask, bias, varying)
    return out[..., :width], normalizer if sums else None


class _Run(NamedTuple):
    """Consecutive tiles, of some rows, that meet equally many keys."""

    rows: slice
    first: int
    """First query of the first tile."""
    tiles: int
    """Tiles per row."""
    begin: int
    """First key of the first tile."""
    keys: int
    """Keys per tile."""


def _runs(q: Tensor, k: Tensor, window: int, tile: int, at_once: int) -> Iterator[_Run]:
    """Yield all tiles of (B, l, ...) and (B, p + l, ...) in runs of at most `at_once` tiles, but at least one.

    Each tile meets the `window` positions before it and its own; fewer at the beginning of the stream.
    """
    (rows, queries), before = q.shape[:2], k.shape[1] - q.shape[1]
    together = max(1, at_once * tile // queries)
    for row in range(0, rows, together):
        first = 0
        while first < queries:
            begin = before + first - window
            tiles = 1 if begin < 0 else min(max(1, at_once), (queries - first) // tile)
            yield _Run(slice(row, row + together), first, tiles, max(0, begin), window + tile + min(0, begin))
            first += tiles * tile


class _FusedTiles(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor, mask: Tensor, bias: Tensor | None, varying: int):
        tile, window = mask.shape[1], mask.shape[2] - mask.shape[1]
        out = torch.empty_like(q, memory_format=torch.contiguous_format)
        normalizer = q.new_empty(*q.shape[:-1], dtype=torch.promote_types(q.dtype, torch.float32))  # (B, l, H)
        for run in _runs(q, k, window, tile, QUERIES_AT_ONCE // tile):
            tiles = _queries(q, run, tile), _keys(k, run, tile), _keys(v, run, tile)
            attended, sums = _attend(*tiles, 0.0, False, attn_mask=_last(mask, run.keys, q.dtype), scale=1.0)
            _write(out, run, tile, attended)
            _write(normalizer, run, tile, sums)
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
        for run in _runs(q, k, window, tile, QUERIES_AT_ONCE // tile):
            tiles = [_queries(x, run, tile) for x in (d_out, q)]
            tiles += [_keys(k, run, tile), _keys(v, run, tile)]
            tiles += [_queries(x, run, tile) for x in (out, normalizer)]
            mine = _attend_backward(*tiles, 0.0, False, attn_mask=_last(mask, run.keys, q.dtype), scale=1.0)
            _write(dq, run, tile, mine[0])
            _add_keys(dk, run, tile, mine[1])
            _add_keys(dv, run, tile, mine[2])
        d_bias = None
        if ctx.needs_input_grad[4]:
            d_bias = _bias_gradient(d_out, q, k, v, mask, out, normalizer, d_sums, ctx.distances, ctx.varying)
        return dq, dk.to(k.dtype), dv.to(v.dtype), None, d_bias, None


def _with_gradient_of_sums(d_out: Tensor, out: Tensor, d_sums: Tensor) -> tuple[Tensor, Tensor]:
    """Return the output's gradient and the output, with the sums' gradient in the last channel, (B, l, H, dh) each.

    The gradient of a score is its weight times (d_out . v - d_out . out + d_sums). The kernel computes d_out . out from
    its inputs, over all channels; the last channel of v is zero.
    """
    d_sums = d_sums.unsqueeze(-1).to(d_out.dtype)
    return torch.cat((d_out[..., :-1], -d_sums), dim=-1), torch.cat((out[..., :-1], torch.ones_like(d_sums)), dim=-1)


def _bias_gradient(
    d_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor,
    out: Tensor,
    normalizer: Tensor,
    d_sums: Tensor | None,
    distances: int,
    varying: int,
) -> Tensor:
    """Return the gradient of the bias, (H, W + 1): the gradient of the scores, summed over all pairs of a distance."""
    tile = _band_tile(mask.shape[1])
    near = min(varying, distances)
    wide = normalizer.dtype
    window = mask.shape[2] - mask.shape[1]
    mask = mask[:, :tile, window - near + 1 : window + tile].to(wide)  # of distance near - 1 + query - key
    band = torch.zeros(q.shape[2], *mask.shape[1:], dtype=wide, device=q.device)
    inner = (d_out.to(wide) * out).sum(-1)  # (B, l, H)
    for run in _runs(q, k, near - 1, tile, BAND_SCORES_AT_ONCE // mask[0].numel()):
        queries, gradient = (_queries(x, run, tile).to(wide) for x in (q, d_out))
        keys, values = (_keys(x, run, tile).to(wide) for x in (k, v))
        scores = (queries @ keys.mT).add_(_last(mask, run.keys, wide))  # (tiles, H, t, M)
        scores.sub_(_queries(normalizer, run, tile).unsqueeze(-1))
        weights = scores.clamp_(min=SMALLEST).exp_()
        d_scores = (gradient @ values.mT).sub_(_queries(inner, run, tile).unsqueeze(-1)).mul_(weights)
        band[..., -run.keys :] += d_scores.sum(0)
    query, key = (torch.arange(count, device=q.device) for count in mask.shape[1:])
    # Masked scores have weight zero. The gradient beyond the near distances follows from the sum of the near ones.
    distance = (near - 1 + query.unsqueeze(1) - key).clamp_(0, min(near, distances - 1))
    d_bias = band.new_zeros(len(band), distances).index_add_(1, distance.flatten(), band.flatten(1))
    if near < distances:
        d_bias[:, near] = (0 if d_sums is None else d_sums.sum((0, 1))) - d_bias[:, :near].sum(1)
    return d_bias


def _band_tile(tile: int) -> int:
    """Return the queries per tile of the band. They are fewer, because there is no whole window to share."""
    return 64 if tile % 64 == 0 else tile


def _queries(x: Tensor, run: _Run, tile: int) -> Tensor:
    """Return a run's queries, (B, l, H, ...) -> (rows tiles, H, t, ...), without a copy for one row."""
    return _of_queries(x, run, tile).flatten(0, 1).transpose(1, 2)


def _write(x: Tensor, run: _Run, tile: int, values: Tensor) -> None:
    """Write (rows tiles, H, t, ...) to the place that `_queries` reads."""
    to = _of_queries(x, run, tile)
    to.copy_(values.transpose(1, 2).view_as(to))


def _of_queries(x: Tensor, run: _Run, tile: int) -> Tensor:
    """Return a view of a run's queries, (B, l, ...) -> (rows, tiles, t, ...)."""
    return x[run.rows, run.first : run.first + run.tiles * tile].unflatten(1, (run.tiles, tile))


def _keys(x: Tensor, run: _Run, tile: int) -> Tensor:
    """Return the overlapping keys of a run, (B, p + l, H, dh) -> (rows tiles, H, K, dh), without a copy for one row."""
    stop = run.begin + (run.tiles - 1) * tile + run.keys
    return x[run.rows, run.begin : stop].unfold(1, run.keys, tile).movedim(-1, 2).flatten(0, 1).transpose(1, 2)


def _add_keys(x: Tensor, run: _Run, tile: int, values: Tensor) -> None:
    """Add (rows tiles, H, K, dh) to the place that `_keys` reads; for each key, the first tile is added first."""
    rows = x[run.rows]
    values = values.transpose(1, 2).unflatten(0, (len(rows), run.tiles))  # (rows, tiles, K, H, dh)
    step = run.keys if run.tiles == 1 else tile
    for offset in reversed(range(0, run.keys, step)):
        begin = run.begin + offset
        to = rows[:, begin : begin + run.tiles * step].unflatten(1, (run.tiles, step))
        to += values[:, :, offset : offset + step]


def _last(mask: Tensor, keys: int, dtype: torch.dtype) -> Tensor:
    """Return the mask's columns for a tile's last keys, (1, H or 1, t, keys)."""
    return mask[None, ..., mask.shape[2] - keys :].to(dtype)
