"""Gated state spaces, interleaved with attention layers as GSS-Hybrid (Mehta et al. 2022, arXiv 2206.13947).

    mixer(u) = W_o (GELU(W_g u) ⊙ W_up ssm(GELU(W_down u)))

The SSM is narrow (D/4), has one set of many modes for all channels (N = 512) and works on the whole sequence, where
attention layers see a window each. The paper's layer has no feed-forward network of its own; here it keeps the stack's.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from bst_dist.model.config import LayerConfig, SSMConfig
from bst_dist.model.ssm.s4d import S4D
from bst_dist.parallel.past import Past


class SharedModes(S4D):
    """S4D whose modes are one set for all channels; a channel has its own step and read-out (as in DSS)."""

    def __init__(self, width: int, config: SSMConfig, block: int):
        super().__init__(width, 1, config.model_copy(update={"chunk": min(config.chunk, block)}))
        self.log_decay = nn.Parameter(self.log_decay.detach()[:, :1].clone())  # (1, 1, n)
        self.frequency = nn.Parameter(self.frequency.detach()[:, :1].clone())


class GSSMixer(nn.Module):
    """Gated state space mixer: (B, l, D) -> (B, l, D)."""

    def __init__(self, config: LayerConfig):
        super().__init__()
        if not isinstance(config.ssm, SSMConfig):
            raise ValueError(f"gss shares the modes of a diagonal SSM: ssm.kernel must be s4d, not {config.ssm.kernel}")
        width, wide, narrow = config.width, config.gss.gate * config.width, config.width // config.gss.reduce
        self.gate = nn.Linear(width, wide, bias=False)
        self.down = nn.Linear(width, narrow, bias=False)
        self.ssm = SharedModes(narrow, config.ssm, config.block)
        self.up = nn.Linear(narrow, wide, bias=False)
        self.out = nn.Linear(wide, width, bias=False)

    def forward(self, u: Tensor, past: Past, starts: Tensor | None) -> Tensor:
        y = self.ssm(F.gelu(self.down(u)), past, starts).squeeze(2)  # (B, l, D/4)
        return self.out(F.gelu(self.gate(u)) * self.up(y.to(u.dtype)))
