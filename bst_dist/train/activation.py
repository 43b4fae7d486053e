"""Activation checkpointing: which layers give up their activations and are run again in the backward pass."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop

from data_pipeline.config import Config

Checkpoint = Callable[..., Any]


class ActivationCheckpointingConfig(Config):
    policy: Literal["none", "every-layer"] = "none"
    """none: keep all activations; every-layer: keep each layer's input and run the layer again in the backward pass."""


def policy(config: ActivationCheckpointingConfig) -> Checkpoint | None:
    """What the model calls its layers through, ``checkpoint(layer, *args)``; None to keep all activations."""
    return None if config.policy == "none" else _run_again


def _run_again(layer: Callable[..., Any], *args: Any) -> Any:
    """Run `layer`, keeping only its inputs.

    The non-reentrant form, which takes any arguments. It would stop the second run as soon as the last needed tensor
    is there, by an exception thrown through the modules: ZeRO-3's hooks after a module, which give its gathered
    parameters back, would not run. The random generators are left alone: no layer draws from them.
    """
    with set_checkpoint_early_stop(False):
        return checkpoint(layer, *args, use_reentrant=False, preserve_rng_state=False)
