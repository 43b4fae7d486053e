"""Context states: vectors made from SSM outputs, which a block attends to besides its window.

The three variants of the paper (arXiv 2306.09539, section 3.3): single-head (SH) and multi-head (MH) states are the
outputs of the current block, one stream or one per head, attended causally; multi-filter (MF) states are the outputs of
S filters at the end of the previous block, one state per filter.

Shapes: B rows, l tokens, Ds SSM width, C output maps, S states, H heads, W block.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bst_dist.model.attention import sliding
from bst_dist.model.attention.documents import Documents, documents_by
from bst_dist.model.attention.flex_mask import Band, visited_tiles
from bst_dist.model.attention.window import Window
from bst_dist.model.config import LayerConfig
from bst_dist.model.document_mask import Borders, Starts
from bst_dist.model.l2_norm import unit
from bst_dist.model.matmul import cast_by_channel, product_dtype
from bst_dist.model.roles import Linear, Role, Stack
from bst_dist.model.ssm.kernels import build_kernel
from bst_dist.parallel.sequence.past import Past


class Passage(nn.Module):
    """The identity, applied to context states before attention, so that a hook can read or replace them."""

    def forward(self, states: Tensor, past: Past) -> Tensor:
        """SH and MH: one state per token, (B, l, C, Ds); MF: the states that each block sees, (B, nb, S, Ds)."""
        return states


class StreamContext(nn.Module):
    """SH and MH: keys and values of SSM outputs, one state per token, (B, l, Ds) -> (B, p + l, H, dh) each.

    The first p states are those of the slice's first block that came before the slice. When blocks attend to the
    previous block, the states are grouped by the block that sees them instead, (B, nb, W, H, dh).
    """

    def __init__(self, config: LayerConfig):
        super().__init__()
        heads = config.heads
        channels = config.context.width(config.width)
        self.block, self.attend = config.block, config.context.attend
        self.ssm = build_kernel(channels, heads if config.context.variant == "MH" else 1, config.ssm, config.block)
        self.passage = Passage()
        # Directly from Ds to each head: a map to D and then a projection would give the same class of functions.
        self.key_value = nn.Parameter(torch.randn(heads, channels, 2 * config.head) / math.sqrt(channels))
        self.roles = {"key_value": Role.MATRIX}
        self.stacks = {"key_value": Stack(-1, (config.head, config.head))}
        self.products_only = ("key_value",)

    def forward(self, z: Tensor, past: Past, starts: Starts | None) -> tuple[Tensor, Tensor]:
        y = self.passage(self.ssm(z, past, starts), past)  # (B, l, C, Ds): one stream, or one per head
        whole = 0 if self.attend == "current" else 1
        # Two products: in one product, keys and values would be interleaved in memory, and so would their gradients.
        y = cast_by_channel(y, product_dtype(y))
        k, v = (_of_heads(y, weight) for weight in self.key_value.chunk(2, dim=-1))  # (B, l, H, dh)
        k, v = past.extend_stacked(k, v, 3, lambda kv: past.extend_to_blocks("kv", kv, self.block, whole))
        if self.attend == "previous":
            k, v = (self._previous(x, past.offset(self.block) + z.shape[1], starts) for x in (k, v))
        return unit(k), v

    def _previous(self, x: Tensor, length: int, starts: Tensor | None) -> Tensor:
        """Return the block before each block that the `length` tokens lie in. Where there is none, return zeros: the
        output of attention to them is zero."""
        x = F.pad(x, (0, 0, 0, 0, self.block + length - x.shape[1], 0))
        blocks = -(-length // self.block)
        x = x[:, : blocks * self.block].unflatten(1, (blocks, self.block))
        return x if starts is None else x * ~starts.view(*starts.shape, 1, 1, 1)


def _of_heads(y: Tensor, weight: Tensor) -> Tensor:
    """Project to heads, all from one stream or each from its own: (B, l, C, Ds), (H, Ds, dh) -> (B, l, H, dh)."""
    weight = weight.to(y.dtype)
    if y.shape[2] == 1:
        return (y.squeeze(2) @ weight.transpose(0, 1).flatten(1)).unflatten(-1, (len(weight), -1))
    return torch.einsum("blhs,hsd->blhd", y, weight)


class FilterContext(nn.Module):
    """MF: keys and values of the outputs of S filters at the end of the previous block; -> (B, nb, S, H, dh) each."""

    def __init__(self, config: LayerConfig):
        super().__init__()
        channels = config.context.width(config.width)
        states = config.context.states
        self.block, self.heads = config.block, config.heads
        # Each filter has its own dynamics: S read-outs of one N-dimensional state have rank N at most.
        self.ssm = build_kernel(channels, states, config.ssm, config.block, own_dynamics=True)
        self.passage = Passage()
        self.identity = nn.Parameter(torch.randn(states, channels) * 0.02)
        self.initial = nn.Parameter(torch.randn(states, channels) * 0.02)
        self.key_value = Linear(channels, 2 * config.inner, parts=(config.inner, config.inner))

    def forward(self, z: Tensor, past: Past, starts: Starts | None) -> tuple[Tensor, Tensor]:
        """When documents begin at any token, return one more entry in front, -> (B, 1 + nb, S, H, dh): the learned
        initial states, for tokens whose document began in their block."""
        ends = self.ssm.block_ends(z, self.block, past, starts)  # (B, nb, S, Ds)
        states = past.extend("ends", ends, before=1)
        # 1 when nothing came before the first block, else 0. `initial` is in the graph on all ranks, so that every rank
        # of a sequence has a gradient for it and ZeRO's buckets agree.
        missing = ends.shape[1] + 1 - states.shape[1]
        states = torch.cat((self.initial.expand(len(z), missing, -1, -1), states), dim=1)
        states = states[:, : -(-z.shape[1] // self.block)]
        if starts is not None and not isinstance(starts, Borders):
            states = torch.where(starts.view(*starts.shape, 1, 1), self.initial, states)
        states = self.passage(states, past)
        if isinstance(starts, Borders):
            states = torch.cat((self.initial.expand(len(z), 1, -1, -1), states), dim=1)
        k, v = self.key_value(states + self.identity).unflatten(-1, (2, self.heads, -1)).unbind(3)
        return unit(k), v


FIRST_AND_ENDS = slice(0, 1), slice(1, None)
"""The two parts of MF's states when documents begin at any token: the initial states, and those at block ends."""


def build_context(config: LayerConfig) -> StreamContext | FilterContext:
    """Return the module that makes the context states of the configured variant."""
    return (FilterContext if config.context.variant == "MF" else StreamContext)(config)


class CrossAttention(nn.Module):
    """Attention of each block's tokens to its context states: (B, l, H dh), (B, l, Ds) -> (B, l, H dh)."""

    def __init__(self, config: LayerConfig):
        super().__init__()
        self.block, self.heads = config.block, config.heads
        self.query = Linear(config.width, config.inner)
        self.scale = nn.Parameter(torch.full((self.heads,), math.sqrt(config.head)))
        self.causal = config.context.variant != "MF" and config.context.attend == "current"
        self.context = build_context(config)

    def forward(self, query: Tensor, z: Tensor, past: Past, starts: Starts | None) -> Tensor:
        """`query`: the output of the map `query` for the layer's input."""
        q = unit(query.unflatten(-1, (self.heads, -1)), self.scale)  # (B, l, H, dh)
        k, v = self.context(z, past, starts)
        if isinstance(starts, Borders):
            out = self._of_documents(q, k, v, past, starts)
        else:
            out = self._causal(q, k, v) if self.causal else _whole_blocks(q, k, v)
        return out.reshape(query.shape)

    def _of_documents(self, q: Tensor, k: Tensor, v: Tensor, past: Past, starts: Borders) -> Tensor:
        """Attend from each token to the states of its block that belong to its own document."""
        if self.causal:
            documents, tiles = documents_in_blocks(q, self.block, past, starts)
            return sliding.sliding_attention(q, k, v, Window(self.block), None, documents, tiles)
        begun = starts.cut_off(self.block)[..., None, None]  # a document began in this block
        first, ends = (_whole_blocks(q, k[:, own], v[:, own]).reshape(q.shape) for own in FIRST_AND_ENDS)
        return torch.where(begun, first, ends)

    def prepare(self, like: Tensor, past: Past, starts: Starts | None) -> None:
        """See `Prepares.prepare`."""
        if self.causal and isinstance(starts, Borders):
            documents_in_blocks(like, self.block, past, starts)

    def _causal(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attend from each token to its block's states up to its own; k, v (B, p + l, H, dh), p within the block."""
        k, v = k.to(q.dtype), v.to(q.dtype)
        if q.shape[1] == k.shape[1]:  # a block is a batch entry of one fused call
            span = min(self.block, q.shape[1])
            q, k, v = (x.unflatten(1, (-1, span)).flatten(0, 1).transpose(1, 2) for x in (q, k, v))
            return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=1.0).transpose(1, 2)
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        seen = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).tril(k.shape[2] - q.shape[2])
        return F.scaled_dot_product_attention(q, k, v, attn_mask=seen, scale=1.0).transpose(1, 2)


def documents_in_blocks(
    q: Tensor, block: int, past: Past, starts: Borders
) -> tuple[Documents, tuple[Tensor, ...] | None]:
    """Return documents cut at block ends, and the tiles that FlexAttention visits with them; None if it is not used.

    With these documents, causal attention to context states is sliding attention.
    """

    def make() -> Documents:
        begins = starts.begins.unflatten(1, (-1, block)).clone()
        begins[:, :, 0] = True
        number = begins.flatten(1).cumsum(1, dtype=torch.int32)
        return documents_by(number, min(block, number.shape[1]) + 1, number.shape[1])

    documents = past.once(f"documents in blocks: {block}", make)
    if not sliding.trains_with_flex(q):
        return documents, None
    length, device = q.shape[1], q.device
    band = Band(length, length, Window(block))
    name = f"tiles in blocks: {length}, {block}"
    return documents, past.once(name, lambda: visited_tiles(band, device, documents.begin))


def _whole_blocks(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attend from each block's tokens to all its states, with blocks as batch entries: (B, l, H, dh),
    (B, nb, S, H, dh) twice."""
    queries = q.unflatten(1, (k.shape[1], -1))
    folded = (x.to(q.dtype).flatten(0, 1).transpose(1, 2) for x in (queries, k, v))
    return F.scaled_dot_product_attention(*folded, scale=1.0).transpose(1, 2)
