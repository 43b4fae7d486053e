"""Sliding attention on a GPU: FlexAttention, compiled to one fused kernel with its mask and bias (arXiv 2412.05496).

The kernel skips whole tiles outside the band and stores no scores. The learned bias is a constant of the kernel: a
kernel that differentiates it adds all scores to one small table by atomics, in no fixed order. Instead `bias_gradient`
computes the gradient from the near diagonals, in plain torch and in a fixed order. So the result is deterministic.

What is compiled: in a compiled layer, FlexAttention is part of the layer's graph. Otherwise training has one graph for
its one shape, and calls without gradients share graphs with dynamic numbers of rows, queries and keys. Slices that are
not whole tiles (one token at a time, the rest of a prompt) are not compiled. More than GRAPHS graphs are an error,
because torch would continue with an uncompiled form that stores all scores.

Shapes: B rows, l queries, p positions before them, H heads of queries, G of keys and values (H where not said), dh head
width, W window, t queries or keys of a tile.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, flex_attention

T = TypeVar("T")
Mask = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]

TILE = 128
"""Queries per tile, and keys per tile: FlexAttention's default."""

SHORT = 1024
"""Slices up to this length that are not whole tiles, or are one tile, do not use FlexAttention: they are short."""

GRAPHS = 16
"""Limit on the graphs of FlexAttention, with and without gradients, and separately on those of layers; one more fails.

Compiled layers need the most, ten: two kinds of layers, each with micro-batches of two sizes; with masked documents,
the kind with an SSM has four graphs for each size (`borders.SHARES`)."""

BACKEND = "inductor"
"""The compiler backend for FlexAttention. Tests on a CPU replace it."""


def flex_sliding_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    window: int,
    bias: Tensor | None,
    include_self: bool,
    begin: Tensor | None = None,
    varying: int | None = None,
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
        out, logarithm = short_attention(q, k, v, window, bias, include_self, begin)
        return out, logarithm if sums else None
    varying = min(varying or window + 1, window + 1 if bias is None else bias.shape[1])
    settings = Settings(window, include_self, varying, sums)
    if torch.compiler.is_compiling():
        if tiles is None:
            raise ValueError("FlexAttention's tiles must be made outside of the graph")
        return _attend(q, k, v, bias, begin, settings, tiles)
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (q, k, v, bias)):
        if tiles is None:
            tiles = visited_tiles(Band(q.shape[1], k.shape[1], window, include_self), q.device, begin)
        return limited(_compiled(_attend, BACKEND, dynamic=False), q, k, v, bias, begin, settings, tiles)
    return _without_gradients(q, k, v, bias, begin, settings)


def uses_flex_tiles(length: int) -> bool:
    """Whether FlexAttention computes a slice of this many queries."""
    return length >= 2 * TILE and (length % TILE == 0 or length > SHORT)


class Settings(NamedTuple):
    """The settings of one layer's attention that do not depend on the slice."""

    window: int
    include_self: bool
    varying: int
    """The bias is constant from this distance on."""
    sums: bool = False
    """Whether to return the sums of the exponentials too."""


def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    begin: Tensor | None,
    settings: Settings,
    tiles: tuple[Tensor, ...],
    before: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Call FlexAttention, and attach the computation of the bias's gradient.

    `before`: `Band.before` as a tensor; None: it is a constant of the graph.
    """
    band = Band(q.shape[1], k.shape[1], settings.window, settings.include_self)
    constant, before = None if bias is None else bias.detach(), band.before if before is None else before

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
    lse = aux.lse if settings.sums else aux.lse.detach()
    if bias is not None and bias.requires_grad:
        out, lse = _BiasGradient.apply(out, lse, bias, q.detach(), k.detach(), v.detach(), begin, settings)
    return out.transpose(1, 2), lse.transpose(1, 2) if settings.sums else None


def _without_gradients(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, begin: Tensor | None, settings: Settings
) -> tuple[Tensor, Tensor | None]:
    """Do the same in graphs that serve every batch size and length.

    torch compiles equal and unequal lengths of queries and keys separately, as it does one row and several rows. So a
    stream that has just begun gets hidden keys in front, and has unequal lengths like a later slice. The number of keys
    before the first query is a tensor: Inductor of torch 2.11 supports no difference of dynamic lengths in a mask.
    """
    missing = max(0, min(settings.window, TILE) - (k.shape[1] - q.shape[1]))
    q, k, v = (F.pad(x, (0, 0, 0, 0, more, 0)).contiguous() for x, more in ((q, 0), (k, missing), (v, missing)))
    begin = q.new_zeros(1, q.shape[1], dtype=torch.int32) if begin is None else begin
    begin = (begin + missing).expand(len(q), -1).contiguous()
    band = Band(q.shape[1], k.shape[1], settings.window, settings.include_self)
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
        return limited(_compiled(_attend, BACKEND, dynamic=None), q, k, v, bias, begin, settings, tiles, before)


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


@dataclass(frozen=True)
class Band:
    """The keys that each query sees: the last ones up to its own position."""

    length: int
    """Number of queries l."""
    keys: int
    """Number of keys, p + l. The last l are at the queries' own positions."""
    window: int
    include_self: bool

    @property
    def before(self) -> int:
        """Positions before the first query, p."""
        return self.keys - self.length

    @property
    def nearest(self) -> int:
        """The smallest distance seen."""
        return 0 if self.include_self else 1

    def mask(self, begin: Tensor | None = None, before: Tensor | int | None = None) -> Mask:
        """Return FlexAttention's mask function, which must be a plain function. `before` replaces this band's."""
        before, nearest, window = self.before if before is None else before, self.nearest, self.window

        def seen(b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
            distance = query + before - key
            return (distance >= nearest) & (distance < window + nearest)

        def seen_in_document(b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
            return seen(b, h, query, key) & (key >= begin[b, query])

        return seen if begin is None else seen_in_document


def block_mask(
    band: Band, begin: Tensor | None, tiles: tuple[Tensor, ...], before: Tensor | int | None = None
) -> BlockMask:
    """Return band and documents as FlexAttention's mask, with the tiles to visit; `before`: see `Band.mask`."""
    return BlockMask((band.length, band.keys), *tiles, BLOCK_SIZE=(TILE, TILE), mask_mod=band.mask(begin, before))


def visited_tiles(band: Band, device: torch.device | str, begin: Tensor | None = None) -> tuple[Tensor, ...]:
    """Return the tiles that FlexAttention visits, by arithmetic: in each row of tiles they are one contiguous run.

    torch's `create_block_mask` would first make the whole (l, p + l) mask, 16 GB for a slice of 128k tokens. Its
    constructors sort, which is not a fused kernel.

    Args:
        begin: (B, l) int32, never decreasing along a row: the first key each query may see.
    """
    by_query = _in_runs(*_keys_of_query_tiles(band, device, begin), -(-band.keys // TILE))
    by_key = _in_runs(*_queries_of_key_tiles(band, device, begin), -(-band.length // TILE))
    return *by_query, *by_key


def _keys_of_query_tiles(band: Band, device: torch.device | str, begin: Tensor | None) -> tuple[Tensor, ...]:
    """Return a run of key tiles per query tile, (1 or B, tiles) each: first and last visited, first and last whole."""
    row = torch.arange(-(-band.length // TILE), device=device, dtype=torch.int32)
    first = row * TILE + band.before
    last = (first + TILE - 1).clamp(max=band.keys - 1)
    low = (first - band.window - band.nearest + 1).clamp(min=0).unsqueeze(0)
    high = (last - band.window - band.nearest + 1).clamp(min=0).unsqueeze(0)  # the first key that the last query sees
    if begin is not None:
        low = torch.maximum(low, begin.index_select(1, row * TILE))
        high = torch.maximum(high, begin.index_select(1, last - band.before))
    visited = _down(low), _down((last - band.nearest).unsqueeze(0))
    whole = _up(high), _down((first - band.nearest + 1).unsqueeze(0)) - 1
    return *visited, whole[0], torch.where((row + 1) * TILE <= band.length, whole[1], -1)


def _queries_of_key_tiles(band: Band, device: torch.device | str, begin: Tensor | None) -> tuple[Tensor, ...]:
    """Return a run of query tiles per key tile, in the same form. The backward pass uses it."""
    column = torch.arange(-(-band.keys // TILE), device=device, dtype=torch.int32)
    first = column * TILE
    last = (first + TILE - 1).clamp(max=band.keys - 1)
    end = (last + band.window + band.nearest - 1 - band.before).clamp(max=band.length - 1).unsqueeze(0)
    inner = (first + band.window + band.nearest - 1 - band.before).unsqueeze(0)  # last to see the first key
    if begin is not None:  # queries whose document begins at a key or before it
        # Not `last`, because Inductor (torch 2.11) fails on its clamp here. Beyond the last key the result is the same.
        keys = torch.stack((first + TILE - 1, first)).expand(len(begin), -1, -1)  # (B, 2, tiles)
        ends = torch.searchsorted(begin.contiguous(), keys.flatten(1).contiguous(), right=True, out_int32=True) - 1
        end = torch.minimum(end, ends[:, : len(column)])
        inner = torch.minimum(inner, ends[:, len(column) :])
    visited = _down((first + band.nearest - band.before).clamp(min=0).unsqueeze(0)), _down(end)
    whole = _up((last + band.nearest - band.before).clamp(min=0).unsqueeze(0)), _down(inner + 1) - 1
    complete = torch.minimum(whole[1], torch.full_like(whole[1], band.length // TILE - 1))
    return *visited, whole[0], torch.where(last - first == TILE - 1, complete, -1)


def _down(position: Tensor) -> Tensor:
    """Divide by TILE, rounding down; by a shift, because Inductor (torch 2.13) fails on quotients of such ranges."""
    return position >> (TILE.bit_length() - 1)


def _up(position: Tensor) -> Tensor:
    return _down(position + TILE - 1)


def _in_runs(first: Tensor, last: Tensor, whole_first: Tensor, whole_last: Tensor, columns: int) -> tuple[Tensor, ...]:
    """Return runs in FlexAttention's form: how many tiles need the mask and which, how many are whole and which.

    The whole tiles are a run in the middle of the visited run; (1 or B, rows) each -> (B, 1, rows[, columns]).
    """
    visited = (last - first + 1).clamp(min=0)
    whole = torch.minimum((whole_last - whole_first + 1).clamp(min=0), visited)
    left = torch.where(whole > 0, whole_first - first, visited).unsqueeze(-1)  # tiles before the whole ones
    place = torch.arange(columns, device=first.device, dtype=torch.int32)
    partly = first.unsqueeze(-1) + place + torch.where(place < left, 0, whole.unsqueeze(-1))
    wholly = whole_first.unsqueeze(-1) + place
    counts = (visited - whole, partly), (whole, wholly)
    return tuple(
        x.expand(len(visited), *x.shape[1:]).to(torch.int32).unsqueeze(1).contiguous()
        for number, tiles in counts
        for x in (number, tiles.clamp(0, columns - 1))
    )


class _BiasGradient(torch.autograd.Function):
    """The identity on the attention's output and its sums. Its backward pass computes the gradient of the bias."""

    @staticmethod
    def forward(ctx, out, lse, bias, q, k, v, begin, settings):
        ctx.save_for_backward(out, bias, q, k, v, lse, begin)
        ctx.settings = settings
        return out.view_as(out), lse.view_as(lse)

    @staticmethod
    def backward(ctx, d_out, d_lse):
        out, bias, q, k, v, lse, begin = ctx.saved_tensors
        d_lse = d_lse if ctx.settings.sums else None
        d_bias = bias_gradient(d_out, out, bias, q, k, v, lse, begin, ctx.settings, d_lse)
        return d_out, d_lse, d_bias, None, None, None, None, None


def bias_gradient(
    d_out: Tensor,
    out: Tensor,
    bias: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lse: Tensor,
    begin: Tensor | None,
    settings: Settings,
    d_lse: Tensor | None = None,
) -> Tensor:
    """Return the gradient of the bias, (H, distances): the gradient of the scores, summed over all pairs of a distance.

    Distances below `varying` (near) are computed one by one; from `varying` on (far) all share one bias. Softmax gives
    a gradient that sums to zero over the keys of a query, so the far distances together have minus the sum of the near
    ones. With a gradient of `lse`, near and far sum to that gradient instead. Products are in the dtype of the inputs,
    sums in single precision at least. Diagonals are summed by a reshape, without atomics.

    Shapes: q, out (B, H, l, dh), k, v (B, G, p + l, dh), lse (B, H, l).
    """
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    wide = torch.promote_types(lse.dtype, torch.float32)
    near, length, before = settings.varying, q.shape[2], k.shape[2] - q.shape[2]
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
        seen = (distance >= (0 if settings.include_self else 1)) & (distance < near)
        seen = seen & (distance < settings.window + (0 if settings.include_self else 1))
        seen = seen & (key >= (0 if begin is None else begin)) & (query < before + length)
        scores = (q @ keys.mT).to(wide) + bias.to(wide)[:, distance.clamp(0, bias.shape[1] - 1)].unsqueeze(1)
        weights = torch.where(seen, torch.exp(scores - lse), 0.0)
        d_scores = ((d_out @ values.mT).to(wide) - inner) * weights
        sums = _by_distance(d_scores.sum((0, 2)))  # (H, 2 t - 1): distances from shift t - (t - 1) on
        d_near = sums[:, TILE - 1 :] if shift == 0 else _add_overlapping(d_near, sums)
    d_near = d_near[:, :near]
    if near < bias.shape[1]:
        far = -d_near.sum(1, keepdim=True)
        far = far if d_lse is None else far + d_lse.sum((0, 2)).unsqueeze(1)
        d_near = F.pad(torch.cat((d_near, far), dim=1), (0, bias.shape[1] - near - 1))
    return d_near.to(bias.dtype)


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


def short_attention(
    q: Tensor, k: Tensor, v: Tensor, window: int, bias: Tensor | None, include_self: bool, begin: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Do the same for few queries and store all scores: (B, l, H, dh), (B, p + l, G, dh) twice -> output and sums."""
    band = Band(q.shape[1], k.shape[1], window, include_self)
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
