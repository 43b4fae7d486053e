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


def by_channel(x: Tensor, one: nn.Linear) -> Tensor:
    """The output of a linear map for a state space model, (B, L, D) -> (B, L, Ds). Compiled, a channel's tokens
    lie one after the other in memory, as its products over tokens take them.

    Else each of these products, forward and backward, would copy its input: cuBLAS has none in which neither tokens nor
    chunks are neighbours in memory.
    """
    if not is_compiling():
        return one(x)
    device = x.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
    return torch.mm(one.weight, x.to(dtype).flatten(0, 1).t()).unflatten(1, x.shape[:2]).permute(1, 2, 0)


def beside(x: Tensor, one: nn.Linear, apart: bool, *maps: tuple[nn.Linear, Sequence[int]]) -> tuple[Tensor, ...]:
    """The output of a map to a state space model, then those of other maps of the same input (`together`).

    `apart`: it is made `by_channel`, for an SSM that takes it so, and else in the product of the others.
    """
    if apart:
        return by_channel(x, one), *together(x, *maps)
    *outputs, last = together(x, *maps, whole(one))
    return last, *outputs


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
