"""Activation checkpointing: which layers are recomputed, what they keep, and where it is kept."""

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
    """Calls layers with activation checkpointing: ``checkpointing(layer, *args)`` in place of ``layer(*args)``."""

    def __init__(self, config: ActivationCheckpointingConfig, layers: Sequence[Layer]) -> None:
        self.chosen = {layer for index, layer in enumerate(layers) if config.runs_again(index)}
        self.selective = config.policy == "selective"
        self.contexts = selective.contexts if self.selective else noop_context_fn
        self.host = HostCopies() if config.policy == "offload" else None
        """The inputs of layers, offloaded to host memory; None if they stay on the device."""

    def __call__(self, layer: Layer, *args: Any) -> Tensor:
        if layer not in self.chosen:
            return layer(*args)
        if self.selective and layer.is_one_graph(args[1]):  # the graph decides what is kept
            return layer(*args, keeps=selective.keeps)
        if self.host is None or not torch.is_grad_enabled():
            return _run_again(layer, self.contexts, *args)
        with saved_tensors_hooks(self.host.pack, self.host.unpack):  # inputs only: checkpoint sets its own hooks
            return _run_again(layer, self.contexts, *args)


def policy(config: ActivationCheckpointingConfig, layers: Sequence[Layer]) -> Checkpointing | None:
    """Return the checkpointing of a model with these layers; None to keep all activations."""
    return None if config.policy == "none" else Checkpointing(config, layers)


def _run_again(layer: Callable[..., Tensor], contexts: Callable[[], tuple], *args: Any) -> Tensor:
    """Run `layer` and keep only its inputs, and what `contexts` keeps in addition.

    This is torch's non-reentrant form. The reentrant form runs a separate backward pass for each layer, after which
    ZeRO reduces the gradients it has, in many small messages. Two changes make it safe for ZeRO-3, whose hooks gather a
    module's parameters before it runs and release them after, in the forward and the backward pass:

    - By default the recomputation ends, by an exception, as soon as the last needed tensor exists. The modules it is in
      would never release their parameters. So it runs to the end.
    - By default the recomputation starts within the backward pass of the layer's last module, and would release the
      parameters that were just gathered for it. So it starts before the backward pass of any module.

    The states of random generators are not restored, because no layer uses them.
    """
    with set_checkpoint_early_stop(False):
        return checkpoint(
            _set_off_first, layer, *args, use_reentrant=False, preserve_rng_state=False, context_fn=contexts
        )


def _set_off_first(layer: Callable[..., Tensor], *args: Any) -> Tensor:
    return _NeedsSavedTensor.apply(layer(*args))


class _NeedsSavedTensor(torch.autograd.Function):
    """The identity. Its backward pass reads a saved tensor, which starts the recomputation."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x.new_empty(0))
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        _ = ctx.saved_tensors
        return grad
