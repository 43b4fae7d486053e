"""Block-local attention: a sliding window over this block and the previous one. Cross-attention is in `context`.

Queries and keys are L2-normalised, with a learned scale per head in place of 1/sqrt(dh) (Block-Recurrent
Transformers, arXiv 2203.07852). A query sees the W positions up to and including its own (-W < k - q <= 0).

Shapes: B rows, l tokens of the slice, p <= W positions before it, H heads, G heads of keys and values in
self-attention, dh head width, W block.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bst_dist.model.config import AttentionConfig, LayerConfig
from bst_dist.model.document_mask import Borders, Starts
from bst_dist.model.flex import flex_sliding_attention, uses_flex_tiles
from bst_dist.model.flex_mask import Band, visited_tiles
from bst_dist.model.fused_tiles import fused_sliding_attention, fused_tile
from bst_dist.model.l2_norm import unit
from bst_dist.model.matmul import fused_linears
from bst_dist.model.roles import Linear
from bst_dist.model.tiles import HIDDEN, QUERY_TILE, sliding_tiles, tiled_attention_and_sums
from bst_dist.model.window import Window
from bst_dist.parallel.sequence.past import Past


def product_dtype(x: Tensor) -> torch.dtype:
    """Return the dtype in which a linear layer computes here: autocast's if it is on, else that of `x`."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


class Angles(NamedTuple):
    """RoPE's tables for the two halves of a head's channels."""

    cos: Tensor
    """(l, 1, 1, dh / 2)."""
    sin: Tensor
    """(l, 1, 2, dh / 2): negative for the first half."""

    def last(self, count: int) -> Angles:
        """Return the tables of the last positions."""
        return Angles(*(table[len(table) - count :] for table in self))


def angles(base: float, half: int, first: int, count: int, like: Tensor) -> Angles:
    """Return the tables of `count` positions from `first` on, computed in double precision, in the dtype of `like`."""
    rates = base ** (-torch.arange(half, device=like.device, dtype=torch.float64) / half)
    angle = torch.arange(first, first + count, device=like.device).outer(rates)[:, None, None]
    return Angles(angle.cos().to(like.dtype), torch.cat((-angle.sin(), angle.sin()), dim=2).to(like.dtype))


def rotate(x: Tensor, by: Angles) -> Tensor:
    """Apply the rotary embedding to (B, l, H, dh) (RoFormer, arXiv 2104.09864).

    It does not concatenate: a compiled layer would write the gradient of a concatenation to memory before it computes
    the gradient of `unit`.
    """
    halves = x.unflatten(-1, (2, -1))
    return (halves * by.cos + halves.flip(-2) * by.sin).flatten(-2)


class DistanceBias(nn.Module):
    """T5's relative position bias: one learned number per head and distance bucket (arXiv 1910.10683, section 2.1)."""

    def __init__(self, heads: int, config: AttentionConfig):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(heads, config.buckets))
        self.max_distance = config.max_distance

    def forward(self, buckets: Tensor) -> Tensor:
        """Return the bias by distance, (H, distances), from the table of `buckets`.

        It is a sum and not a look-up by index, whose gradient on a GPU is a sum by atomics, in no fixed order.
        """
        return (self.weight.unsqueeze(-1) * buckets).sum(1)

    def buckets(self, distances: int) -> Tensor:
        """Return the bucket of each distance as a one-hot table, (buckets, distances).

        The first half of the buckets hold one distance each; the others are logarithmic up to the largest distance.
        """
        distance = torch.arange(distances, device=self.weight.device)
        buckets = self.weight.shape[1]
        exact = buckets // 2
        ratio = torch.log(distance.clamp(min=1) / exact) / math.log(self.max_distance / exact)
        far = exact + (ratio * (buckets - exact)).long()
        bucket = torch.where(distance < exact, distance, far.clamp(max=buckets - 1))
        return (bucket == torch.arange(buckets, device=distance.device).unsqueeze(1)).to(self.weight.dtype)


class SlidingAttention(nn.Module):
    """Causal self-attention over the W positions up to each token's own: (B, l, D) -> (B, l, H dh)."""

    def __init__(self, config: LayerConfig, window: int):
        super().__init__()
        self.heads, self.kv_heads = config.heads, config.kv_heads
        self.config = config.attention
        self.window = Window(window, self.config.include_self, min(self.config.max_distance, window + 1))
        parts = config.inner, config.kv_inner, config.kv_inner
        self.qkv = Linear(config.width, sum(parts), parts=parts)
        self.scale = nn.Parameter(torch.full((self.heads,), math.sqrt(config.head)))
        self.half = config.head // 2
        self.bias = DistanceBias(self.heads, self.config) if self.config.position == "t5" else None

    def forward(
        self, u: Tensor, past: Past, starts: Starts | None = None, qkv: Sequence[Tensor] | None = None
    ) -> Tensor:
        """`starts`: where documents begin; a document sees nothing before it. `qkv`: the parts that `maps` makes of
        `u`; None: made here."""
        q, k, v = self.project(u, past, qkv)
        documents = self.documents(starts, past, q.shape[1], k.shape[1])
        return self.attend(q, k, v, past, documents, self.tiles(q, k.shape[1], past, documents)).flatten(-2)

    def share(self, qkv: Sequence[Tensor], past: Past, starts: Starts | None) -> tuple[Tensor, PartialAttention]:
        """Return queries without positions, (B, l, H, dh), and the window's share of a softmax over more keys."""
        plain, k, v = self.by_heads(qkv)
        plain = unit(plain, self.scale)
        q, k, v = self.with_window(plain, k, v, past)
        documents = self.documents(starts, past, q.shape[1], k.shape[1])
        tiles = self.tiles(q, k.shape[1], past, documents)
        return plain, sliding_share(q, k, v, self.window, self.by_distance(self.distances, past), documents, tiles)

    def prepare(self, like: Tensor, past: Past, starts: Starts | None) -> None:
        """Ask `past` for what `forward` asks for with `Past.once`, for a whole sequence.

        A compiled layer gets it as an input of its graph. `like`: (B, l, D), in the dtype of the products.
        """
        length = like.shape[1]
        documents = self.documents(starts, past, length, length)
        self.positions(like, past)
        self.tiles(like, length, past, documents)

    def project(self, u: Tensor, past: Past, qkv: Sequence[Tensor] | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Return queries (B, l, H, dh), and keys and values (B, p + l, G, dh), including those of the window's past."""
        q, k, v = self.by_heads(fused_linears(u, self.maps) if qkv is None else qkv)
        return self.with_window(unit(q, self.scale), k, v, past)

    def with_window(self, q: Tensor, k: Tensor, v: Tensor, past: Past) -> tuple[Tensor, Tensor, Tensor]:
        """Return the same as `project`, from normalised queries and the keys and values of the slice's own tokens."""
        k, v = past.extend_stacked(k, v, 2, lambda kv: past.extend("kv", kv, before=self.window.size))
        return *self.rotated(q, unit(k), past), v

    @property
    def maps(self) -> tuple[Linear, list[int]]:
        """The map from tokens to queries, keys and values, and the number of rows of each."""
        width = self.qkv.out_features // (self.heads + 2 * self.kv_heads)
        return self.qkv, [self.heads * width, self.kv_heads * width, self.kv_heads * width]

    def by_heads(self, qkv: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Return the slice's queries (B, l, H, dh), keys and values (B, l, G, dh), split into heads."""
        q, k, v = (x.unflatten(-1, (n, -1)) for x, n in zip(qkv, (self.heads, *[self.kv_heads] * 2), strict=True))
        return q, k, v

    def rotated(self, q: Tensor, k: Tensor, past: Past) -> tuple[Tensor, Tensor]:
        """Return queries and keys with RoPE applied; unchanged if the layer does not use RoPE."""
        if self.config.position != "rope":
            return q, k
        by = self._angles(k, past)  # only differences matter, so any common origin will do
        return rotate(q, by.last(q.shape[1])), rotate(k, by)

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        past: Past,
        documents: Documents | None = None,
        tiles: tuple[Tensor, ...] | None = None,
    ) -> Tensor:
        """Attend: (B, l, H, dh), (B, p + l, G, dh) twice -> (B, l, H, dh). `tiles`: the result of the method `tiles`;
        None: made when needed."""
        return sliding_attention(q, k, v, self.window, self.by_distance(self.distances, past), documents, tiles)

    @property
    def distances(self) -> int:
        """Number of distances for which T5's bias is computed."""
        return self.window.size + 1

    def by_distance(self, distances: int, past: Past) -> Tensor | None:
        """Return T5's bias, (H, distances); None if the layer uses RoPE."""
        return None if self.bias is None else self.bias(self._buckets(distances, past))

    # What all layers with the same settings share: each value is made once per call.

    def documents(self, starts: Starts | None, past: Past, length: int, keys: int) -> Documents | None:
        """Return the document of each of the keys; None if no document begins."""
        if starts is None:
            return None
        name, size = f"documents: {length}, {keys}, {self.window.size}", self.window.size
        if isinstance(starts, Borders):  # several documents may begin in the window before the slice
            return past.once(name, lambda: documents_further_back(starts, past, length, keys, size))
        return past.once(name, lambda: documents_of(starts, length, keys, size))

    def positions(self, like: Tensor, past: Past) -> Angles | Tensor:
        """Return RoPE's angles for a whole sequence, or the buckets of T5's bias."""
        return self._angles(like, past) if self.bias is None else self._buckets(self.distances, past)

    def _angles(self, keys: Tensor, past: Past) -> Angles:
        """Return the angles of (B, p + l, ...) in the dtype of `keys`."""
        base, half, count = self.config.rope_base, self.half, keys.shape[1]
        name = f"angles: {base}, {half}, {count}, {keys.dtype}"
        return past.once(name, lambda: angles(base, half, 0, count, keys))

    def _buckets(self, distances: int, past: Past) -> Tensor:
        buckets, furthest = self.config.buckets, self.config.max_distance
        return past.once(f"buckets: {buckets}, {furthest}, {distances}", lambda: self.bias.buckets(distances))

    def tiles(
        self, q: Tensor, keys: int, past: Past, documents: Documents | None, part: str = ""
    ) -> tuple[Tensor, ...] | None:
        """Return the tiles that FlexAttention visits for queries (B, l, ...); None if it is not used.

        `part`: says which part of the slice the queries and keys are, if not all of it.
        """
        if not trains_with_flex(q):
            return None
        begin, window = None if documents is None else documents.begin, self.window
        length, device = q.shape[1], q.device
        name = f"tiles: {length}, {keys}, {window.size}, {window.include_self}, {begin is not None}{part}"
        return past.once(name, lambda: visited_tiles(Band(length, keys, window), device, begin))


def trains_with_flex(q: Tensor) -> bool:
    """Whether FlexAttention computes these queries (B, l, ...), with gradients."""
    return attention_path(q.device) == "flex" and uses_flex_tiles(q.shape[1]) and torch.is_grad_enabled()


def for_heads(x: Tensor, heads: int) -> Tensor:
    """Repeat keys or values for each query head that shares them: (B, n, G, dh) -> (B, n, H, dh)."""
    return x if x.shape[2] == heads else x.repeat_interleave(heads // x.shape[2], dim=2)


class Documents(NamedTuple):
    """The document that each key belongs to."""

    number: Tensor
    """(B, p + l) int32: the number of the key's document, never decreasing along a row."""
    kinds: int
    """Upper bound on the documents in one window. Sets how many binary digits of the numbers are compared."""
    begin: Tensor
    """(B, l) int32: the first key of each query's document."""


def documents_by(number: Tensor, kinds: int, length: int) -> Documents:
    """Return the `Documents` of keys with these document numbers (B, p + l). The last `length` keys have queries."""
    number = number.contiguous()
    begin = torch.searchsorted(number, number[:, number.shape[1] - length :].contiguous(), out_int32=True)
    return Documents(number, kinds, begin)


def documents_of(starts: Tensor, length: int, keys: int, window: int) -> Documents:
    """Return the document of each of p + l keys, from the blocks of the slice that begin one, (B, l / W).

    Only for windows of one block: all positions before the slice belong to the document that the slice begins in,
    unless its first block begins one.
    """
    block = length // starts.shape[1]
    number = F.pad(starts.cumsum(1, dtype=torch.int32).repeat_interleave(block, dim=1), (keys - length, 0))
    return documents_by(number, min(-(-window // block), starts.shape[1]) + 1, length)


def documents_further_back(starts: Starts, past: Past, length: int, keys: int, window: int) -> Documents:
    """Return the same as `documents_of`, when documents may also begin in the window before the slice.

    This is so for windows of several blocks, and for documents that begin at any token.

    The position in the stream where each token's document begins is left to the next call, like the keys.
    """
    starts = starts.begins if isinstance(starts, Borders) else starts
    block = length // starts.shape[1]
    places = past.position + block * torch.arange(starts.shape[1], device=starts.device)
    begin = torch.where(starts, places, -1).repeat_interleave(block, dim=1)  # -1: no document begins here
    begin = past.extend("documents", begin, before=window)
    begin = F.pad(begin, (keys - begin.shape[1], 0), value=-1).cummax(dim=1).values
    number = F.pad(begin.diff(dim=1) > 0, (1, 0)).cumsum(1, dtype=torch.int32)
    return documents_by(number, min(-(-window // block), keys) + 1, length)


def attention_path(device: torch.device) -> str:
    """Return what computes sliding attention on this device: "flex" (FlexAttention), "fused-tiles" (torch's CPU kernel,
    or plain tiles for cases that it does not support), or "tiles"."""
    return {"cuda": "flex", "cpu": "fused-tiles"}.get(device.type, "tiles")


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
    """Do the same, and return also the sums that one softmax over more keys needs. Gradients flow through both."""
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


def separate_documents(q: Tensor, k: Tensor, documents: Documents) -> tuple[Tensor, Tensor]:
    """Add channels that hide keys of other documents from each query, exactly and without a mask for each row.

    Two channels for each binary digit of a document's number. The query has a 1 in the channel of its own digit. There
    a key has 0 if its digit is the same, else -HIDDEN.
    """
    digits = torch.arange(max(1, (documents.kinds - 1).bit_length()), device=q.device)
    digit = (documents.number.unsqueeze(-1) >> digits) & 1  # (B, p + l, digits)
    digit = torch.cat((digit, 1 - digit), dim=-1)
    own, other = digit[:, k.shape[1] - q.shape[1] :], (1 - digit) * -int(HIDDEN)
    return torch.cat((q, _for_heads(own, q)), dim=-1), torch.cat((k, _for_heads(other, k)), dim=-1)


def _for_heads(channels: Tensor, like: Tensor) -> Tensor:
    return channels.to(like.dtype).unsqueeze(2).expand(-1, -1, like.shape[2], -1)
