"""How initial values, learning rates and multipliers depend on width and depth: the standard way, or CompleteP.

Under CompleteP (Dey et al. 2025, arXiv 2505.01618, table 1 with α = 1; in width it is μP, Yang et al., arXiv
2203.03466) a few steps change every activation by an amount that depends neither on the width nor on the depth, so a
learning rate found on a small model holds for a large one. With m_width = width / base_width and m_depth = depth /
base_depth, and standard deviations for the initial values:

|                                             | standard         | CompleteP                                 |
| ------------------------------------------- | ---------------- | ----------------------------------------- |
| residual branch with output f(x)            | x + f(x)         | x + f(x) / m_depth                        |
| initial matrices                            | 1 / √fan-in      | 1 / √fan-in                               |
| those that write to the stream, in addition | / √(2 depth)     | / √(2 base_depth)                         |
| logits                                      | h·w / √width     | h·w / (√base_width m_width)               |
| matrices: rate, decay, eps                  | η, λ, ε          | η/m_width, λ m_width, ε/(m_width m_depth) |
| filters, matrices with a fixed fan-in       | η, λ, ε          | η, λ, ε/(m_width m_depth)                 |
| vectors and SSM dynamics inside the layers  | η or η_ssm, 0, ε | η or η_ssm, 0, ε/(m_width m_depth)        |
| the embedding, the head and the last norm   | η, 0, ε          | η, 0, ε/m_width                           |

At the base shape both give the same model, to the last bit. A state space model works on each channel separately: its
dynamics, read-outs and skips are not summed over the width, so they count as vectors. The matrices of a filter network
have a fixed fan-in. Heads must keep their width: a wider model has more heads.
"""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal, NamedTuple, TypeAlias

from pydantic import Discriminator, Field, Tag

from bst_base.settings import Config


class Scale(NamedTuple):
    """Multipliers of the hyperparameters of a parameter group."""

    rate: float = 1.0
    decay: float = 1.0
    eps: float = 1.0


class StandardConfig(Config):
    """The usual parametrisation."""

    kind: Literal["standard"] = "standard"
    """One learning rate for all shapes. The best value falls as width and depth grow."""

    def branch(self, depth: int) -> float:
        """Return the multiplier of a residual branch's output."""
        return 1.0

    def initial_depth(self, depth: int) -> int:
        """Return the depth that reduces the initial values of maps into the residual stream."""
        return depth

    def logit_scale(self, width: int) -> float:
        """Return the multiplier of the product of last activation and embedding."""
        return 1 / math.sqrt(width)

    def group(self, kind: str) -> str:
        """Return the group of a kind of parameters. Filters train like matrices, the embedding like vectors."""
        return {"filters": "matrices", "embedding": "vectors"}.get(kind, kind)

    def scales(self, width: int, depth: int) -> dict[str, Scale]:
        """Return the multipliers of the groups that differ from the recipe's optimizer section."""
        return {}


class CompletePConfig(Config):
    """CompleteP: hyperparameters tuned at the base shape hold at every width and depth."""

    kind: Literal["completep"]
    """The learning rate is given for the base shape and holds for every width and depth."""
    base_width: int = Field(ge=1, le=2**20)
    """Width at which the learning rates, the weight decay and eps apply as given."""
    base_depth: int = Field(ge=1, le=10_000)
    """Number of layers at which they apply as given."""

    def branch(self, depth: int) -> float:
        return self.base_depth / depth

    def initial_depth(self, depth: int) -> int:
        return self.base_depth

    def logit_scale(self, width: int) -> float:
        return 1 / math.sqrt(self.base_width) / (width / self.base_width)

    def group(self, kind: str) -> str:
        return kind

    def scales(self, width: int, depth: int) -> dict[str, Scale]:
        wide, deep = width / self.base_width, depth / self.base_depth
        inside = Scale(eps=1 / (wide * deep))
        return {
            "matrices": Scale(1 / wide, wide, 1 / (wide * deep)),
            "filters": inside,
            "vectors": inside,
            "ssm": inside,
            "embedding": Scale(eps=1 / wide),
        }


def _kind(section: Any) -> str:
    return section.get("kind", "standard") if isinstance(section, dict) else getattr(section, "kind", "standard")


ParametrisationConfig: TypeAlias = Annotated[
    Annotated[StandardConfig, Tag("standard")] | Annotated[CompletePConfig, Tag("completep")],
    Discriminator(_kind),
]
"""The settings of one parametrisation, selected by the field `kind`."""
