"""Full causal attention: each token sees all tokens before it. The cost grows with the square of the length.

Shapes: B rows, l tokens, p positions before them, H heads, dh head width.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bst_base.errors import UserError
from bst_dist.model.attention import sliding
from bst_dist.model.attention.documents import Documents, documents_further_back, separate_documents
from bst_dist.model.attention.self_attention import SlidingAttention
from bst_dist.model.attention.sliding import for_heads, sliding_attention
from bst_dist.model.attention.tiles import HIDDEN, QUERY_TILE, Tile, tiled_attention
from bst_dist.model.config import LayerConfig
from bst_dist.model.document_mask import Starts
from bst_dist.model.roles import Linear
from bst_dist.parallel.sequence.past import Past


class LongerThanAllowedError(UserError):
    """A sequence longer than full attention is configured for."""


class FullAttention(SlidingAttention):
    """Causal self-attention over all earlier tokens: (B, l, D) -> (B, l, H dh).

    On CUDA it uses the kernel of sliding attention, with a window as long as the longest sequence. On other devices, it
    is one fused attention call with RoPE. This call has no gradient for T5's learned bias and no masks of documents. In
    these cases attention runs in tiles; their memory is linear in the length too.
    """

    def forward(self, u: Tensor, past: Past, starts: Starts | None = None) -> Tensor:
        """Raise LongerThanAllowedError if the stream is longer than the window, which is the configured length."""
        longest, tokens = self.window.size, past.position + u.shape[1]
        if tokens > longest:
            raise LongerThanAllowedError(
                f"full attention is configured for {longest} tokens and got {tokens}: raise model.full.longest, "
                "shorten train.sequence_length, or set train.carry to false"
            )
        q, k, v = self.project(u, past)
        on_flex = sliding.attention_path(q.device) == "flex"
        if not on_flex:
            k, v = for_heads(k, self.heads), for_heads(v, self.heads)
        if self.bias is None and starts is None and self.config.include_self and not on_flex:
            return _fused(q, k, v).flatten(-2)
        documents = self.documents(starts, past, q.shape[1], k.shape[1])
        if on_flex:
            bias = self.by_distance(self.distances, past)
            tiles = self.tiles(q, k.shape[1], past, documents)
            return sliding_attention(q, k, v, self.window, bias, documents, tiles).flatten(-2)
        if documents is not None:
            q, k = separate_documents(q, k, documents)
        tiles = causal_tiles(q.shape[1], k.shape[1] - q.shape[1])
        mask = self._mask(min(QUERY_TILE, q.shape[1]), past)
        return tiled_attention(q, k, v, mask, tiles, empty_rows=not self.config.include_self).flatten(-2)

    def documents(self, starts: Starts | None, past: Past, length: int, keys: int) -> Documents | None:
        if starts is None:
            return None
        name = f"documents: {length}, {keys}, all"
        return past.once(name, lambda: documents_further_back(starts, past, length, keys, keys))

    @property
    def distances(self) -> int:
        """Number of distances for which T5's bias is computed. It is constant from the last one on."""
        return self.config.max_distance + 1

    def _mask(self, tile: int, past: Past) -> Tensor:
        """Return the causal mask and the bias of a tile's last keys, (H or 1, t, far + t).

        All keys further away than `far` share T5's last bucket. Its bias is subtracted from every score, which does not
        change the softmax.
        """
        far = 0 if self.bias is None else self.bias.max_distance
        distance = torch.arange(far, far + tile, device=self.scale.device).unsqueeze(1)
        distance = distance - torch.arange(far + tile, device=self.scale.device)  # (t, far + t)
        hidden = distance < (0 if self.config.include_self else 1)
        bias = self.by_distance(far + 1, past)  # (H, far + 1)
        if bias is None:
            return torch.zeros_like(distance, dtype=torch.float32).masked_fill(hidden, -HIDDEN).unsqueeze(0)
        return (bias - bias[:, -1:])[:, distance.clamp(0, far)].masked_fill(hidden, -HIDDEN)


def causal_tiles(queries: int, before: int) -> Iterator[Tile]:
    """Yield tiles that meet all positions up to their own end."""
    for first in range(0, queries, QUERY_TILE):
        last = min(first + QUERY_TILE, queries)
        yield Tile(first, last, 0, before + last)


def _fused(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attend in one fused call, (B, l, H, dh) -> (B, l, H, dh)."""
    length, keys = q.shape[1], k.shape[1]
    seen = None
    if keys > length:
        seen = torch.ones(length, keys, dtype=torch.bool, device=q.device).tril(keys - length)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v.to(q.dtype)))
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=seen, is_causal=seen is None, scale=1)
    return out.transpose(1, 2)


class FullMixer(nn.Module):
    """Full causal self-attention."""

    def __init__(self, config: LayerConfig):
        super().__init__()
        self.attention = FullAttention(config, config.full.longest)
        self.out = Linear(config.inner, config.width, into_stream=True)

    def forward(self, u: Tensor, past: Past, starts: Starts | None) -> Tensor:
        return self.out(self.attention(u, past, starts))
