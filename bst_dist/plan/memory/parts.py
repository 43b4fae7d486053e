"""Figures of one part of the model (a layer, or head and loss), and the slice that they are for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Part:
    """Bytes and operations of one part of the model (a layer, or head and loss), for one micro-batch."""

    kept: int
    """Bytes kept between the passes, with its input and without its output."""
    casts: int
    """Bytes of weights cast by autocast, besides `kept`; they live to the end of the forward pass."""
    forward: int
    """Peak in the forward pass of this part alone, with its input and output."""
    backward: int
    """Peak in the backward pass, beyond `kept`. Gradients of parameters, except `gradients`, are released as soon as
    they are complete."""
    host: int = 0
    """Part of `kept` that is in host memory."""
    gradients: int = 0
    """Part of `backward`: gradients of parameters that all exist at its end. A compiled layer's own, else 0."""
    launches: int = 0
    """Number of operations of both passes that launch a kernel; not bytes."""
    moved: int = 0
    """Bytes read and written by the operations of both passes: of head and loss; 0 for a layer."""

    def __add__(self, other: Part) -> Part:
        return self._with(other, lambda a, b: a + b)

    def scaled(self, factor: int) -> Part:
        """Return a copy with every figure multiplied by `factor`."""
        return self._with(self, lambda a, _: factor * a)

    def _with(self, other: Part, combine: Callable[[int, int], int]) -> Part:
        return Part(**{name: combine(value, getattr(other, name)) for name, value in vars(self).items()})


@dataclass(frozen=True)
class Slice:
    """Shape of what one rank computes in one forward call."""

    rows: int
    length: int
    """Tokens of a rank's part of the sequence, or of one of its slices."""
    sp: int = 1
    stream: bool = False
    """Whether it continues an earlier call, because the sequence is trained in slices."""
