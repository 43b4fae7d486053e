"""The section `activation_checkpointing` of a recipe."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from bst_base.settings import Config


class ActivationCheckpointingConfig(Config):
    policy: Literal["none", "every-layer", "every-kth-layer", "selective", "offload"] = "none"
    """none: keep all activations; every-layer: keep each layer's input and run the layer again in the backward pass;
    every-kth-layer: do so with one layer in `every`; selective: run each layer again but for attention and the
    matrix products at least as deep as wide, which are kept; offload: every-layer, the inputs in the host's memory."""
    every: int = Field(2, ge=2, le=10_000)
    """every-kth-layer: one layer in this many is run again, the first being layer 0."""

    def runs_again(self, index: int) -> bool:
        """Whether layer `index`, counted from 0, is run again in the backward pass."""
        return self.policy != "none" and (self.policy != "every-kth-layer" or index % self.every == 0)

    @property
    def names_what_is_kept(self) -> bool:
        """Whether every layer keeps its input and what the policy names, and nothing else."""
        return self.policy in ("every-layer", "offload", "selective")

    def describe(self) -> str:
        """The policy in words, with its number where it has one."""
        return f"one layer in {self.every}" if self.policy == "every-kth-layer" else self.policy
