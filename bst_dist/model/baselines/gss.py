"""Gated state spaces, interleaved with attention layers as GSS-Hybrid (Mehta et al. 2022, arXiv 2206.13947).

    mixer(u) = W_o (GELU(W_g u) ⊙ W_up ssm(GELU(W_down u)))

The SSM is narrow (D/4), has one set of many modes for all channels (N = 512) and runs over the whole sequence, whereas
attention layers see one window. The paper's layer has no feed-forward network; here the layer keeps the stack's.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from bst_dist.model.config import LayerConfig, SSMConfig, within_block
from bst_dist.model.document_mask import Starts
from bst_dist.model.matmul import cast_by_channel, product_dtype
from bst_dist.model.roles import Linear
from bst_dist.model.ssm.s4d import S4D
from bst_dist.parallel.sequence.past import Past


class GSSMixer(nn.Module):
    """Gated state space mixer: (B, l, D) -> (B, l, D)."""

    def __init__(self, config: LayerConfig):
        super().__init__()
        if not isinstance(config.ssm, SSMConfig):
            raise ValueError(f"gss shares the modes of a diagonal SSM: ssm.kernel must be s4d, not {config.ssm.kernel}")
        width, wide, narrow = config.width, config.gss.gate * config.width, config.width // config.gss.reduce
        self.gate = Linear(width, wide)
        self.down = Linear(width, narrow)
        self.ssm = S4D(narrow, 1, within_block(config.ssm, config.block), shared_modes=True)
        self.up = Linear(narrow, wide)
        self.out = Linear(wide, width, into_stream=True)

    def forward(self, u: Tensor, past: Past, starts: Starts | None) -> Tensor:
        y = self.ssm(F.gelu(self.down(u)), past, starts)  # (B, l, 1, D/4)
        return self.out(F.gelu(self.gate(u)) * self.up(cast_by_channel(y, product_dtype(y)).squeeze(2)))
