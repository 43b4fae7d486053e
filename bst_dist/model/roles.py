"""What a parameter is for, said where it is made: initial values and optimizer groups follow from it, not from names.

A module says it in its `roles`, by the names of its own parameters; what is not named there is a VECTOR. Where a matrix
holds several linear maps, its `stacks` say where each ends. Both stand in the module and not on the parameter, because
copying a model, or moving it off the meta device, makes new parameters.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import Enum

import torch
from torch import Tensor, nn


class Role(Enum):
    """How a parameter trains; the value is the name of its kind (`parametrisation.StandardConfig.group`)."""

    MATRIX = "matrices"
    """Sums over a dimension that grows with the width. Has weight decay."""
    FILTER = "filters"
    """A matrix of a network that computes a kernel: its fan-in does not grow with the width."""
    DYNAMICS = "ssm"
    """Of a state space model's recurrence: a learning rate of its own and no decay."""
    VECTOR = "vectors"
    """All the rest: scales, biases, tables, read-outs. No decay."""


@dataclass(frozen=True)
class Stack:
    """The linear maps that one weight holds: a matrix, or a row of matrices (n, rows, columns), cut along `dim`."""

    dim: int = 0
    sizes: tuple[int, ...] = ()
    """Of the maps, in order; empty: it is one map."""

    def maps(self, weight: Tensor) -> list[Tensor]:
        """A view of each, (rows, columns)."""
        parts = weight.split(self.sizes, self.dim) if self.sizes else (weight,)
        return [one for part in parts for one in (part.unbind(0) if part.ndim == 3 else (part,))]

    def shapes(self, shape: Sequence[int]) -> list[tuple[int, int]]:
        """Of the maps in a weight of this shape."""
        return [tuple(one.shape) for one in self.maps(torch.empty(shape, device="meta"))]


class Linear(nn.Linear):
    """A linear map; `Layer.initialize` draws its weight.

    Args:
        parts: outputs of the maps that the weight holds one below the other, where they are several, as queries, keys
            and values.
        into_stream: its output is added to the residual stream, so it begins smaller in deeper models.
        bias: none in the layers of the stack.
    """

    def __init__(self, fan_in: int, fan_out: int, role: Role = Role.MATRIX, into_stream: bool = False,
                 bias: bool = False, parts: Sequence[int] = ()) -> None:  # fmt: skip
        super().__init__(fan_in, fan_out, bias=bias)
        self.roles, self.stacks = {"weight": role}, {"weight": Stack(0, tuple(parts))}
        self.products_only = ("weight",) if role is Role.MATRIX else ()
        self.into_stream = into_stream


def products_only(module: nn.Module) -> list[nn.Parameter]:
    """A module's own parameters that enter matrix products under autocast and nothing else, so that they may as well
    come in autocast's type; those of networks that compute a kernel are used in single precision."""
    return [getattr(module, name) for name in getattr(module, "products_only", ())]


def roles_of(module: nn.Module) -> dict[str, Role]:
    """The role of each parameter that a module holds itself, by name."""
    said = getattr(module, "roles", {})
    return {name: said.get(name, Role.VECTOR) for name, _ in module.named_parameters(recurse=False)}


def matrices_of(module: nn.Module) -> Iterator[tuple[nn.Parameter, Stack]]:
    """The matrices in a module and those below it, with the maps that each holds."""
    for each in module.modules():
        stacks = getattr(each, "stacks", {})
        for name, role in roles_of(each).items():
            if role is Role.MATRIX:
                yield getattr(each, name), stacks.get(name, Stack())
