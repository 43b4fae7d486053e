"""What a parameter is for, said where it is made: initial values and optimizer groups follow from it, not from names.

A module says it in its `roles`, by the names of its own parameters; what is not named there is a VECTOR. Roles stand in
the module and not on the parameter, because copying a model, or moving it off the meta device, makes new parameters.
"""

from __future__ import annotations

from enum import Enum

from torch import nn


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


class Linear(nn.Linear):
    """A linear map; `Layer.initialize` draws its weight.

    Args:
        into_stream: its output is added to the residual stream, so it begins smaller in deeper models.
        bias: none in the layers of the stack.
    """

    def __init__(self, fan_in: int, fan_out: int, role: Role = Role.MATRIX, into_stream: bool = False,
                 bias: bool = False) -> None:  # fmt: skip
        super().__init__(fan_in, fan_out, bias=bias)
        self.roles = {"weight": role}
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
