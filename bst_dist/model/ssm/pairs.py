"""Complex numbers as pairs of real tensors: what a compiler makes kernels for, and what ZeRO can hold.

In torch's complex types the same scan is some hundreds of separate kernels in a compiled layer.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor


class Pair(NamedTuple):
    """Real and imaginary part, of one shape."""

    real: Tensor
    imag: Tensor

    def times(self, other: Pair) -> Pair:
        """The product, with broadcasting."""
        return Pair(self.real * other.real - self.imag * other.imag, self.real * other.imag + self.imag * other.real)

    def plus(self, other: Pair) -> Pair:
        return Pair(self.real + other.real, self.imag + other.imag)

    def scaled(self, factor: Tensor | float) -> Pair:
        """Times something real."""
        return Pair(self.real * factor, self.imag * factor)

    def each(self, function: Callable[[Tensor], Tensor]) -> Pair:
        """A linear map of real numbers, such as a change of shape, on both parts."""
        return Pair(function(self.real), function(self.imag))

    def power(self, exponent: int | Tensor, dtype: torch.dtype) -> Pair:
        """``a ** exponent`` where this pair is ``log a``, in double precision, cast to `dtype`.

        The phase reaches 1e5 radians over long sequences, where single precision has lost it.
        """
        size, phase = torch.exp(self.real * exponent), self.imag * exponent
        return Pair((size * torch.cos(phase)).to(dtype), (size * torch.sin(phase)).to(dtype))

    def joined(self) -> Tensor:
        """As one complex tensor, which is how states travel between calls and ranks."""
        return torch.complex(self.real, self.imag)


def pair_of(x: Tensor) -> Pair:
    """Of a complex tensor."""
    return Pair(x.real, x.imag)
