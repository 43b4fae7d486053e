"""Attention to window and context states under one softmax. In the paper, states have a separate query and softmax.

A query attends to the keys of its window and to the states of its block at once, so that every token and head divides
its attention between both. There is no second query and no wider output. Native Hybrid Attention (arXiv 2510.07019)
does this with the slots of a linear recurrence; here they are the states of BST's SSM.

One softmax over two sets of keys is the softmax over each, weighted by the sums of their exponentials (`one_softmax`).
So the window's part is sliding attention with its fused kernels, and neither set of keys is copied. States have no
position: nothing is added to their scores, and with RoPE they are compared with the query before rotation.

Shapes: B rows, l tokens, Ds SSM width, S states, nb blocks of W tokens, H heads, dh head width.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from bst_dist.model.attention import sliding
from bst_dist.model.attention.flex import flex_sliding_attention
from bst_dist.model.attention.flex_mask import Band, visited_tiles
from bst_dist.model.attention.self_attention import SlidingAttention
from bst_dist.model.attention.sliding import PartialAttention, attention_path, one_softmax, trains_with_flex
from bst_dist.model.attention.window import Window
from bst_dist.model.config import LayerConfig
from bst_dist.model.context import (
    FIRST_AND_ENDS,
    build_context,
    documents_in_blocks,
)
from bst_dist.model.document_mask import Borders, Starts
from bst_dist.model.matmul import fused_linears, whole
from bst_dist.model.roles import Linear
from bst_dist.parallel.sequence.past import Past


class JointMixer(nn.Module):
    """Attention to window and context states under one softmax: (B, l, D) -> (B, l, D)."""

    def __init__(self, config: LayerConfig):
        super().__init__()
        if config.context.attend == "previous":
            raise ValueError("bst-joint: context.attend must be current: a block has no states where none came before")
        self.attention = SlidingAttention(config, config.block)
        self.down = Linear(config.width, config.context.width(config.width))
        self.cross = StateShare(config)
        self.out = Linear(config.inner, config.width, into_stream=True)

    def forward(self, u: Tensor, past: Past, starts: Starts | None) -> Tensor:
        z, *qkv = fused_linears(u, whole(self.down), self.attention.maps)
        q, window = self.attention.share(qkv, past.child("self"), starts)
        states = self.cross(q, z, past.child("context"), starts)
        return self.out(one_softmax(window, states).flatten(-2))


class StateShare(nn.Module):
    """The contribution of the context states to the softmax: (B, l, H, dh), (B, l, Ds) -> (B, l, H, dh), (B, l, H)."""

    def __init__(self, config: LayerConfig):
        super().__init__()
        self.block, self.filters = config.block, config.context.variant == "MF"
        self.context = build_context(config)

    def forward(self, q: Tensor, z: Tensor, past: Past, starts: Starts | None) -> PartialAttention:
        k, v = (x.to(q.dtype) for x in self.context(z, past, starts))
        if isinstance(starts, Borders):
            return self._of_documents(q, k, v, past, starts)
        if self.filters:
            return of_whole_blocks(q, k, v)
        return within_blocks(q, k, v, self.block, self._tiles(q, k.shape[1], past))

    def _of_documents(self, q: Tensor, k: Tensor, v: Tensor, past: Past, starts: Borders) -> PartialAttention:
        """Attend from each token to the states of its block that belong to its own document."""
        if not self.filters:
            documents, tiles = documents_in_blocks(q, self.block, past, starts)
            return sliding.sliding_share(q, k, v, Window(self.block), None, documents, tiles)
        begun = starts.cut_off(self.block).unsqueeze(-1)  # a document began in this block
        first, ends = (of_whole_blocks(q, k[:, own], v[:, own]) for own in FIRST_AND_ENDS)
        out = torch.where(begun.unsqueeze(-1), first.out, ends.out)
        return PartialAttention(out, torch.where(begun, first.sums, ends.sums))

    def prepare(self, like: Tensor, past: Past, starts: Starts | None) -> None:
        """See `Prepares.prepare`."""
        if self.filters:
            return
        if isinstance(starts, Borders):
            documents_in_blocks(like, self.block, past, starts)
        else:
            self._tiles(like, like.shape[1], past)

    def _tiles(self, q: Tensor, keys: int, past: Past) -> tuple[Tensor, ...] | None:
        """Return the tiles that FlexAttention visits if each block is a document; None if it is not used."""
        if not trains_with_flex(q):
            return None
        length, device = q.shape[1], q.device

        def make() -> tuple[Tensor, ...]:
            begin = block_begins(keys, self.block, device)[keys - length :].unsqueeze(0)
            return visited_tiles(Band(length, keys, Window(self.block)), device, begin)

        return past.once(f"tiles of blocks: {length}, {keys}, {self.block}", make)


def of_whole_blocks(q: Tensor, k: Tensor, v: Tensor) -> PartialAttention:
    """Attend from each block's tokens to all its states: (B, l, H, dh), (B, nb, S, H, dh) twice."""
    found = _with_scores(q.unflatten(1, (k.shape[1], -1)).flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1))
    return PartialAttention(*(x.unflatten(0, (len(q), -1)).flatten(1, 2) for x in found))


def block_begins(keys: int, block: int, device: torch.device) -> Tensor:
    """Return the first position of each position's block, (keys,) int32."""
    place = torch.arange(keys, device=device, dtype=torch.int32)
    return place - place % block


def within_blocks(
    q: Tensor, k: Tensor, v: Tensor, block: int, tiles: tuple[Tensor, ...] | None = None
) -> PartialAttention:
    """Attend from each token to its block's states up to its own; k, v (B, p + l, H, dh), p within the first block.

    `tiles`: those that FlexAttention visits if each block is a document; None: made when needed.
    """
    length, keys = q.shape[1], k.shape[1]
    begin = block_begins(keys, block, q.device)
    if attention_path(q.device) == "flex":  # sliding attention in which each block is a document
        begin = begin[keys - length :].expand(len(q), -1).contiguous()
        return PartialAttention(*flex_sliding_attention(q, k, v, Window(block), None, begin, tiles, sums=True))
    place = torch.arange(keys, device=q.device, dtype=torch.int32)
    if length == keys:  # a block is a batch entry
        span = min(block, length)
        folded = (x.unflatten(1, (-1, span)).flatten(0, 1) for x in (q, k, v))
        found = _with_scores(*folded, (place[:span].unsqueeze(1) >= place[:span]))
        return PartialAttention(*(x.unflatten(0, (len(q), -1)).flatten(1, 2) for x in found))
    return _with_scores(q, k, v, (place >= begin[keys - length :, None]) & (place <= place[keys - length :, None]))


def _with_scores(q: Tensor, k: Tensor, v: Tensor, seen: Tensor | None = None) -> PartialAttention:
    """Attend and store all scores: (N, t, H, dh), (N, K, H, dh) twice, (t, K) -> (N, t, H, dh), (N, t, H)."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    scores = (q @ k.mT).to(torch.promote_types(q.dtype, torch.float32))
    if seen is not None:
        scores = scores.masked_fill(~seen, -math.inf)
    sums = torch.logsumexp(scores, dim=-1, keepdim=True)
    out = torch.exp(scores - sums).to(v.dtype) @ v
    return PartialAttention(out.transpose(1, 2), sums.squeeze(-1).transpose(1, 2))
