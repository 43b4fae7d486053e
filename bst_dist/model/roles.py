"""The role of each parameter, stated by its module. Initial values and optimizer groups follow from it, not from names.

A module's attribute `roles` gives the roles by the names of its own parameters; a parameter not named there is a
VECTOR. When a matrix holds several linear maps, the attribute `stacks` says where each map ends. Both are attributes of
the module and not of the parameter, because copying a model, or moving it off the meta device, makes new parameters.
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
    """A parameter of a state space model's recurrence. Has a separate learning rate and no decay."""
    VECTOR = "vectors"
    """All others: scales, biases, tables, read-outs. No decay."""


@dataclass(frozen=True)
class Stack:
    """The linear maps that one weight holds: a matrix, or a row of matrices (n, rows, columns), cut along `dim`."""

    dim: int = 0
    sizes: tuple[int, ...] = ()
    """Sizes of the maps along `dim`, in order; empty: the weight is not cut."""

    def maps(self, weight: Tensor) -> list[Tensor]:
        """Return a view of each map, (rows, columns)."""
        parts = weight.split(self.sizes, self.dim) if self.sizes else (weight,)
        return [one for part in parts for one in (part.unbind(0) if part.ndim == 3 else (part,))]

    def shapes(self, shape: Sequence[int]) -> list[tuple[int, int]]:
        """Return the shapes of the maps in a weight of this shape."""
        return [tuple(one.shape) for one in self.maps(torch.empty(shape, device="meta"))]


class Linear(nn.Linear):
    """A linear map; `Layer.initialize` draws its weight.

    Args:
        parts: output sizes of the maps, when the weight holds several maps below each other, such as queries, keys and
            values.
        into_stream: whether the output is added to the residual stream. If so, initial weights are smaller in deeper
            models.
        bias: whether there is a bias; only networks that compute a kernel have one.
    """

    def __init__(
        self,
        fan_in: int,
        fan_out: int,
        role: Role = Role.MATRIX,
        into_stream: bool = False,
        bias: bool = False,
        parts: Sequence[int] = (),
    ) -> None:
        super().__init__(fan_in, fan_out, bias=bias)
        self.roles = {"weight": role}
        self.stacks = {"weight": Stack(0, tuple(parts))}
        self.products_only = ("weight",) if role is Role.MATRIX else ()
        self.into_stream = into_stream


def products_only(module: nn.Module) -> list[nn.Parameter]:
    """Return a module's own parameters that are used only in matrix products under autocast, so that they can be given
    in autocast's dtype. Networks that compute a kernel have none: they run in single precision."""
    return [getattr(module, name) for name in getattr(module, "products_only", ())]


def roles_of(module: nn.Module) -> dict[str, Role]:
    """Return the role of each of a module's own parameters, by name."""
    said = getattr(module, "roles", {})
    return {name: said.get(name, Role.VECTOR) for name, _ in module.named_parameters(recurse=False)}


def single_precision(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters, by name, that have to stay in single precision when the others are stored in 16 bits: the
    dynamics, and all parameters of modules with `single_precision`."""
    found: dict[str, nn.Parameter] = {}
    for place, module in model.named_modules():
        whole = getattr(module, "single_precision", False)
        own = module.named_parameters(place, recurse=whole)
        roles = {} if whole else roles_of(module)
        found |= {name: p for name, p in own if whole or roles[name.rpartition(".")[2]] is Role.DYNAMICS}
    return found


def matrices_of(module: nn.Module) -> Iterator[tuple[nn.Parameter, Stack]]:
    """Yield the matrices of a module and its submodules, each with the linear maps it holds."""
    for each in module.modules():
        stacks = getattr(each, "stacks", {})
        for name, role in roles_of(each).items():
            if role is Role.MATRIX:
                yield getattr(each, name), stacks.get(name, Stack())
