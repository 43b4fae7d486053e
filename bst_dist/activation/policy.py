"""Activation checkpointing: which layers give up their activations, what of them is kept, and where it is kept."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint, noop_context_fn, set_checkpoint_early_stop

from bst_dist.activation import selective
from bst_dist.activation.config import ActivationCheckpointingConfig
from bst_dist.activation.offload import HostCopies
from bst_dist.model.layers import Layer


class Checkpointing:
    """What the model calls its layers through: ``checkpointing(layer, *args)`` for ``layer(*args)``."""

    def __init__(self, config: ActivationCheckpointingConfig, layers: Sequence[Layer]) -> None:
        self.chosen = {layer for index, layer in enumerate(layers) if config.runs_again(index)}
        self.selective = config.policy == "selective"
        self.contexts = selective.contexts if self.selective else noop_context_fn
        self.host = HostCopies() if config.policy == "offload" else None
        """The inputs kept in the host's memory; None when they stay where they are."""

    def __call__(self, layer: Layer, *args: Any) -> Tensor:
        if layer not in self.chosen:
            return layer(*args)
        if self.selective and layer.is_one_graph(args[1]):  # what is kept is decided within the graph
            return layer(*args, keeps=selective.keeps)
        if self.host is None or not torch.is_grad_enabled():
            return _run_again(layer, self.contexts, *args)
        with saved_tensors_hooks(self.host.pack, self.host.unpack):  # they see the inputs alone: inside, others apply
            return _run_again(layer, self.contexts, *args)


def policy(config: ActivationCheckpointingConfig, layers: Sequence[Layer]) -> Checkpointing | None:
    """What a model with these layers calls them through; None to keep all activations."""
    return None if config.policy == "none" else Checkpointing(config, layers)


def _run_again(layer: Callable[..., Tensor], contexts: Callable[[], tuple], *args: Any) -> Tensor:
    """Run `layer`, keeping only its inputs, and what `contexts` keeps beside them.

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
        return checkpoint(
            _set_off_first, layer, *args, use_reentrant=False, preserve_rng_state=False, context_fn=contexts
        )


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
