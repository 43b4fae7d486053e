"""Activation checkpointing: which layers give up their activations and are run again in the backward pass."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch.utils.checkpoint import checkpoint

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

    In the reentrant form the second run and the backward pass are a graph of their own, and ZeRO-3's hooks gather the
    layer's weights for each. In the other form ZeRO-3 gives the weights back after the second run, and the backward
    pass finds them empty. The random generators are left alone: no layer draws from them.
    """
    if not torch.is_grad_enabled():
        return layer(*args)
    return checkpoint(layer, *args, use_reentrant=True, preserve_rng_state=False)
