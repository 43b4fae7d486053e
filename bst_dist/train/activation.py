"""Activation checkpointing: which layers give up their activations and are run again in the backward pass."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop

from data_pipeline.config import Config

Checkpoint = Callable[..., Any]


class ActivationCheckpointingConfig(Config):
    policy: Literal["none", "every-layer"] = "none"
    """none: keep all activations; every-layer: keep each layer's input and run the layer again in the backward pass."""


def policy(config: ActivationCheckpointingConfig) -> Checkpoint | None:
    """What the model calls its layers through, ``checkpoint(layer, *args)``; None to keep all activations."""
    return None if config.policy == "none" else _run_again


def _run_again(layer: Callable[..., Tensor], *args: Any) -> Tensor:
    """Run `layer`, keeping only its inputs.

    This is torch's non-reentrant form: the reentrant one makes a backward pass of its own out of each layer, after
    each of which ZeRO reduces what gradients it has, in many small messages. It is made safe for ZeRO-3, whose hooks
    gather a module's parameters before it runs and give them back after, in the forward and in the backward pass:

    - by default the second run ends, by an exception, as soon as the last needed tensor is there; the modules it
      passes through would never give their parameters back. So it runs to its end.
    - the second run would be set off from within the backward pass of the layer's last module, and give back the
      parameters that were just gathered for that. So it is set off before any module's backward pass begins.

    The random generators are left alone: no layer draws from them.
    """
    with set_checkpoint_early_stop(False):
        return checkpoint(_set_off_first, layer, *args, use_reentrant=False, preserve_rng_state=False)


def _set_off_first(layer: Callable[..., Tensor], *args: Any) -> Tensor:
    return _NeedsSavedTensor.apply(layer(*args))


class _NeedsSavedTensor(torch.autograd.Function):
    """The identity, whose backward pass asks for a saved tensor and so brings about the second run."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x.new_empty(0))
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        _ = ctx.saved_tensors
        return grad
