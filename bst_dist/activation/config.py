"""The section `activation_checkpointing` of a recipe."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from bst_base.settings import Config


class ActivationCheckpointingConfig(Config):
    policy: Literal["none", "every-layer", "every-kth-layer", "selective", "offload"] = "none"
    """none: keep all activations; every-layer: keep only each layer's input and recompute the layer in the backward
    pass; every-kth-layer: do so for one layer in `every`; selective: recompute each layer except attention and the
    matrix products whose inner dimension is at least their output width; offload: as every-layer, with the inputs in
    host memory."""
    every: int = Field(2, ge=2, le=10_000)
    """For every-kth-layer: recompute one layer in this many, starting with layer 0."""

    def runs_again(self, index: int) -> bool:
        """Whether layer `index`, counted from 0, is recomputed in the backward pass."""
        return self.policy != "none" and (self.policy != "every-kth-layer" or index % self.every == 0)

    @property
    def names_what_is_kept(self) -> bool:
        """Whether every layer keeps only its input and what the policy selects."""
        return self.policy in ("every-layer", "offload", "selective")

    def describe(self) -> str:
        """Return the policy in words, with its number if it has one."""
        return f"one layer in {self.every}" if self.policy == "every-kth-layer" else self.policy
