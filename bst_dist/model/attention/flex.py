"""Sliding attention on a GPU: FlexAttention, compiled to one fused kernel with its mask and bias (arXiv 2412.05496).

The kernel skips whole tiles outside the band and stores no scores. The learned bias is a constant of the kernel: a
kernel that differentiates it adds all scores to one small table by atomics, in no fixed order. Instead `flex_bias`
computes the gradient from the near diagonals, in plain torch and in a fixed order. So the result is deterministic.

What is compiled: in a compiled layer, FlexAttention is part of the layer's graph. Otherwise training has one graph for
its one shape, and calls without gradients share graphs with dynamic numbers of rows, queries and keys. Slices that are
not whole tiles (one token at a time, the rest of a prompt) are not compiled. More than GRAPHS graphs are an error,
because torch would continue with an uncompiled form that stores all scores.

Shapes: B rows, l queries, p positions before them, H heads of queries, G of keys and values (H where not said), dh head
width, W window.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import TypeVar

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention.flex_attention import AuxRequest, flex_attention

from bst_dist.model.attention.flex_bias import Attention, with_bias_gradient
from bst_dist.model.attention.flex_mask import TILE, Band, block_mask, visited_tiles
from bst_dist.model.attention.window import Window

T = TypeVar("T")

SHORT = 1024
"""Slices up to this length that are not whole tiles, or are one tile, do not use FlexAttention: they are short."""

GRAPHS = 16
"""Limit on the graphs of FlexAttention, with and without gradients, and separately on those of layers; one more fails.

Compiled layers need the most, ten: two kinds of layers, each with micro-batches of two sizes; with masked documents,
the kind with an SSM has four graphs for each size (`document_mask.SHARES`)."""

NARROWEST = 16
"""Least channels of a head that Inductor's FlexAttention accepts (torch 2.13); narrower ones are padded with zeros."""

BACKEND = "inductor"
"""The compiler backend for FlexAttention. Tests on a CPU replace it."""


def flex_sliding_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    window: Window,
    bias: Tensor | None = None,
    begin: Tensor | None = None,
    tiles: tuple[Tensor, ...] | None = None,
    sums: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Compute `attention.sliding_attention`, with documents as `begin` (B, l) int32: the first key each query may see.

    Return also the logarithm of the sum of each query's exponentials, (B, l, H), if `sums`, else None.

    `tiles`: the result of `visited_tiles`; None: made here, which within a graph is not possible. FlexAttention finds a
    row's tables by the stride of the dimension of heads, whose size is one. Inductor (torch 2.11 and 2.13) gives tables
    that a graph makes the stride 0 there, so every row would get the tiles of the first. Inputs of a graph keep theirs.
    """
    if not uses_flex_tiles(q.shape[1]):
        out, logarithm = short_attention(q, k, v, window, bias, begin)
        return out, logarithm if sums else None
    varying = min(window.varying or window.size + 1, window.size + 1 if bias is None else bias.shape[1])
    window = Window(window.size, window.include_self, varying)
    if torch.compiler.is_compiling():
        if tiles is None:
            raise ValueError("FlexAttention's tiles must be made outside of the graph")
        return _attend(q, k, v, window, bias, begin, tiles, sums)
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (q, k, v, bias)):
        if tiles is None:
            tiles = visited_tiles(Band(q.shape[1], k.shape[1], window), q.device, begin)
        return limited(_compiled(_attend, BACKEND, dynamic=False), q, k, v, window, bias, begin, tiles, sums)
    return _without_gradients(q, k, v, window, bias, begin, sums)


def uses_flex_tiles(length: int) -> bool:
    """Whether FlexAttention computes a slice of this many queries."""
    return length >= 2 * TILE and (length % TILE == 0 or length > SHORT)


def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    window: Window,
    bias: Tensor | None,
    begin: Tensor | None,
    tiles: tuple[Tensor, ...],
    sums: bool,
    before: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Call FlexAttention, and attach the computation of the bias's gradient.

    `before`: `Band.before` as a tensor; None: it is a constant of the graph.
    """
    width = q.shape[-1]
    if width < NARROWEST:  # scores stay the same: zeros add nothing, and the scale does not depend on the width
        q, k, v = (F.pad(x, (0, NARROWEST - width)) for x in (q, k, v))
    band = Band(q.shape[1], k.shape[1], window)
    constant = None if bias is None else bias.detach()
    before = band.before if before is None else before

    def add_bias(score: Tensor, b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return score + constant[h, (query + before - key).clamp(0, constant.shape[1] - 1)]

    mask = block_mask(band, begin, tiles, before)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    out, aux = flex_attention(
        q,
        k,
        v,
        None if bias is None else add_bias,
        mask,
        scale=1.0,
        enable_gqa=k.shape[1] < q.shape[1],
        return_aux=AuxRequest(lse=True),
    )
    lse = aux.lse if sums else aux.lse.detach()
    if bias is not None and bias.requires_grad:
        out, lse = with_bias_gradient(Attention(out, lse, bias, q, k, v, begin, window), sums)
    out = out if width >= NARROWEST else out[..., :width]
    return out.transpose(1, 2), lse.transpose(1, 2) if sums else None


def _without_gradients(
    q: Tensor, k: Tensor, v: Tensor, window: Window, bias: Tensor | None, begin: Tensor | None, sums: bool
) -> tuple[Tensor, Tensor | None]:
    """Return what `flex_sliding_attention` returns, without gradients, from graphs that serve every batch and length.

    torch compiles equal and unequal lengths of queries and keys separately, as it does one row and several rows. So a
    stream that has just begun gets hidden keys in front, and has unequal lengths like a later slice. The number of keys
    before the first query is a tensor: Inductor of torch 2.11 supports no difference of dynamic lengths in a mask.
    """
    missing = max(0, min(window.size, TILE) - (k.shape[1] - q.shape[1]))
    q, k, v = (F.pad(x, (0, 0, 0, 0, more, 0)).contiguous() for x, more in ((q, 0), (k, missing), (v, missing)))
    begin = q.new_zeros(1, q.shape[1], dtype=torch.int32) if begin is None else begin
    begin = (begin + missing).expand(len(q), -1).contiguous()
    band = Band(q.shape[1], k.shape[1], window)
    tiles = visited_tiles(band, q.device, begin)
    before = q.new_full((), band.before, dtype=torch.int32)
    for x in (q, k, v, begin, *tiles):
        torch._dynamo.maybe_mark_dynamic(x, 0)
        torch._dynamo.maybe_mark_dynamic(x, 1)
    for x in tiles:
        for dimension in range(2, x.dim()):
            torch._dynamo.maybe_mark_dynamic(x, dimension)
    with torch.no_grad():
        bias = None if bias is None else bias.detach()
        return limited(_compiled(_attend, BACKEND, dynamic=None), q, k, v, window, bias, begin, tiles, sums, before)


@cache
def _compiled(function: Callable[..., Tensor], backend: object, dynamic: bool | None) -> Callable[..., Tensor]:
    def attend(*arguments: object) -> Tensor:  # torch counts graphs by code object; all calls share this one
        return function(*arguments)

    return torch.compile(attend, fullgraph=True, dynamic=dynamic, backend=backend)


def limited(compiled: Callable[..., T], *arguments: object, graphs: int | None = None) -> T:
    """Call a compiled function, which may have at most that many graphs; None: GRAPHS.

    The backward pass is compiled as it runs, outside of autocast. By default torch would trace it under the autocast of
    the forward pass, even where the forward pass disables autocast. This would cast the SSM's single precision.
    """
    with (
        torch._dynamo.config.patch(recompile_limit=graphs or GRAPHS),
        torch._functorch.config.patch(backward_pass_autocast="off"),
    ):
        return compiled(*arguments)


def short_attention(
    q: Tensor, k: Tensor, v: Tensor, window: Window, bias: Tensor | None, begin: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Return the output and the sums of `flex_sliding_attention` for few queries; all scores are stored.

    Shapes: q (B, l, H, dh), k and v (B, p + l, G, dh).
    """
    band = Band(q.shape[1], k.shape[1], window)
    query = torch.arange(band.length, device=q.device).unsqueeze(1)
    key = torch.arange(band.keys, device=q.device)
    seen = band.mask()(None, None, query, key)
    if begin is not None:
        seen = seen & (key >= begin.view(len(begin), 1, -1, 1))
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    scores = (q @ k.mT).to(torch.promote_types(q.dtype, torch.float32))
    if bias is not None:
        scores = scores + bias[:, (query + band.before - key).clamp(0, bias.shape[1] - 1)]
    scores = scores.masked_fill(~seen, torch.finfo(scores.dtype).min)
    out = (torch.softmax(scores, dim=-1) * seen).to(v.dtype) @ v
    return out.transpose(1, 2), torch.logsumexp(scores, dim=-1).transpose(1, 2)
