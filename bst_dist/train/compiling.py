"""Whether a run compiles its layers, and why not."""

from __future__ import annotations

from bst_base.settings import ConfigError
from bst_dist.config import Recipe


def compiles(recipe: Recipe, device: str, stage: int) -> tuple[bool, str]:
    """Whether layers are compiled on such a device under this ZeRO stage, and the reason where they are not.

    Raises ConfigError when the recipe asks for what cannot be done.
    """
    if not recipe.compile:
        return False, "no, compile: false"
    if reason := _hindrance(recipe, device, stage):
        raise ConfigError(f"compile: true cannot be done here: {reason}. Leave compile out, or set it to false")
    return True, ""


def _hindrance(recipe: Recipe, device: str, stage: int) -> str:
    """What speaks against compiled layers; empty when nothing does."""
    if device != "cuda":
        return f"layers are compiled for CUDA, and this is {device}"
    if stage == 3:
        return "ZeRO-3 gathers the parameters of each part of a layer, from within it"
    if recipe.parallel.sp > 1:
        return "with parallel.sp > 1 a layer waits for other ranks from within it"
    if recipe.train.carry or recipe.train.slice_tokens:
        return "with train.carry or train.slice_tokens a layer has a past"
    if recipe.activation_checkpointing.policy == "selective":
        return "activation_checkpointing.policy selective keeps single operations of a layer"
    return ""
