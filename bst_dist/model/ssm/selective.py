"""Selective state spaces by matrix products: Mamba-2's SSD (Dao and Gu 2024, arXiv 2405.21060, sections 6 and 7).

Decay and input of the state depend on the token. A head of P channels has an N x P state with one decay per token:

    h_t = a_t h_{t-1} + b_t (x) x_t,   y_t = c_t h_t,   a_t = exp(-dt_t exp(log_decay))

b_t and c_t (N) are shared by the heads; each head has its own step dt_t, which is also a factor of x_t. Inside a chunk
of T tokens the map is a causal T x T matrix; between chunks the state passes. So time and memory are linear in the
length, and causality is exact. The state after a slice is an affine map of the state before it, with one factor per
head, so the ranks of a sequence need not wait for each other. All is in single precision, also under autocast.

Shapes: B rows, l tokens, m = l / T chunks, H heads, P channels of one, N state, C read-outs.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bst_dist.model.config import SSDConfig
from bst_dist.model.document_mask import Borders, Starts
from bst_dist.model.roles import Linear, Role
from bst_dist.parallel.sequence.past import Past


def running_sum(x: Tensor) -> Tensor:
    """Return the sums of the entries up to each one, over the last dimension: (..., T) -> (..., T).

    It is a product with a triangle of ones, because torch's cumsum adds in no fixed order on CUDA.
    """
    return x @ x.new_ones(x.shape[-1], x.shape[-1]).triu()


class Decays(nn.Module):
    """The parameters of H heads whose decay depends on the token."""

    def __init__(self, heads: int, chunk: int, dt_min: float, dt_max: float):
        super().__init__()
        self.chunk = chunk
        self.log_decay = nn.Parameter(torch.empty(heads).uniform_(1, 16).log())  # as published
        dt = torch.empty(heads).uniform_(math.log(dt_min), math.log(dt_max)).exp()
        self.step = nn.Parameter(dt + torch.log(-torch.expm1(-dt)))  # softplus(step) = dt
        self.roles = dict.fromkeys(("log_decay", "step"), Role.DYNAMICS)


class Selective(Decays):
    """A selective scan with H heads."""

    @torch.autocast("cuda", enabled=False)
    @torch.autocast("cpu", enabled=False)
    def forward(self, x: Tensor, dt: Tensor, b: Tensor, c: Tensor, past: Past, starts: Starts | None) -> Tensor:
        """Scan (B, l, H, P) inputs, (B, l, H) steps before softplus, (B, l, N), (B, l, C, N) -> (B, l, C, H, P).

        `starts`: where documents begin; the state before them is zero.
        """
        x, dt, b, c = (one.to(self.step.dtype) for one in (x, dt, b, c))
        dt = F.softplus(dt + self.step)
        length = x.shape[1]
        chunk = self.chunk if length % self.chunk == 0 else length  # a slice that lies within a block is one chunk
        x, log_a, b, c = (
            one.unflatten(1, (-1, chunk)) for one in (x * dt.unsqueeze(-1), -dt * self.log_decay.exp(), b, c)
        )
        x, log_a, c = x.transpose(2, 3), log_a.transpose(2, 3), c.transpose(2, 3)  # (B, m, H, T, P), (B, m, H, T), ...
        decays = Reach.of(log_a, starts)
        ends = b.transpose(2, 3).unsqueeze(2) @ (x * decays.to_end.unsqueeze(-1))  # (B, m, H, N, P)
        entering = self._entering(ends, decays.from_begin[..., -1, None, None], past, starts)
        scores = c @ b.transpose(2, 3).unsqueeze(2)  # (B, m, C, T, T)
        y = (scores.unsqueeze(3) * decays.inside.unsqueeze(2)) @ x.unsqueeze(2)  # (B, m, C, H, T, P)
        y = y + (c.unsqueeze(3) @ entering.unsqueeze(2)) * decays.from_begin[:, :, None, ..., None]
        return y.permute(0, 1, 4, 2, 3, 5).flatten(1, 2)

    def _entering(self, ends: Tensor, kept: Tensor, past: Past, starts: Starts | None) -> Tensor:
        """Return the state before each chunk, (B, m, H, N, P), from `ends`, the state that each chunk alone leaves.

        `kept` (B, m, H, 1, 1): the share of the state before it that a chunk keeps; zero if a document begins inside.
        """
        starts = None if isinstance(starts, Borders) else starts
        begins = torch.zeros(ends.shape[:2], dtype=torch.bool, device=ends.device)
        if starts is not None:
            begins.view(*starts.shape, -1)[:, :, 0] = starts
        state = torch.zeros_like(ends[:, 0])
        share = torch.ones_like(kept[:, 0])
        states, shares = [], []
        # Chunks are unbound at once: indexing them one by one would make the backward pass quadratic in the chunks.
        for end, keep, begin in zip(ends.unbind(1), kept.unbind(1), begins.unbind(1), strict=True):
            if starts is not None:
                state, share = (one.masked_fill(begin[:, None, None, None], 0) for one in (state, share))
            states.append(state)
            shares.append(share)
            state, share = end + keep * state, keep * share
        before = past.state("state", state, share)
        entering = torch.stack(states, 1)
        return entering if before is None else entering + torch.stack(shares, 1) * before.unsqueeze(1)


class Reach(NamedTuple):
    """Products of decays within a chunk; zero if a document begins in between."""

    inside: Tensor
    """(B, m, H, T, T): from token j to token t; 0 for later tokens j."""
    to_end: Tensor
    """(B, m, H, T): from each token to the chunk's end."""
    from_begin: Tensor
    """(B, m, H, T): from the state before the chunk to each token."""

    @staticmethod
    def of(log_a: Tensor, starts: Starts | None) -> Reach:
        """Return the products from `log_a` (B, m, H, T), the logarithms of the decays."""
        chunk = log_a.shape[-1]
        hidden = torch.ones(chunk, chunk, dtype=torch.bool, device=log_a.device).triu(1)  # later tokens
        if isinstance(starts, Borders):
            count = starts.count(chunk).unsqueeze(2)  # (B, m, 1, T)
            hidden = hidden | (count.unsqueeze(-1) != count.unsqueeze(-2))
            sums = (log_a.unsqueeze(-2) @ (~hidden).to(log_a.dtype).mT).squeeze(-2)  # since the document began
            to_end = (sums[..., -1:] - sums).masked_fill(count != count[..., -1:], -torch.inf)
            from_begin = sums.masked_fill(count > 0, -torch.inf)
        else:
            sums = running_sum(log_a)
            to_end, from_begin = sums[..., -1:] - sums, sums
        inside = (sums.unsqueeze(-1) - sums.unsqueeze(-2)).masked_fill(hidden, -torch.inf)
        return Reach(inside.exp(), to_end.exp(), from_begin.exp())


class SSD(nn.Module):
    """A selective SSM as the kernel of a layer: (B, l, Ds) -> (B, l, C, Ds), C read-outs of one state."""

    def __init__(self, width: int, maps: int, config: SSDConfig, own_dynamics: bool = False):
        super().__init__()
        if own_dynamics:
            raise ValueError("ssm.kernel ssd has one state for all read-outs: context.variant must be SH or MH")
        if width % config.head:
            raise ValueError(f"ssm.head {config.head} must divide the SSM's width, {width}")
        heads = width // config.head
        self.sizes = heads, config.state, maps * config.state
        self.select = Linear(width, sum(self.sizes), parts=(heads, config.state, *maps * (config.state,)))
        self.scan = Selective(heads, config.chunk, config.dt_min, config.dt_max)
        self.skip = nn.Parameter(torch.randn(maps, width))

    def forward(self, z: Tensor, past: Past, starts: Starts | None = None) -> Tensor:
        dt, b, c = self.select(z).split(self.sizes, dim=-1)
        x = z.unflatten(-1, (len(self.scan.step), -1))
        y = self.scan(x, dt, b, c.unflatten(-1, (len(self.skip), -1)), past, starts).flatten(-2)
        return y + self.skip * z.to(self.skip.dtype).unsqueeze(2)


class CausalConvolution(nn.Module):
    """A short convolution of each channel over the last K tokens, including the current: (B, l, C) -> (B, l, C)."""

    def __init__(self, channels: int, taps: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(channels, taps).uniform_(-1, 1) / math.sqrt(taps))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor, past: Past, starts: Starts | None) -> Tensor:
        """`starts`: where documents begin; a document's tokens see none before it. A block has K - 1 tokens or more."""
        length, taps = x.shape[1], self.weight.shape[1]
        x = past.extend("taps", x, before=taps - 1)
        x = F.pad(x, (0, 0, length + taps - 1 - x.shape[1], 0))
        # Slices and not `unfold`, whose gradient a compiled layer adds up by atomics, in no fixed order and in bf16.
        x = torch.stack([x[:, tap : tap + length] for tap in range(taps)], dim=-1)  # (B, l, C, K), own token last
        weight = self.weight.to(x.dtype)
        if starts is not None:
            hidden = _before_document(starts, length, taps, past)
            x = x.masked_fill(hidden.unsqueeze(2), 0)
        return (x * weight).sum(-1) + self.bias.to(x.dtype)


def _before_document(starts: Starts, length: int, taps: int, past: Past) -> Tensor:
    """Return which of a token's last K tokens (itself last) are before its document, (B, l, K) bool."""
    if isinstance(starts, Borders):  # documents may begin in the last tokens before the slice
        begins = past.once(f"begins: {taps}", lambda: past.extend("begins", starts.begins.int(), before=taps - 1))
        begun = F.pad(begins, (length + taps - 1 - begins.shape[1], 0)).cumsum(1).unfold(1, taps, 1)  # (B, l, K)
        return begun != begun[..., -1:]
    place = torch.arange(length, device=starts.device) % (length // starts.shape[1])
    back = torch.arange(taps - 1, -1, -1, device=starts.device)
    begins = starts.repeat_interleave(length // starts.shape[1], dim=1)  # (B, l)
    return begins.unsqueeze(-1) & (back > place.unsqueeze(-1))
