"""Matrix products of a compiled layer that read and write less memory than separate linear maps.

On a GPU a layer is bound by memory as much as by its products, and torch's compiler does not change products. So a
compiled layer computes its maps of one input as one product, and applies ReLU within the product before it. Elsewhere
each map is called as a module: ZeRO-3 then gathers its parameters, probes hook it, and a CPU would gain nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling
from torch.nn import functional as F

from bst_dist.model.roles import Linear


def product_dtype(x: Tensor) -> torch.dtype:
    """Return the dtype in which a linear layer computes here: autocast's if it is on, else that of `x`."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


def fused_linears(x: Tensor, *maps: tuple[nn.Linear, Sequence[int]]) -> tuple[Tensor, ...]:
    """Return the outputs of linear maps without bias, cut into parts of `rows`: (..., D) -> (..., rows) for each part.

    In one product, both passes read `x` once and not once per map. The gradient of `x` is not a sum of parts: in
    bfloat16 it is rounded once, whereas each part and each sum would be rounded.
    All parts are cut at once, because the gradient of a cut within a cut would be written twice.
    """
    if len(maps) == 1 or not is_compiling():
        return tuple(part for one, rows in maps for part in one(x).split(rows, dim=-1))
    product = F.linear(x, torch.cat([one.weight for one, _ in maps]))
    return product.split([n for _, rows in maps for n in rows], dim=-1)


def whole(one: nn.Linear) -> tuple[nn.Linear, list[int]]:
    """Return the argument of `fused_linears` for a map whose output is one part."""
    return one, [one.out_features]


def contiguous_operand(x: Tensor) -> Tensor:
    """Return `x`, the operand of several products; a compiled layer writes it contiguously in memory.

    Otherwise each of these products, forward and backward, would copy it: cuBLAS accepts no matrix in which neither
    rows nor columns are contiguous. Casts before it are part of the one copy.
    """
    return _ContiguousOperand.apply(x) if is_compiling() else x


def computed_once(x: Tensor) -> Tensor:
    """Return `x`, made within an autograd function; a compiled layer writes it to memory and keeps it.

    Otherwise each kernel that reads `x` would compute it again, and so would the backward pass. The compiler recomputes
    casts, sums and elementwise operations, but never a flip, not even one that moves nothing.
    """
    return _written_contiguously(x.flip(())) if is_compiling() else x


class _ContiguousOperand(torch.autograd.Function):
    """The identity; the output is contiguous in memory."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return _written_contiguously(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient


def contiguous_gradient(x: Tensor) -> Tensor:
    """Return `x`, the output of products; a compiled layer makes its gradient contiguous (`contiguous_operand`)."""
    return _ContiguousGradient.apply(x) if is_compiling() else x


class _ContiguousGradient(torch.autograd.Function):
    """The identity; the gradient is contiguous in memory."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return _written_contiguously(gradient)


def _written_contiguously(x: Tensor) -> Tensor:
    """Return a contiguous `x` read by strides; otherwise the compiler chooses the layout by how `x` is read later."""
    x = x.contiguous()
    return x.as_strided(x.shape, x.stride())


def cast_by_channel(y: Tensor, dtype: torch.dtype) -> Tensor:
    """Cast the outputs of a state space model, (B, L, C, Ds), and keep their order in memory.

    The compiler writes a result in the order of its dimensions. So the cast runs with the dimensions in memory order;
    the gradients, which are cast back, then have the same order.
    """
    return y.permute(3, 0, 1, 2).to(dtype).permute(1, 2, 3, 0)


def relu_of(x: Tensor, into: Linear) -> Tensor:
    """Return max(W x, 0) elementwise, (..., D) -> (..., rows of W).

    cuBLAS applies ReLU before it writes the product. A kernel of the compiler would read and write the product again.
    """
    if not is_compiling():
        return torch.relu(into(x))
    device = x.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
    return _ReluOfProduct.apply(x.flatten(0, -2).to(dtype), into.weight.to(dtype)).unflatten(0, x.shape[:-1])


class _ReluOfProduct(torch.autograd.Function):
    """relu(x w') of (n, D) and (rows, D). torch's operator has no derivative, so it is defined here."""

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
