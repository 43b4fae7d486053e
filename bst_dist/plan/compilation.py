"""Whether the layers of a run are compiled: the run and its plan decide it with the same function."""

from __future__ import annotations

from bst_dist.activation.config import ActivationCheckpointingConfig
from bst_dist.config import Recipe
from bst_dist.model.compiled import why_not_compilable


def compile_refusal(
    recipe: Recipe, stage: int, checkpointing: ActivationCheckpointingConfig, sp: int, slices: int
) -> str:
    """Return why a GPU runs the layers uncompiled in this layout; an empty string if it compiles them.

    Args:
        recipe: whether it allows compilation, and whether rows carry a state from step to step. Its own layout is not
            read.
        stage: ZeRO stage.
        checkpointing: activation checkpointing.
        sp: number of ranks that share a sequence.
        slices: slices per sequence. A single slice has no past.
    """
    if recipe.compile is False:
        return "compile: false"
    gathered = stage == 3 and not checkpointing.names_what_is_kept
    return why_not_compilable(gathered, sp, past=recipe.train.carry or slices > 1)
