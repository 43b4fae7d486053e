"""Mamba-2 (Dao and Gu 2024, arXiv 2405.21060, section 7): a selective SSM between a gate and a short convolution.

    [g, x, b, c, dt] = W u;   x, b, c = SiLU(conv(x, b, c));   y = ssd(x, dt, b, c) + d x;   W_o norm(y SiLU(g))

One group: b and c are shared by all heads. The paper's layer has no feed-forward network. Here the layer keeps the
stack's, because it replaces an attention layer (the hybrids of the paper's section 9.2.3).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bst_dist.model.config import LayerConfig, within_block
from bst_dist.model.document_mask import Starts
from bst_dist.model.roles import Linear
from bst_dist.model.ssm.selective import CausalConvolution, Selective
from bst_dist.parallel.sequence.past import Past


class Mamba2Mixer(nn.Module):
    """Mamba-2 mixer: (B, l, D) -> (B, l, D)."""

    def __init__(self, config: LayerConfig):
        super().__init__()
        settings = within_block(config.mamba2, config.block)
        inner = settings.expand * config.width
        if inner % settings.head:
            raise ValueError(f"mamba2.head {settings.head} must divide mamba2.expand x width, {inner}")
        if config.block < settings.convolution - 1:
            raise ValueError(f"mamba2.convolution {settings.convolution} reaches further back than a block")
        heads = inner // settings.head
        self.sizes = inner, inner + 2 * settings.state, heads
        self.inner, self.state = inner, settings.state
        parts = inner, inner, settings.state, settings.state, heads  # gate, x, b, c and dt
        self.into = Linear(config.width, sum(parts), parts=parts)
        self.convolution = CausalConvolution(self.sizes[1], settings.convolution)
        self.scan = Selective(heads, settings.chunk, settings.dt_min, settings.dt_max)
        self.skip = nn.Parameter(torch.ones(heads))
        self.norm = nn.RMSNorm(inner, eps=1e-6)
        self.out = Linear(inner, config.width, into_stream=True)

    def forward(self, u: Tensor, past: Past, starts: Starts | None) -> Tensor:
        gate, mixed, dt = self.into(u).split(self.sizes, dim=-1)
        mixed = F.silu(self.convolution(mixed, past.child("convolution"), starts))
        x, b, c = mixed.split((self.inner, self.state, self.state), dim=-1)
        x = x.unflatten(-1, (len(self.skip), -1))  # (B, l, H, P)
        y = self.scan(x, dt, b, c.unsqueeze(2), past.child("ssm"), starts).squeeze(2)
        y = (y + self.skip.unsqueeze(-1) * x).flatten(-2)
        return self.out(self.norm(y.to(u.dtype) * F.silu(gate)).to(u.dtype))
