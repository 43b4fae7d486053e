"""Block-local self-attention: a sliding window over this block and the previous one.

Queries and keys are L2-normalised, with a learned scale per head in place of 1/sqrt(dh) (Block-Recurrent
Transformers, arXiv 2203.07852). A query sees the W positions up to and including its own (-W < k - q <= 0).

Shapes: B rows, l tokens of the slice, p <= W positions before it, H heads, G heads of keys and values, dh head width,
W block.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from bst_dist.model.attention import sliding
from bst_dist.model.attention.documents import Documents, documents_further_back, documents_of
from bst_dist.model.attention.flex_mask import Band, visited_tiles
from bst_dist.model.attention.rotary import Angles, angles, rotate
from bst_dist.model.attention.sliding import PartialAttention, trains_with_flex
from bst_dist.model.attention.window import Window
from bst_dist.model.config import AttentionConfig, LayerConfig
from bst_dist.model.document_mask import Borders, Starts
from bst_dist.model.l2_norm import unit
from bst_dist.model.matmul import fused_linears
from bst_dist.model.roles import Linear
from bst_dist.parallel.sequence.past import Past


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
        return plain, sliding.sliding_share(
            q, k, v, self.window, self.by_distance(self.distances, past), documents, tiles
        )

    def prepare(self, like: Tensor, past: Past, starts: Starts | None) -> None:
        """See `Prepares.prepare`."""
        length = like.shape[1]
        documents = self.documents(starts, past, length, length)
        self.positions(like, past)
        self.tiles(like, length, past, documents)

    def project(self, u: Tensor, past: Past, qkv: Sequence[Tensor] | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Return queries (B, l, H, dh), and keys and values (B, p + l, G, dh), including those of the window's past."""
        q, k, v = self.by_heads(fused_linears(u, self.maps) if qkv is None else qkv)
        return self.with_window(unit(q, self.scale), k, v, past)

    def with_window(self, q: Tensor, k: Tensor, v: Tensor, past: Past) -> tuple[Tensor, Tensor, Tensor]:
        """Return what `project` returns, from normalised queries and the keys and values of the slice's own tokens."""
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
        return sliding.sliding_attention(q, k, v, self.window, self.by_distance(self.distances, past), documents, tiles)

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
