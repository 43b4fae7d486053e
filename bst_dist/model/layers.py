"""The layers of the stack: a mixer over positions, then a feed-forward network, both residual.

Every mixer maps (B, l, D) -> (B, l, D) given its past and the document starts; `MIXERS` names them all.
"""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from torch import Tensor, nn

from bst_base.settings import Config
from bst_dist.model.attention import AttentionConfig, SlidingAttention
from bst_dist.model.baselines.block_recurrent import BlockRecurrentConfig, BlockRecurrentMixer
from bst_dist.model.baselines.full import FullAttentionConfig, FullMixer
from bst_dist.model.baselines.gss import GSSConfig, GSSMixer
from bst_dist.model.baselines.pure_ssm import PureSSMMixer
from bst_dist.model.baselines.transformer_xl import TransformerXLConfig, TransformerXLMixer
from bst_dist.model.context import ContextConfig, CrossAttention
from bst_dist.model.ssm.kernels import KernelConfig
from bst_dist.model.ssm.s4d import SSMConfig
from bst_dist.parallel.past import Past


class LayerConfig(Config):
    """What all layers of a model share."""

    width: int
    """Model width D."""
    heads: int
    """Attention heads H; must divide the width."""
    ffn: int
    """Width M of the feed-forward network."""
    block: int
    """The attention window and the unit everything is aligned to, in tokens (W)."""
    attention: AttentionConfig = AttentionConfig()
    context: ContextConfig = ContextConfig()
    ssm: KernelConfig = SSMConfig()
    transformer_xl: TransformerXLConfig = TransformerXLConfig()
    block_recurrent: BlockRecurrentConfig = BlockRecurrentConfig()
    gss: GSSConfig = GSSConfig()
    full: FullAttentionConfig = FullAttentionConfig()

    def mixers(self) -> list[str]:
        """The mixer of each layer; which ones is said by the model."""
        return list(MIXERS)

    def unused_sections(self) -> list[str]:
        """Sections that are set and that no layer reads.

        No error, so that one recipe compares mixers by an override of `mixer` alone; a run says so at its start.
        """
        used = {section for mixer in self.mixers() for section in MIXERS[mixer].sections}
        known = {section for mixer in MIXERS.values() for section in mixer.sections}
        fields = type(self).model_fields
        return [name for name in sorted(known - used) if getattr(self, name) != fields[name].default]


class SlidingMixer(nn.Module):
    """Sliding-window self-attention."""

    sections: ClassVar = ("attention",)

    def __init__(self, config: LayerConfig):
        super().__init__()
        self.attention = SlidingAttention(config.width, config.heads, config.block, config.attention)
        self.out = nn.Linear(config.width, config.width, bias=False)

    def forward(self, u: Tensor, past: Past, starts: Tensor | None) -> Tensor:
        return self.out(self.attention(u, past, starts))


class BSTMixer(nn.Module):
    """Block-State Transformer: sliding self-attention beside cross-attention to context states of an SSM."""

    sections: ClassVar = ("attention", "context", "ssm")

    def __init__(self, config: LayerConfig):
        super().__init__()
        self.attention = SlidingAttention(config.width, config.heads, config.block, config.attention)
        self.down = nn.Linear(config.width, config.context.width(config.width), bias=False)
        self.cross = CrossAttention(config.width, config.heads, config.block, config.context, config.ssm)
        self.out = nn.Linear(2 * config.width, config.width, bias=False)

    def forward(self, u: Tensor, past: Past, starts: Tensor | None) -> Tensor:
        own = self.attention(u, past.child("self"), starts)
        cross = self.cross(u, self.down(u), past.child("context"), starts)
        return self.out(torch.cat((own, cross), dim=-1))


class NoCrossMixer(BSTMixer):
    """Ablation: cross-attention put to zero. Its parameters stay, so a trained BST can be loaded and tried without."""

    def forward(self, u: Tensor, past: Past, starts: Tensor | None) -> Tensor:
        own = self.attention(u, past.child("self"), starts)
        return self.out(torch.cat((own, torch.zeros_like(own)), dim=-1))


MIXERS: dict[str, type[nn.Module]] = {
    "bst": BSTMixer,
    "bst-no-cross": NoCrossMixer,
    "sliding": SlidingMixer,
    "transformer-xl": TransformerXLMixer,
    "block-recurrent": BlockRecurrentMixer,
    "gss": GSSMixer,
    "ssm": PureSSMMixer,
    "full": FullMixer,
}
"""Mixers by name; the `sections` of each are the sections of the settings that it reads."""


class FeedForward(nn.Module):
    """Two linear maps around a ReLU, without biases."""

    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.up = nn.Linear(width, hidden, bias=False)
        self.out = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.relu(self.up(x)))


class Layer(nn.Module):
    """Pre-norm residual layer: h = x + b mixer(norm(x)); h + b ffn(norm(h)), with a multiplier b of its branches."""

    def __init__(self, mixer: str, config: LayerConfig, branch: float = 1.0):
        super().__init__()
        self.branch = branch
        self.mixer_norm = nn.RMSNorm(config.width, eps=1e-6)
        self.mixer = MIXERS[mixer](config)
        self.ffn_norm = nn.RMSNorm(config.width, eps=1e-6)
        self.ffn = FeedForward(config.width, config.ffn)

    def forward(self, x: Tensor, past: Past, starts: Tensor | None = None) -> Tensor:
        x = torch.add(x, self.mixer(self.mixer_norm(x), past, starts), alpha=self.branch)
        return torch.add(x, self.ffn(self.ffn_norm(x)), alpha=self.branch)

    def initialize(self, depth: int) -> None:
        """Linear maps N(0, 1/fan-in); those that write to the residual stream smaller by sqrt(2 depth)."""
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear):
                gain = 1 / math.sqrt(2 * depth) if name.endswith("out") else 1.0
                nn.init.normal_(module.weight, std=gain / math.sqrt(module.in_features))
