"""The kernels a layer's state space model can have, behind one interface.

A kernel is built by `build_kernel` for Ds channels and C output maps, and offers

- ``forward(z, past, starts)``: outputs of every token, (B, l, Ds) -> (B, l, C, Ds);
- ``block_ends(z, block, past, starts)``: outputs of each block's last token only, (B, l, Ds) -> (B, nb, C, Ds);
- ``kernel(length)``: the convolution without its skip term, (C, Ds, length): what the tests compare with;
- ``dynamics()``: the parameters that train at a rate of their own and without decay.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal, TypeAlias

import torch
from pydantic import Discriminator, Tag
from torch import Tensor, nn

from bst_base.settings import Config
from bst_dist.model.ssm.dplr import S4DPLR, DPLRConfig
from bst_dist.model.ssm.s4d import S4D, SSMConfig
from bst_dist.model.ssm.unstructured import ExplicitConfig, ExplicitFilter, HyenaConfig, HyenaFilter
from bst_dist.parallel.past import Past


class NoConvolutionConfig(Config):
    """The ablation without an SSM."""

    chunk: ClassVar[int] = 1  # any number of tokens can be computed at once
    kernel: Literal["none"]
    """No convolution: a token's output is its own input, scaled for each map."""


class NoConvolution(nn.Module):
    """Only the skip term, y_c = d_c ⊙ z: what is left of a layer when its SSM is taken out."""

    def __init__(self, width: int, maps: int, config: NoConvolutionConfig, own_dynamics: bool = False):
        super().__init__()
        self.skip = nn.Parameter(torch.randn(maps, width))

    def dynamics(self) -> list[nn.Parameter]:
        return []

    def kernel(self, length: int) -> Tensor:
        return self.skip.new_zeros(*self.skip.shape, length)

    def forward(self, z: Tensor, past: Past, starts: Tensor | None = None) -> Tensor:
        return self.skip * z.to(self.skip.dtype).unsqueeze(2)

    def block_ends(self, z: Tensor, block: int, past: Past, starts: Tensor | None = None) -> Tensor:
        ends = z[:, min(block, z.shape[1]) - 1 :: block]
        return self(ends[:, : (past.position % block + z.shape[1]) // block], past)


def _kernel_name(section: Any) -> str:
    return section.get("kernel", "s4d") if isinstance(section, dict) else getattr(section, "kernel", "s4d")


KernelConfig: TypeAlias = Annotated[
    Annotated[SSMConfig, Tag("s4d")]
    | Annotated[DPLRConfig, Tag("s4-dplr")]
    | Annotated[ExplicitConfig, Tag("explicit")]
    | Annotated[HyenaConfig, Tag("hyena")]
    | Annotated[NoConvolutionConfig, Tag("none")],
    Discriminator(_kernel_name),
]
"""The section of one kernel, told by its `kernel`; a field of another kernel is an error."""


KERNELS: dict[type[Config], type[nn.Module]] = {
    SSMConfig: S4D,
    DPLRConfig: S4DPLR,
    ExplicitConfig: ExplicitFilter,
    HyenaConfig: HyenaFilter,
    NoConvolutionConfig: NoConvolution,
}


def build_kernel(width: int, maps: int, config: KernelConfig, block: int, own_dynamics: bool = False) -> nn.Module:
    """The kernel that `config` asks for.

    Args:
        block: W; chunks are no longer than it, so that a block's end and a document's start lie between chunks.
        own_dynamics: gives each output map a state of its own, if there is any.
    """
    if config.chunk > block:
        config = config.model_copy(update={"chunk": block})
    return KERNELS[type(config)](width, maps, config, own_dynamics)
