"""MFU and HFU of a run.

Model FLOPs utilisation (MFU) is the model's FLOP/s divided by the ranks' peak. Hardware FLOPs utilisation (HFU) also
counts the recomputation of activation checkpointing (Korthikanti et al., arXiv 2205.05198, section 6.3).
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from torch import nn

from bst_dist.activation.config import ActivationCheckpointingConfig
from bst_dist.model.config import ModelConfig
from bst_dist.parallel.sequence.slices import Spacing
from bst_dist.plan.flops import forward_flops, layer_flops

FUSED = "fused-tiles"
"""The attention path whose outputs the selective policy keeps."""


@dataclass(frozen=True)
class Speed:
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


def recomputed_flops_per_token(config: ModelConfig, length: int, checkpointing: ActivationCheckpointingConfig,
                               layers: Iterable[nn.Module], path: str) -> float:  # fmt: skip
    """Return the FLOPs of one token that activation checkpointing recomputes.

    `layers`: the model's layers; `path`: the path that attention takes.
    """
    total = 0.0
    for index, (mixer, layer) in enumerate(zip(config.mixers(), layers, strict=True)):
        if not checkpointing.runs_again(index):
            continue
        terms = layer_flops(config, mixer, length)
        total += sum(terms.values())
        if checkpointing.policy == "selective":
            total -= _kept(layer) + (terms.get("attention", 0) + terms.get("cross", 0) if path == FUSED else 0)
    return total


def edge_flops_per_token(config: ModelConfig, length: int, slices: int, every: int = 1) -> float:
    """Return the FLOPs of one token that training in slices adds: the forward passes that only compute edges."""
    layers = sum(count for term, count in forward_flops(config, length).items() if term != "head")
    return layers * Spacing(slices, every).passes / slices


def _kept(layer: nn.Module) -> float:
    """Return the FLOPs of one token in the products that the selective policy keeps: in_features >= out_features."""
    products = (module for module in layer.modules() if isinstance(module, nn.Linear))
    return sum(2 * one.in_features * one.out_features for one in products if one.in_features >= one.out_features)
