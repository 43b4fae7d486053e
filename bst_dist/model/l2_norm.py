"""Queries and keys of length one (Block-Recurrent Transformers, arXiv 2203.07852)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def unit(x: Tensor, scale: Tensor | None = None) -> Tensor:
    """Return (..., H, dh) L2-normalised over dh, times a scale per head (H,)."""
    return _Unit.apply(x, scale).to(x.dtype)


class _Unit(torch.autograd.Function):
    """`unit`, computed and returned in single precision at least; it keeps `x` and a number per vector.

    It divides nowhere: a compiled backward pass computes the factors of a vector again for each of its elements, and a
    division takes as long as ten products. The output is cast outside: with torch 2.11 a cast that changes nothing, as
    the last operation of a forward pass, gives wrong gradients in a compiled graph.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor | None) -> Tensor:
        dtype = torch.promote_types(x.dtype, torch.float32)
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=dtype)
        inverse = norm.square().clamp_min(1e-12).rsqrt()
        ctx.save_for_backward(x, scale, inverse)
        return x * _times(inverse, scale)

    @staticmethod
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor, Tensor | None]:
        x, scale, inverse = ctx.saved_tensors
        along = (d_out * x).sum(-1, keepdim=True) * inverse
        d_x = ((d_out - x * (along * inverse)) * _times(inverse, scale)).to(x.dtype)
        return d_x, None if scale is None else along.squeeze(-1).flatten(0, -2).sum(0).to(scale.dtype)


def _times(inverse: Tensor, scale: Tensor | None) -> Tensor:
    return inverse if scale is None else inverse * scale.unsqueeze(-1)
