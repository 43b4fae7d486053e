"""The section `parallel` of a recipe."""

from __future__ import annotations

from pydantic import Field

from bst_base.errors import UserError
from bst_base.settings import Config


class ParallelConfig(Config):
    """How a global batch is spread over the ranks. The ranks form groups of sp; the groups are data-parallel."""

    sp: int = Field(1, ge=1, le=2**20)
    """Sequence-parallel ranks: they share one sequence, each with a slice of L / sp tokens."""


class MeshError(UserError):
    """The recipe cannot be spread over this number of ranks."""


def data_parallel(world: int, sp: int) -> int:
    """Return the data-parallel degree of `world` ranks with `sp` ranks per sequence. Raise MeshError if sp does not
    divide them."""
    if world % sp:
        raise MeshError(f"parallel.sp: {sp} does not divide the {world} ranks")
    return world // sp
