"""The section `parallel` of a recipe."""

from __future__ import annotations

from pydantic import Field

from bst_base.errors import UserError
from bst_base.settings import Config


class ParallelConfig(Config):
    """How a global batch is spread over the ranks; what sp leaves is data-parallel."""

    sp: int = Field(1, ge=1, le=2**20)
    """Sequence-parallel ranks: they share one sequence, each with a slice of L / sp tokens."""


class MeshError(UserError):
    """A world that the recipe cannot be spread over."""


def data_parallel(world: int, sp: int) -> int:
    """The data-parallel degree of `world` ranks, `sp` to a sequence; raises MeshError when sp does not divide them."""
    if world % sp:
        raise MeshError(f"parallel.sp: {sp} does not divide the {world} ranks")
    return world // sp
