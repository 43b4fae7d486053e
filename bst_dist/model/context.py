"""Context states: what a block attends to beside its window, made from the SSM's outputs.

The three variants of the paper (arXiv 2306.09539, section 3.3): single-head (SH) and multi-head (MH) states are the
outputs of the current block, one stream or one a head, attended causally; multi-filter (MF) states are the outputs of
S filters at the end of the previous block, one state a filter.

Shapes: B rows, l tokens, Ds SSM width, C output maps, S states, H heads, W block.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from pydantic import model_validator
from torch import Tensor, nn
from torch.nn import functional as F

from bst_dist.model.attention import unit
from bst_dist.model.ssm.kernels import KernelConfig, build_kernel
from bst_dist.parallel.past import Past
from data_pipeline.config import Config


class ContextConfig(Config):
    """How SSM outputs become context states."""

    variant: Literal["SH", "MH", "MF"] = "SH"
    """Single-head, multi-head or multi-filter."""
    states: int = 32
    """MF: number of filters S, hence of context states a block."""
    ssm_width: int | None = None
    """Channels of the SSM, Ds; None: a quarter of the model's width, an eighth for MF."""
    attend: Literal["current", "previous"] = "current"
    """SH and MH: the states of the current block, causally, or all of the previous block's (the other reading of the
    paper's text)."""

    @model_validator(mode="after")
    def _check(self) -> ContextConfig:
        if self.variant == "MF" and self.attend == "previous":
            raise ValueError(
                "attend: MF states are the end of the previous block as they are; 'previous' is for SH, MH"
            )
        return self

    def width(self, model_width: int) -> int:
        """Ds for a model of width D."""
        return self.ssm_width or model_width // (8 if self.variant == "MF" else 4)


class StreamContext(nn.Module):
    """SH and MH: keys and values of a block's SSM outputs, S = W states; (B, l, Ds) -> (B, nb, S, H, dh) each."""

    def __init__(self, width: int, heads: int, block: int, config: ContextConfig, ssm: KernelConfig):
        super().__init__()
        channels = config.width(width)
        self.block, self.attend = block, config.attend
        self.ssm = build_kernel(channels, heads if config.variant == "MH" else 1, ssm)
        self.key = nn.Parameter(torch.randn(heads, channels, width // heads) / math.sqrt(channels))
        self.value = nn.Parameter(torch.randn(heads, channels, width // heads) / math.sqrt(channels))

    def forward(self, z: Tensor, past: Past, starts: Tensor | None) -> tuple[Tensor, Tensor]:
        y = self.ssm(z, past, starts)  # (B, l, C, Ds): one stream, or one a head
        y = y.to(_matmul_dtype(y)).transpose(1, 2)  # (B, C, l, Ds)
        kv = torch.stack((unit(y @ self.key), y @ self.value), dim=2)  # (B, H, 2, l, dh)
        kv = kv.movedim(3, 1).transpose(2, 3)  # (B, l, 2, H, dh)
        offset = past.position % self.block  # > 0 only inside a block, token by token
        held = offset if self.attend == "current" else offset + self.block
        following = (offset + z.shape[1]) % self.block + held - offset
        kv = past.extend("kv", kv, before=held, after=following)
        if self.attend == "previous":
            kv = self._previous(kv, z.shape[1] + held, starts)
        elif kv.shape[1] <= self.block:
            kv = kv.unsqueeze(1)
        else:
            kv = kv.unflatten(1, (-1, self.block))
        return kv.unbind(3)

    def _previous(self, kv: Tensor, needed: int, starts: Tensor | None) -> Tensor:
        """The block before each; where there is none, zeros, whose attention adds nothing."""
        kv = F.pad(kv, (0, 0, 0, 0, 0, 0, needed - kv.shape[1], 0))
        blocks = -(-(needed - self.block) // self.block)
        kv = kv[:, : blocks * self.block].unflatten(1, (blocks, self.block))
        return kv if starts is None else kv * ~starts.view(*starts.shape, 1, 1, 1, 1)


class FilterContext(nn.Module):
    """MF: keys and values of S filters' outputs at the end of the block before; -> (B, nb, S, H, dh) each."""

    def __init__(self, width: int, heads: int, block: int, config: ContextConfig, ssm: KernelConfig):
        super().__init__()
        channels = config.width(width)
        self.block, self.heads = block, heads
        # Each filter has dynamics of its own: S read-outs of one N-dimensional state have rank N at most.
        self.ssm = build_kernel(channels, config.states, ssm, own_dynamics=True)
        self.identity = nn.Parameter(torch.randn(config.states, channels) * 0.02)
        self.initial = nn.Parameter(torch.randn(config.states, channels) * 0.02)
        self.key_value = nn.Linear(channels, 2 * width, bias=False)

    def forward(self, z: Tensor, past: Past, starts: Tensor | None) -> tuple[Tensor, Tensor]:
        ends = self.ssm.block_ends(z, self.block, past, starts)  # (B, nb, S, Ds)
        states = past.extend("ends", ends, before=1)
        if states.shape[1] == ends.shape[1]:  # nothing came before the first block
            states = torch.cat((self.initial.expand(len(z), 1, -1, -1), states), dim=1)
        states = states[:, : -(-z.shape[1] // self.block)]
        if starts is not None:
            states = torch.where(starts.view(*starts.shape, 1, 1), self.initial, states)
        k, v = self.key_value(states + self.identity).unflatten(-1, (2, self.heads, -1)).unbind(3)
        return unit(k), v


class CrossAttention(nn.Module):
    """Attention of each block's tokens to its context states: (B, l, D), (B, l, Ds) -> (B, l, D)."""

    def __init__(self, width: int, heads: int, block: int, config: ContextConfig, ssm: KernelConfig):
        super().__init__()
        self.block, self.heads = block, heads
        self.query = nn.Linear(width, width, bias=False)
        self.scale = nn.Parameter(torch.full((heads,), math.sqrt(width // heads)))
        self.causal = config.variant != "MF" and config.attend == "current"
        kind = FilterContext if config.variant == "MF" else StreamContext
        self.context = kind(width, heads, block, config, ssm)

    def forward(self, u: Tensor, z: Tensor, past: Past, starts: Tensor | None) -> Tensor:
        q = unit(self.query(u).unflatten(-1, (self.heads, -1)))  # (B, l, H, dh)
        q = q * self.scale.to(q.dtype).unsqueeze(-1)
        k, v = self.context(z, past, starts)  # (B, nb, S, H, dh)
        # A block is a batch entry of one fused attention call.
        q = q.unflatten(1, (k.shape[1], -1)).flatten(0, 1).transpose(1, 2)  # (B nb, H, W, dh)
        k, v = (x.to(q.dtype).flatten(0, 1).transpose(1, 2) for x in (k, v))
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=self._mask(q, k), is_causal=self._square(q, k), scale=1)
        return out.transpose(1, 2).reshape(u.shape)

    def _square(self, q: Tensor, k: Tensor) -> bool:
        return self.causal and q.shape[2] == k.shape[2]

    def _mask(self, q: Tensor, k: Tensor) -> Tensor | None:
        """Inside a block, token by token: the states up to each token's own; aligned blocks need no mask tensor."""
        if not self.causal or self._square(q, k):
            return None
        return q.new_ones(q.shape[2], k.shape[2], dtype=torch.bool).tril(k.shape[2] - q.shape[2])


def _matmul_dtype(x: Tensor) -> torch.dtype:
    """The dtype a linear layer would compute in here: autocast's where it is on."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
