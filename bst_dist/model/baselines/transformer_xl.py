"""Transformer-XL: a long window over segments, with the previous segment as a cache without gradient.

As a baseline of Block-Recurrent Transformers (arXiv 2203.07852, section 4) it is a sliding window of 2048 tokens over
segments of 2048. A token sees the same as in sliding attention, but gradients stop at the beginning of its segment
(Dai et al. 2019, arXiv 1901.02860, section 3.2).

Shapes: B rows, l tokens, p positions before them, H heads, dh head width, W block.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn

from bst_dist.model.attention import (
    Documents,
    SlidingAttention,
    documents_by,
    documents_further_back,
    trains_with_flex,
)
from bst_dist.model.borders import Starts
from bst_dist.model.config import LayerConfig
from bst_dist.model.roles import Linear
from bst_dist.parallel.sequence.past import Past


class SegmentAttention(SlidingAttention):
    """Sliding attention in which no gradient crosses from one segment to the one before: (B, l, D) -> (B, l, H dh)."""

    def forward(self, u: Tensor, past: Past, starts: Starts | None = None) -> Tensor:
        """`starts`: where documents begin; a document sees nothing before it."""
        q, k, v = self.project(u, past)
        length, out = q.shape[1], []
        documents = None if starts is None else past.once(*self._documents(starts, past, length, k.shape[1]))
        for segment in self._segments(length, k.shape[1] - length, past.position):
            own = q[:, segment.first : segment.last]
            keys, values = (segment.seen(x) for x in (k, v))
            mine = None if documents is None else past.once(*_documents_of(segment, documents))
            tiles = past.once(*self._tiles_of(segment, mine, own)) if trains_with_flex(own) else None
            out.append(self.attend(own, keys, values, past, mine, tiles))
        return torch.cat(out, dim=1).flatten(-2)

    def prepare(self, like: Tensor, past: Past, starts: Starts | None) -> dict[str, object]:
        """See `SlidingAttention.prepare`."""
        length, documents, asked = like.shape[1], None, [self._positions(like)]
        if starts is not None:
            asked.append(self._documents(starts, past, length, length))
            documents = past.once(*asked[-1])
        for segment in self._segments(length, 0, past.position):
            own, mine = like[:, segment.first : segment.last], None
            if documents is not None:
                asked.append(_documents_of(segment, documents))
                mine = past.once(*asked[-1])
            if trains_with_flex(own):
                asked.append(self._tiles_of(segment, mine, own))
        return {name: past.once(name, make) for name, make in asked}

    def _segments(self, length: int, before: int, position: int) -> Iterator[Segment]:
        first = 0
        while first < length:
            last = min(length, first + self.window.size - (position + first) % self.window.size)
            yield Segment(first, last, max(0, before + first - self.window.size), before + last)
            first = last

    # The arguments of `Past.once`.

    def _documents(self, starts: Starts, past: Past, length: int, keys: int) -> tuple[str, Callable[[], Documents]]:
        name = f"documents further back: {length}, {keys}, {self.window.size}"
        return name, lambda: documents_further_back(starts, past, length, keys, self.window.size)

    def _tiles_of(
        self, segment: Segment, documents: Documents | None, own: Tensor
    ) -> tuple[str, Callable[[], tuple[Tensor, ...]]]:
        name, make = self._tiles(own.shape[1], segment.end - segment.begin, own.device, documents)
        return f"{name}, {segment}", make


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


def _documents_of(segment: Segment, documents: Documents) -> tuple[str, Callable[[], Documents]]:
    """Return the arguments of `Past.once` for the documents of the keys that a segment sees."""

    def make() -> Documents:
        number = documents.number[:, segment.begin : segment.end]
        return documents_by(number, documents.kinds, segment.last - segment.first)

    return f"documents of {segment}", make


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
