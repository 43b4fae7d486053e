"""The kernels that a layer's state space model can have, with one interface.

`build_kernel` builds a kernel for Ds channels and C output maps. It has these methods (SSD, which is no convolution and
not used by MF, has only the first):

- ``forward(z, past, starts)``: outputs of every token, (B, l, Ds) -> (B, l, C, Ds);
- ``block_ends(z, block, past, starts)``: outputs of each block's last token only, (B, l, Ds) -> (B, nb, C, Ds);
- ``kernel(length)``: the convolution without its skip term, (C, Ds, length), a reference for the tests.

Its `roles` (`bst_dist.model.roles`) say which parameters are dynamics.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from bst_base.settings import Config
from bst_dist.model.config import (
    DPLRConfig,
    ExplicitConfig,
    HyenaConfig,
    KernelConfig,
    NoConvolutionConfig,
    SSDConfig,
    SSMConfig,
    within_block,
)
from bst_dist.model.ssm.dplr import S4DPLR
from bst_dist.model.ssm.s4d import S4D
from bst_dist.model.ssm.selective import SSD
from bst_dist.model.ssm.unstructured import ExplicitFilter, HyenaFilter
from bst_dist.parallel.sequence.past import Past


class NoConvolution(nn.Module):
    """Only the skip term, y_c = d_c ⊙ z: a layer without its SSM."""

    def __init__(self, width: int, maps: int, config: NoConvolutionConfig, own_dynamics: bool = False):
        super().__init__()
        self.skip = nn.Parameter(torch.randn(maps, width))

    def kernel(self, length: int) -> Tensor:
        return self.skip.new_zeros(*self.skip.shape, length)

    def forward(self, z: Tensor, past: Past, starts: Tensor | None = None) -> Tensor:
        return self.skip * z.to(self.skip.dtype).unsqueeze(2)

    def block_ends(self, z: Tensor, block: int, past: Past, starts: Tensor | None = None) -> Tensor:
        ends = z[:, min(block, z.shape[1]) - 1 :: block]
        return self(ends[:, : past.blocks_ended(block, z.shape[1])], past)


KERNELS: dict[type[Config], type[nn.Module]] = {
    SSMConfig: S4D,
    DPLRConfig: S4DPLR,
    ExplicitConfig: ExplicitFilter,
    HyenaConfig: HyenaFilter,
    SSDConfig: SSD,
    NoConvolutionConfig: NoConvolution,
}


def build_kernel(width: int, maps: int, config: KernelConfig, block: int, own_dynamics: bool = False) -> nn.Module:
    """Return the kernel that `config` selects.

    Args:
        block: block length W; chunks are at most this long.
        own_dynamics: whether each output map has its own state, for kernels that have a state.
    """
    return KERNELS[type(config)](width, maps, within_block(config, block), own_dynamics)
