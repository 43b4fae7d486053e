"""Complex numbers as pairs of real tensors. The compiler can fuse their operations, and ZeRO can hold them.

With torch's complex dtypes the same scan is some hundreds of separate kernels in a compiled layer.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor


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
        size, phase = torch.exp(self.real * exponent), self.imag * exponent
        return Pair((size * torch.cos(phase)).to(dtype), (size * torch.sin(phase)).to(dtype))

    def joined(self) -> Tensor:
        """Return one complex tensor, the form in which states pass between calls and ranks."""
        return torch.complex(self.real, self.imag)


def pair_of(x: Tensor) -> Pair:
    """Return the pair of a complex tensor."""
    return Pair(x.real, x.imag)
