"""What a run's arithmetic is measured by: the model's own operations, and those done again.

Model FLOPs utilisation (MFU) takes the model's work as the share of the ranks' peak; hardware FLOPs utilisation (HFU)
adds what activation checkpointing computes a second time (Korthikanti et al., arXiv 2205.05198, section 6.3).
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
"""The path of attention whose outputs the selective policy keeps."""


@dataclass(frozen=True)
class Speed:
    """What a step's duration is judged by."""

    flops_per_token: float
    """Of the model: forward and backward pass."""
    peak_flops: float
    """Of all ranks together; nan where no peak is known."""
    recomputed_flops_per_token: float = 0.0
    """Of what is run again in the backward pass, and for the edges of slices."""

    def mfu(self, tokens_per_s: float) -> float:
        """Share of the peak that the model's own work takes, from 0 to 1; nan where no peak is known."""
        return self._share(tokens_per_s * self.flops_per_token)

    def hfu(self, tokens_per_s: float) -> float:
        """Share of the peak that all work takes, recomputation included, from 0 to 1; nan where no peak is known."""
        return self._share(tokens_per_s * (self.flops_per_token + self.recomputed_flops_per_token))

    def _share(self, flops_per_s: float) -> float:
        share = flops_per_s / self.peak_flops
        return share if share <= 1 else math.nan  # nobody is faster than the peak: it was measured on a busy device


def recomputed_flops_per_token(config: ModelConfig, length: int, checkpointing: ActivationCheckpointingConfig,
                               layers: Iterable[nn.Module], path: str) -> float:  # fmt: skip
    """FLOPs of one token that activation checkpointing adds; `layers` of the model, `path` that attention takes."""
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
    """FLOPs of one token that sequences in slices add: the passes that are made for edges."""
    layers = sum(count for term, count in forward_flops(config, length).items() if term != "head")
    return layers * Spacing(slices, every).passes / slices


def _kept(layer: nn.Module) -> float:
    """FLOPs of one token in the matrix products that the selective policy keeps: those at least as deep as wide."""
    products = (module for module in layer.modules() if isinstance(module, nn.Linear))
    return sum(2 * one.in_features * one.out_features for one in products if one.in_features >= one.out_features)
