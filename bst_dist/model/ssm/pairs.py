"""Complex numbers as pairs of real tensors. The compiler can fuse their operations, and ZeRO can hold them.

With torch's complex dtypes the same scan is some hundreds of separate kernels in a compiled layer.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bst_dist.model.matmul import computed_once


class Pair(NamedTuple):
    """Real and imaginary part, of the same shape."""

    real: Tensor
    imag: Tensor

    def times(self, other: Pair) -> Pair:
        """Return the product, with broadcasting."""
        return Pair(self.real * other.real - self.imag * other.imag, self.real * other.imag + self.imag * other.real)

    def plus(self, other: Pair) -> Pair:
        return Pair(self.real + other.real, self.imag + other.imag)

    def scaled(self, factor: Tensor | float) -> Pair:
        """Multiply by a real factor."""
        return Pair(self.real * factor, self.imag * factor)

    def each(self, function: Callable[[Tensor], Tensor]) -> Pair:
        """Apply a linear map of real numbers, such as a change of shape, to both parts."""
        return Pair(function(self.real), function(self.imag))

    def power(self, exponent: int | Tensor, dtype: torch.dtype) -> Pair:
        """Return ``a ** exponent``, where this pair is ``log a``; computed in double precision, cast to `dtype`.

        The phase reaches 1e5 radians over long sequences, too large for single precision.
        """
        return Pair(*_Exponential.apply(*self.scaled(exponent), dtype))

    def joined(self) -> Tensor:
        """Return one complex tensor, the form in which states pass between calls and ranks."""
        return torch.complex(self.real, self.imag)


class _Exponential(torch.autograd.Function):
    """Exponential of a pair, cast to another dtype.

    Sines and cosines are slow in double precision, so each is computed once, although kernels with many more elements
    read it: the gradient is a product with the result.
    """

    @staticmethod
    def forward(ctx: Any, real: Tensor, imag: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        size = torch.exp(real)
        out = computed_once((size * torch.cos(imag)).to(dtype)), computed_once((size * torch.sin(imag)).to(dtype))
        ctx.dtype = real.dtype
        ctx.save_for_backward(*out)
        return out

    @staticmethod
    def backward(ctx: Any, d_real: Tensor, d_imag: Tensor) -> tuple[Tensor, Tensor, None]:
        real, imag, d_real, d_imag = (x.to(ctx.dtype) for x in (*ctx.saved_tensors, d_real, d_imag))
        return real * d_real + imag * d_imag, real * d_imag - imag * d_real, None


def pair_of(x: Tensor) -> Pair:
    """Return the pair of a complex tensor."""
    return Pair(x.real, x.imag)
