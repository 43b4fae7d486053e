"""Transformer-XL: a long window over segments, with the previous segment as a cache without gradient.

As a baseline of Block-Recurrent Transformers (arXiv 2203.07852, section 4) it is a sliding window of 2048 tokens over
segments of 2048. A token sees the same as in sliding attention, but gradients stop at the beginning of its segment
(Dai et al. 2019, arXiv 1901.02860, section 3.2).

Shapes: B rows, l tokens, p positions before them, H heads, dh head width, W block.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from bst_dist.model.attention import SlidingAttention, documents_by, documents_further_back
from bst_dist.model.borders import Starts
from bst_dist.model.config import LayerConfig
from bst_dist.model.roles import Linear
from bst_dist.parallel.sequence.past import Past


class SegmentAttention(SlidingAttention):
    """Sliding attention in which no gradient crosses from one segment to the one before: (B, l, D) -> (B, l, H dh)."""

    def forward(self, u: Tensor, past: Past, starts: Starts | None = None) -> Tensor:
        """`starts`: where documents begin; a document sees nothing before it."""
        q, k, v = self.project(u, past)
        before, out = k.shape[1] - q.shape[1], []
        documents = None
        if starts is not None:
            documents = documents_further_back(starts, past, q.shape[1], k.shape[1], self.window)
        for first, last, keys, values in self._segments(k, v, q.shape[1], past.position):
            own = q[:, first:last]
            if documents is None:
                out.append(self.attend(own, keys, values, past, None, self.tiles(own, keys, past, None)))
                continue
            number = documents.number[:, before + last - keys.shape[1] : before + last]
            out.append(self.attend(own, keys, values, past, documents_by(number, documents.kinds, last - first)))
        return torch.cat(out, dim=1).flatten(-2)

    def _segments(self, k: Tensor, v: Tensor, length: int, position: int):
        """Yield each segment's tokens first ... last - 1, and the keys and values that they see.

        Keys and values of earlier segments have no gradient.
        """
        before = k.shape[1] - length
        first = 0
        while first < length:
            last = min(length, first + self.window - (position + first) % self.window)
            begin, own = max(0, before + first - self.window), before + first
            yield (
                first,
                last,
                *(torch.cat((x[:, begin:own].detach(), x[:, own : before + last]), dim=1) for x in (k, v)),
            )
            first = last


class TransformerXLMixer(nn.Module):
    """Self-attention over a segment and the cached previous segment."""

    def __init__(self, config: LayerConfig):
        super().__init__()
        window = config.transformer_xl.window
        if window % config.block:
            raise ValueError(f"transformer_xl.window ({window}) must be a multiple of block ({config.block})")
        self.attention = SegmentAttention(config, window)
        self.out = Linear(config.inner, config.width, into_stream=True)

    def forward(self, u: Tensor, past: Past, starts: Starts | None) -> Tensor:
        return self.out(self.attention(u, past, starts))
