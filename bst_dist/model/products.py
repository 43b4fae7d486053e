"""Matrix products of a compiled layer that read and write less than the maps one by one.

On a GPU a layer is bound by the memory as much as by its products, and torch's compiler does not change products. So a
compiled layer has its maps of one input as one product, and ReLU in the product before it. Elsewhere each map is called
by itself: ZeRO-3 gathers its parameters then, probes look at it, and a CPU gains nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling
from torch.nn import functional as F

from bst_dist.model.roles import Linear


def together(x: Tensor, *maps: tuple[nn.Linear, Sequence[int]]) -> tuple[Tensor, ...]:
    """The outputs of linear maps without bias, each in parts of so many rows: (..., D) -> (..., rows) for each part.

    As one product `x` is read once instead of once a map, in both passes, and its gradient is not summed up from parts:
    in bfloat16 it is rounded once, where the parts and their sums are each.
    All parts are cut at once: the gradient of a cut within a cut would be written twice.
    """
    if len(maps) == 1 or not is_compiling():
        return tuple(part for one, rows in maps for part in one(x).split(rows, dim=-1))
    product = F.linear(x, torch.cat([one.weight for one, _ in maps]))
    return product.split([n for _, rows in maps for n in rows], dim=-1)


def whole(one: nn.Linear) -> tuple[nn.Linear, list[int]]:
    """A map whose output is one part."""
    return one, [one.out_features]


def in_order(x: Tensor) -> Tensor:
    """The operand of several products, compiled with its dimensions in their order in memory.

    Else each of these products, forward and backward, would copy it: cuBLAS has none in which neither rows nor columns
    are neighbours in memory. Casts before it are in the one copy.
    """
    return _InOrder.apply(x) if is_compiling() else x


class _InOrder(torch.autograd.Function):
    """The identity."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return _written_in_order(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient


def gradient_in_order(x: Tensor) -> Tensor:
    """The output of products, whose gradient, compiled, has its dimensions in their order in memory (`in_order`)."""
    return _GradientInOrder.apply(x) if is_compiling() else x


class _GradientInOrder(torch.autograd.Function):
    """The identity."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return _written_in_order(gradient)


def _written_in_order(x: Tensor) -> Tensor:
    """What is read by strides the compiler writes as it is asked to, and all else as it reads it."""
    x = x.contiguous()
    return x.as_strided(x.shape, x.stride())


def cast_by_channel(y: Tensor, dtype: torch.dtype) -> Tensor:
    """The outputs of a state space model, (B, L, C, Ds), in another type and in the order in which they lie in memory.

    The compiler gives what it computes the order of its dimensions, so they are the memory's while it casts; gradients,
    which are cast back, then have that order as well.
    """
    return y.permute(3, 0, 1, 2).to(dtype).permute(1, 2, 3, 0)


def relu_of(x: Tensor, into: Linear) -> Tensor:
    """max(W x, 0) elementwise, (..., D) -> (..., rows of W).

    cuBLAS applies ReLU before it writes the product, where the compiler's kernel would read and write it once more.
    """
    if not is_compiling():
        return torch.relu(into(x))
    device = x.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
    return _ReluOfProduct.apply(x.flatten(0, -2).to(dtype), into.weight.to(dtype)).unflatten(0, x.shape[:-1])


class _ReluOfProduct(torch.autograd.Function):
    """relu(x w') of (n, D) and (rows, D); torch has this operator without a derivative."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        out = torch._addmm_activation(x.new_zeros(len(weight)), x, weight.t())
        ctx.save_for_backward(x, weight, out)
        return out

    @staticmethod
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor, Tensor]:
        x, weight, out = ctx.saved_tensors
        d_out = torch.where(out > 0, d_out, 0)
        return d_out @ weight, d_out.t() @ x
