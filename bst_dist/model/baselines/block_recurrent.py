"""Block-Recurrent Transformer, fixed gate, skip configuration (Hutchins et al. 2022, arXiv 2203.07852, section 3).

Besides its window, a token attends to S state vectors. Once per block these vectors attend to themselves and to the
tokens of the block and the previous block. The two directions share keys and values, but not queries. "Skip" leaves out
the state's feed-forward network, "fixed" makes the gate a learned constant:

    c' = g c + (1 - g) W [self(c); cross(c, tokens)],   g = sigmoid(b)

Only the state path is sequential; the token path runs once over the slice.

Shapes: B rows, l tokens, nb blocks of W, S states, D width, H heads, dh head width.
"""

from __future__ import annotations

import math
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bst_dist.model.attention.self_attention import SlidingAttention
from bst_dist.model.attention.sliding import for_heads
from bst_dist.model.config import LayerConfig
from bst_dist.model.l2_norm import unit
from bst_dist.model.matmul import fused_linears
from bst_dist.model.roles import Linear
from bst_dist.parallel.sequence.past import Past


class RecurrentWindow(NamedTuple):
    """The tokens that the state attends to after a block: the previous block, if there is one, and the block."""

    k: Tensor  # (B, W or 2W, H, dh)
    v: Tensor
    seen: Tensor | None  # (B, 1, 1, 2W)


class TokenAttention(SlidingAttention):
    """Sliding attention that also returns its keys and values, so that the state can attend to them."""

    def forward(self, u: Tensor, past: Past, starts: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Return concatenated heads (B, l, H dh), and normalised keys and values (B, p + l, H, dh).

        Keys and values begin with the previous block.
        """
        q, k, v = self.by_heads(fused_linears(u, self.maps))
        k, v = past.extend_stacked(k, v, 2, lambda kv: past.extend_to_blocks("kv", kv, self.window.size, whole=1))
        q, k = unit(q, self.scale), unit(k)
        near, values = (x[:, -self.window.size - u.shape[1] :] for x in (k, v))
        q, near = self.rotated(q, near, past)
        documents = self.documents(starts, past, q.shape[1], near.shape[1])
        out = self.attend(q, near, values, past, documents, self.tiles(q, near.shape[1], past, documents))
        return out.flatten(-2), for_heads(k, self.heads), for_heads(v, self.heads)


class StateCell(nn.Module):
    """The recurrent direction: the keys and values of a state for a block's tokens, and the state after the block."""

    def __init__(self, config: LayerConfig):
        super().__init__()
        width, states = config.width, config.block_recurrent.states
        self.heads = config.heads
        self.norm = nn.RMSNorm(width, eps=1e-6)
        self.identity = nn.Parameter(torch.randn(states, width) * 0.1)
        self.project = Linear(width, 4 * config.inner, parts=4 * (config.inner,))  # two queries, keys, values
        self.self_scale = nn.Parameter(torch.full((config.heads,), math.sqrt(config.head)))
        self.token_scale = nn.Parameter(torch.full((config.heads,), math.sqrt(config.head)))
        self.update = Linear(2 * config.inner, width)
        self.gate = nn.Parameter(torch.ones(width))  # b: initially 0.73 of the state is kept

    def forward(self, state: Tensor, tokens: RecurrentWindow | None) -> tuple[Tensor, Tensor, Tensor]:
        """Return keys and values of `state` (B, S, H, dh), and the state after a block of `tokens`.

        The state is unchanged if `tokens` is None.
        """
        projected = self.project(self.norm(state) + self.identity).unflatten(-1, (4, self.heads, -1))
        q_self, q_tokens, k, v = projected.unbind(2)  # (B, S, H, dh)
        k = unit(k)
        if tokens is None:
            return k, v, state
        own = _attend(unit(q_self, self.self_scale), k, v)
        cross = _attend(unit(q_tokens, self.token_scale), *tokens)
        gate = torch.sigmoid(self.gate)
        return k, v, gate * state + (1 - gate) * self.update(torch.cat((own, cross), dim=-1))


class BlockRecurrentMixer(nn.Module):
    """Sliding attention, in parallel with cross-attention to a state that is updated after each block."""

    def __init__(self, config: LayerConfig):
        super().__init__()
        width, self.block = config.width, config.block
        self.attention = TokenAttention(config, config.block)
        self.query = Linear(width, config.inner)
        self.scale = nn.Parameter(torch.full((config.heads,), math.sqrt(config.head)))
        self.cell = StateCell(config)
        self.initial = nn.Parameter(torch.randn(config.block_recurrent.states, width) * 0.1)
        self.out = Linear(2 * config.inner, width, into_stream=True)

    def forward(self, u: Tensor, past: Past, starts: Tensor | None) -> Tensor:
        own, k, v = self.attention(u, past.child("self"), starts)
        state = past.serial_state("state")
        if state is None:
            state = self.initial.expand(len(u), -1, -1)
        keys, values = [], []
        for index, tokens in enumerate(self._windows(k, v, u.shape[1], past, starts)):
            if starts is not None:
                state = torch.where(starts[:, index, None, None], self.initial, state)
            key, value, state = self.cell(state, tokens)
            keys.append(key)
            values.append(value)
        past.leave_serial_state("state", state)
        k, v = (torch.stack(x, dim=1).flatten(0, 1) for x in (keys, values))  # (B nb, S, H, dh)
        q = unit(self.query(u).unflatten(-1, (len(self.scale), -1)), self.scale)
        cross = _attend(q.unflatten(1, (len(keys), -1)).flatten(0, 1), k, v)  # (B nb, W, H dh)
        return self.out(torch.cat((own, cross.view(own.shape)), dim=-1))

    def _windows(
        self, k: Tensor, v: Tensor, length: int, past: Past, starts: Tensor | None
    ) -> list[RecurrentWindow | None]:
        """Return what the state attends to after each block of the slice; None for a block ending after it."""
        if not past.blocks_ended(self.block, length):
            return [None]
        blocks = -(-length // self.block)
        first = (
            [] if k.shape[1] > blocks * self.block else [RecurrentWindow(k[:, : self.block], v[:, : self.block], None)]
        )
        if len(first) == blocks:
            return first
        keys, values = (self._pairs(x) for x in (k, v))
        masks = [None] * len(keys) if starts is None else self._masks(starts[:, len(first) :])
        return [*first, *map(RecurrentWindow, keys, values, masks)]

    def _pairs(self, x: Tensor) -> list[Tensor]:
        """Return each block together with the one before it, (B, n, H, dh) -> (B, 2W, H, dh) for all but the first.

        Blocks are unbound at once: indexing them one by one would make the backward pass quadratic in their number.
        `unfold` is not used, because a compiled layer adds up its gradient by atomics, in no fixed order and in bf16.
        """
        blocks = x[:, : x.shape[1] // self.block * self.block].unflatten(1, (-1, self.block)).unbind(1)
        return [torch.cat(pair, dim=1) for pair in pairwise(blocks)]

    def _masks(self, starts: Tensor) -> list[Tensor]:
        """Return masks that hide the block before one that begins a document: (B, 1, 1, 2W) for each block."""
        seen = torch.stack((~starts, torch.ones_like(starts)), dim=-1).repeat_interleave(self.block, dim=-1)
        return list(seen[:, :, None, None].unbind(1))


def _attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """Unscaled attention, (B, l, H, dh), (B, K, H, dh) twice -> (B, l, H dh)."""
    q, k, v = (x.to(q.dtype).transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=1).transpose(1, 2).flatten(-2)
