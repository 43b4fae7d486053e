"""MFU and HFU of a run.

Model FLOPs utilisation (MFU) is the model's FLOP/s divided by the ranks' peak. Hardware FLOPs utilisation (HFU) also
counts the recomputation of activation checkpointing (Korthikanti et al., arXiv 2205.05198, section 6.3).
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from bst_dist.activation.config import ActivationCheckpointingConfig
from bst_dist.activation.selective import keeps
from bst_dist.model import matmul
from bst_dist.model.attention.flex import uses_flex_tiles
from bst_dist.model.config import ModelConfig
from bst_dist.model.layers import Layer
from bst_dist.parallel.sequence.past import Past
from bst_dist.parallel.sequence.slices import Spacing
from bst_dist.plan.flops import forward_flops, layer_flops, state_attention_flops


@dataclass(frozen=True)
class Utilisation:
    """FLOPs per token and peak FLOP/s, which turn tokens per second into MFU and HFU."""

    flops_per_token: float
    """Model FLOPs of one token, forward and backward."""
    peak_flops: float
    """Peak FLOP/s of all ranks together; NaN if not known."""
    recomputed_flops_per_token: float = 0.0
    """FLOPs of one token that are recomputed in the backward pass, and for the edges of slices."""

    def mfu(self, tokens_per_s: float) -> float:
        """Return the model FLOPs utilisation, 0 to 1; NaN if no peak is known, or if it would exceed 1."""
        return self._share(tokens_per_s * self.flops_per_token)

    def hfu(self, tokens_per_s: float) -> float:
        """Return the hardware FLOPs utilisation (with recomputation), 0 to 1; NaN as in `mfu`."""
        return self._share(tokens_per_s * (self.flops_per_token + self.recomputed_flops_per_token))

    def _share(self, flops_per_s: float) -> float:
        share = flops_per_s / self.peak_flops
        return share if share <= 1 else math.nan  # above 1 the peak is wrong: measured on a busy device


def recomputed_flops_per_token(
    config: ModelConfig, length: int, checkpointing: ActivationCheckpointingConfig, path: str, compiled: bool
) -> float:
    """Return the FLOPs of one token that activation checkpointing recomputes.

    `path`: the path that attention takes (`attention_path`); `compiled`: whether layers are compiled.
    """
    again = [mixer for index, mixer in enumerate(config.mixers()) if checkpointing.runs_again(index)]
    total = 0.0
    for mixer, layers in Counter(again).items():
        of_one = sum(layer_flops(config, mixer, length).values())
        if checkpointing.policy == "selective":
            of_one -= _kept_products(config, mixer, compiled) + _kept_attention(config, mixer, length, path)
        total += layers * of_one
    return total


def edge_flops_per_token(config: ModelConfig, length: int, slices: int, every: int = 1) -> float:
    """Return the FLOPs of one token that training in slices adds: the forward passes that only compute edges."""
    layers = sum(count for term, count in forward_flops(config, length).items() if term != "head")
    return layers * Spacing(slices, every).passes / slices


def _kept_attention(config: ModelConfig, mixer: str, length: int, path: str) -> float:
    """Return the FLOPs of one token in attention that the selective policy keeps: in torch's kernels and FlexAttention.

    Attention in plain operations is recomputed: on devices without a kernel, on CUDA in the windows of sequences that
    are too short for FlexAttention, and to the states of `bst-joint` unless FlexAttention computes it.
    """
    if path == "tiles":
        return 0.0
    terms = layer_flops(config, mixer, length)
    flex = path == "flex" and uses_flex_tiles(length)
    kept = terms.get("attention", 0.0) if flex or path != "flex" else 0.0
    if mixer != "bst-joint" or (flex and config.context.variant != "MF"):
        kept += terms.get("cross", 0.0)
    return kept + (state_attention_flops(config, length) if mixer == "block-recurrent" else 0.0)


def _kept_products(config: ModelConfig, mixer: str, compiled: bool) -> float:
    """Return the FLOPs of one token in the matrix products that the selective policy keeps.

    One block of tokens goes through a layer of tensors without storage. So a product counts as often as it runs, once
    per token or per state, and maps that a compiled layer merges count as one product.
    """
    as_in_training = patch.object(matmul, "is_compiling", lambda: compiled)
    with FakeTensorMode(), torch.no_grad(), as_in_training:
        layer = Layer(mixer, config)
        x = torch.zeros(1, config.block, config.width)
        with _KeptProducts() as counted:
            layer(x, Past())
    return counted.flops / config.block


class _KeptProducts(TorchDispatchMode):
    """Counts the FLOPs of the matrix products that the selective policy keeps."""

    flops = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.mm.default and keeps(func, args):
            self.flops += 2 * args[0].numel() * args[1].shape[1]
        return func(*args, **(kwargs or {}))
