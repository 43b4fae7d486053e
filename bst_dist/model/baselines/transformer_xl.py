"""Transformer-XL: a long window over segments, with the previous segment as a cache without gradient.

As a baseline of Block-Recurrent Transformers (arXiv 2203.07852, section 4) it is a sliding window of 2048 tokens over
segments of 2048. A token sees the same as in sliding attention, but gradients stop at the beginning of its segment
(Dai et al. 2019, arXiv 1901.02860, section 3.2).

Shapes: B rows, l tokens, p positions before them, H heads, dh head width, W block.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn

from bst_dist.model.attention.documents import Documents, documents_by, documents_further_back
from bst_dist.model.attention.self_attention import SlidingAttention
from bst_dist.model.config import LayerConfig
from bst_dist.model.document_mask import Starts
from bst_dist.model.roles import Linear
from bst_dist.parallel.sequence.past import Past


class SegmentAttention(SlidingAttention):
    """Sliding attention in which no gradient crosses from one segment to the one before: (B, l, D) -> (B, l, H dh)."""

    def forward(self, u: Tensor, past: Past, starts: Starts | None = None) -> Tensor:
        """`starts`: where documents begin; a document sees nothing before it."""
        q, k, v = self.project(u, past)
        length, out = q.shape[1], []
        documents = self.documents(starts, past, length, k.shape[1])
        for segment in self._segments(length, k.shape[1] - length, past.position):
            own = q[:, segment.first : segment.last]
            keys, values = (segment.seen(x) for x in (k, v))
            mine = _documents_of(segment, documents, past)
            tiles = self._tiles_of(segment, own, past, mine)
            out.append(self.attend(own, keys, values, past, mine, tiles))
        return torch.cat(out, dim=1).flatten(-2)

    def prepare(self, like: Tensor, past: Past, starts: Starts | None) -> None:
        """See `Prepares.prepare`."""
        length = like.shape[1]
        self.positions(like, past)
        documents = self.documents(starts, past, length, length)
        for segment in self._segments(length, 0, past.position):
            own = like[:, segment.first : segment.last]
            self._tiles_of(segment, own, past, _documents_of(segment, documents, past))

    def _segments(self, length: int, before: int, position: int) -> Iterator[Segment]:
        first = 0
        while first < length:
            last = min(length, first + self.window.size - (position + first) % self.window.size)
            yield Segment(first, last, max(0, before + first - self.window.size), before + last)
            first = last

    def documents(self, starts: Starts | None, past: Past, length: int, keys: int) -> Documents | None:
        if starts is None:
            return None
        name, size = f"documents further back: {length}, {keys}, {self.window.size}", self.window.size
        return past.once(name, lambda: documents_further_back(starts, past, length, keys, size))

    def _tiles_of(
        self, segment: Segment, own: Tensor, past: Past, documents: Documents | None
    ) -> tuple[Tensor, ...] | None:
        return self.tiles(own, segment.end - segment.begin, past, documents, part=f", {segment}")


class Segment(NamedTuple):
    """A segment of a slice: the tokens first ... last - 1, which see the keys begin ... end - 1."""

    first: int
    last: int
    begin: int
    end: int
    """Positions among the keys: those before the slice, then its own."""

    def seen(self, x: Tensor) -> Tensor:
        """Return the keys or values that the segment sees; those of earlier segments have no gradient."""
        own = self.end - (self.last - self.first)
        return torch.cat((x[:, self.begin : own].detach(), x[:, own : self.end]), dim=1)


def _documents_of(segment: Segment, documents: Documents | None, past: Past) -> Documents | None:
    """Return the documents of the keys that a segment sees."""
    if documents is None:
        return None

    def make() -> Documents:
        number = documents.number[:, segment.begin : segment.end]
        return documents_by(number, documents.kinds, segment.last - segment.first)

    return past.once(f"documents of {segment}", make)


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
