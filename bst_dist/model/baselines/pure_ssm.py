"""A layer without attention: SSM, GELU, GLU (the S4 layer, arXiv 2111.00396, with S4D's kernel, arXiv 2206.11893)."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from bst_dist.model.config import LayerConfig
from bst_dist.model.document_mask import Starts
from bst_dist.model.roles import Linear
from bst_dist.model.ssm.kernels import build_kernel
from bst_dist.parallel.sequence.past import Past


class PureSSMMixer(nn.Module):
    """One SSM per channel at the model's width, mixed by a gated linear unit: (B, l, D) -> (B, l, D)."""

    def __init__(self, config: LayerConfig):
        super().__init__()
        self.ssm = build_kernel(config.width, 1, config.ssm, config.block)
        self.out = Linear(config.width, 2 * config.width, into_stream=True, parts=(config.width, config.width))

    def forward(self, u: Tensor, past: Past, starts: Starts | None) -> Tensor:
        y = F.gelu(self.ssm(u, past, starts).squeeze(2))
        return F.glu(self.out(y.to(u.dtype)), dim=-1)
