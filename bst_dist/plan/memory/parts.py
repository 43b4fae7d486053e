"""What is counted of one part of the model, a layer or what stands around the layers, and in which slice."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Part:
    """Bytes of one part of the model, a layer or what stands around the layers, for one micro-batch; and operations."""

    kept: int
    """Between the passes, its input included and its output not."""
    casts: int
    """Copies of weights in the autocast's type beyond those, kept to the end of the forward pass."""
    forward: int
    """Most at once in the forward pass, of this part alone, its input and output included."""
    backward: int
    """Most at once in the backward pass, beyond `kept`; gradients of parameters leave as soon as they are whole, all
    but `gradients`."""
    host: int = 0
    """Of `kept`, in the host's memory."""
    gradients: int = 0
    """Of `backward`, gradients of parameters that are all there at its end: of a compiled layer its own, else none."""
    launches: int = 0
    """Operations of both passes that compute something; not bytes."""
    moved: int = 0
    """Read and written by operations of both passes, one by one: of what stands around the layers, else 0."""

    def __add__(self, other: Part) -> Part:
        return self._with(other, lambda a, b: a + b)

    def scaled(self, factor: int) -> Part:
        """Every figure times `factor`."""
        return self._with(self, lambda a, _: factor * a)

    def _with(self, other: Part, combine: Callable[[int, int], int]) -> Part:
        return Part(**{name: combine(value, getattr(other, name)) for name, value in vars(self).items()})


@dataclass(frozen=True)
class Slice:
    """What one rank computes at once."""

    rows: int
    length: int
    """Tokens of a rank's share: of the sequence, or of one of its slices."""
    sp: int = 1
    stream: bool = False
    """Whether something comes before it in an earlier call: the sequence is trained in slices."""
