"""The layers of the stack: a mixer over positions, then a feed-forward network, both residual.

Every mixer maps (B, l, D) -> (B, l, D) given its past and the document starts. `MIXERS` lists the mixers.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bst_dist.model import compiled
from bst_dist.model.attention.self_attention import SlidingAttention
from bst_dist.model.baselines.block_recurrent import BlockRecurrentMixer
from bst_dist.model.baselines.full import FullMixer
from bst_dist.model.baselines.gated_deltanet import GatedDeltaNetMixer
from bst_dist.model.baselines.gss import GSSMixer
from bst_dist.model.baselines.joint import JointMixer
from bst_dist.model.baselines.mamba2 import Mamba2Mixer
from bst_dist.model.baselines.pure_ssm import PureSSMMixer
from bst_dist.model.baselines.transformer_xl import TransformerXLMixer
from bst_dist.model.config import LayerConfig
from bst_dist.model.context import CrossAttention
from bst_dist.model.document_mask import Starts
from bst_dist.model.matmul import fused_linears, product_dtype, relu_of, whole
from bst_dist.model.prepared import Prepares
from bst_dist.model.roles import Linear
from bst_dist.parallel.sequence.past import Past, RecordedPast


class SlidingMixer(nn.Module):
    """Sliding-window self-attention."""

    def __init__(self, config: LayerConfig):
        super().__init__()
        self.attention = SlidingAttention(config, config.block)
        self.out = Linear(config.inner, config.width, into_stream=True)

    def forward(self, u: Tensor, past: Past, starts: Starts | None) -> Tensor:
        return self.out(self.attention(u, past, starts))


class BSTMixer(nn.Module):
    """Block-State Transformer: sliding self-attention, in parallel with cross-attention to context states of an SSM."""

    def __init__(self, config: LayerConfig):
        super().__init__()
        self.attention = SlidingAttention(config, config.block)
        self.down = Linear(config.width, config.context.width(config.width))
        self.cross = CrossAttention(config)
        self.out = Linear(2 * config.inner, config.width, into_stream=True)

    def forward(self, u: Tensor, past: Past, starts: Starts | None) -> Tensor:
        z, *qkv, query = fused_linears(u, whole(self.down), self.attention.maps, whole(self.cross.query))
        own = self.attention(u, past.child("self"), starts, qkv=qkv)
        cross = self.cross(query, z, past.child("context"), starts)
        return self.out(torch.cat((own, cross), dim=-1))


class NoCrossMixer(BSTMixer):
    """Ablation: the output of cross-attention is zero. Its parameters remain, so a trained BST can be loaded."""

    def forward(self, u: Tensor, past: Past, starts: Starts | None) -> Tensor:
        own = self.attention(u, past.child("self"), starts)
        return self.out(torch.cat((own, torch.zeros_like(own)), dim=-1))


MIXERS: dict[str, type[nn.Module]] = {
    "bst": BSTMixer,
    "bst-no-cross": NoCrossMixer,
    "bst-joint": JointMixer,
    "sliding": SlidingMixer,
    "transformer-xl": TransformerXLMixer,
    "block-recurrent": BlockRecurrentMixer,
    "gss": GSSMixer,
    "ssm": PureSSMMixer,
    "mamba2": Mamba2Mixer,
    "gated-deltanet": GatedDeltaNetMixer,
    "full": FullMixer,
}
"""The class of each mixer. `config.MIXER_SECTIONS` lists the settings sections that it reads."""


def squared_relu(x: Tensor) -> Tensor:
    """Return max(x, 0)^2 (Primer, So et al., arXiv 2109.08668)."""
    return torch.relu(x).square()


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": torch.relu,
    "relu2": squared_relu,
    "gelu": F.gelu,
    "swiglu": F.silu,
}
"""The activation function of the feed-forward network, by its name in the settings."""


class FeedForward(nn.Module):
    """Two linear maps around an activation, without biases: W_out f(W_up x); with a gate, W_out (f(W_gate x) * W_up x),
    elementwise (SwiGLU, Shazeer, arXiv 2002.05202)."""

    def __init__(self, config: LayerConfig):
        super().__init__()
        self.activation = ACTIVATIONS[config.activation]
        self.up = Linear(config.width, config.ffn)
        self.gate = Linear(config.width, config.ffn) if config.activation == "swiglu" else None
        self.out = Linear(config.ffn, config.width, into_stream=True)

    def forward(self, x: Tensor) -> Tensor:
        if self.activation is torch.relu:
            return self.out(relu_of(x, self.up))
        if self.gate is None:
            return self.out(self.activation(self.up(x)))
        gate, up = fused_linears(x, whole(self.gate), whole(self.up))
        return self.out(self.activation(gate) * up)


class Layer(nn.Module):
    """Pre-norm residual layer: h = x + b mixer(norm(x)); h + b ffn(norm(h)), where b multiplies both branches."""

    def __init__(self, mixer: str, config: LayerConfig, branch: float = 1.0):
        super().__init__()
        self.branch = branch
        self.compiled = False
        """Whether training runs the layer as one compiled graph (`compiled`)."""
        self.mixer_norm = nn.RMSNorm(config.width, eps=1e-6)
        self.mixer = MIXERS[mixer](config)
        self.ffn_norm = nn.RMSNorm(config.width, eps=1e-6)
        self.ffn = FeedForward(config)

    def forward(
        self, x: Tensor, past: Past, starts: Starts | None = None, keeps: compiled.Keeps | None = None
    ) -> Tensor:
        """`keeps`: for a call that runs as one graph, the outputs kept for the backward pass (`compiled.run`)."""
        if self.is_one_graph(past):
            return compiled.run(self, x, past, starts, keeps)
        return self.compute(x, past, starts)

    def is_one_graph(self, past: Past) -> bool:
        """Whether a call with this past runs as one compiled graph."""
        return self.compiled and compiled.fits(past)

    def compute(self, x: Tensor, past: Past, starts: Starts | None) -> Tensor:
        """Compute the layer operation by operation."""
        h = torch.add(x, self.mixer(self.mixer_norm(x), past, starts), alpha=self.branch)
        h = h.flatten(0, 1)  # the shape that products use: a compiled layer then casts its gradient while computing it
        return torch.add(h, self.ffn(self.ffn_norm(h)), alpha=self.branch).view(x.shape)

    def prepare(self, x: Tensor, past: Past, starts: Starts | None) -> dict[str, object]:
        """Return the values that the layer asks `past` for with `Past.once`, for a slice that is a whole sequence."""
        like = x[..., :0].to(product_dtype(x))
        recorded = RecordedPast(past)
        for module in self.mixer.modules():
            if isinstance(module, Prepares):
                module.prepare(like, recorded, starts)
        return recorded.recorded

    def initialize(self, depth: int) -> None:
        """Draw linear maps from N(0, 1/fan-in); maps into the residual stream are smaller by a factor sqrt(2 depth)."""
        for module in self.modules():
            if isinstance(module, Linear):
                gain = 1 / math.sqrt(2 * depth) if module.into_stream else 1.0
                nn.init.normal_(module.weight, std=gain / math.sqrt(module.in_features))
