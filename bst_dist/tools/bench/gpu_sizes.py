"""The sizes of models and batches that `bst bench gpu` measures."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bst_dist.model.config import ModelConfig

LAYERS: dict[str, dict[str, Any]] = {
    "sliding": {"mixer": "sliding"},
    "BST SH": {"mixer": "bst", "context": {"variant": "SH"}},
    "BST MF": {"mixer": "bst", "context": {"variant": "MF"}},
    "Block-Recurrent": {"mixer": "block-recurrent"},
    "BST MH": {"mixer": "bst", "context": {"variant": "MH"}},
    "Transformer-XL": {"mixer": "transformer-xl"},
    "full": {"mixer": "full"},
    "GSS": {"mixer": "gss", "ssm": {"state": 512, "chunk": 128}},
}
"""Settings of each kind of layer, in the order in which they are compiled while there is time."""

BST = {"mixer": "bst", "context": {"variant": "SH"}}

QUEUED = 3
"""Passes that are timed together, as in a step of three micro-batches: only the first finds the device idle."""


@dataclass(frozen=True)
class Sizes:
    """Sizes of a model and its batch. The defaults are those of the project's performance goals."""

    width: int = 1024
    heads: int = 8
    block: int = 512
    length: int = 4096
    rows: int = 8
    depth: int = 12
    vocabulary: int = 32_000
    rounds: int = 10

    def config(self, **settings: Any) -> ModelConfig:
        """Return the model settings, with RoPE in every layer.

        Block-Recurrent has as many states as a block has tokens; Transformer-XL has a window of four blocks.
        """
        sizes = {"width": self.width, "heads": self.heads, "ffn": 4 * self.width, "block": self.block}
        own = {
            "attention": {"position": "rope"},
            "block_recurrent": {"states": self.block},
            "transformer_xl": {"window": 4 * self.block},
        }
        return ModelConfig(**sizes, **own | {"depth": self.depth} | settings, vocab_size=self.vocabulary)

    def tokens(self, device: torch.device) -> Tensor:
        """Return random tokens, with one more per row than the model reads."""
        return torch.randint(self.vocabulary, (self.rows, self.length + 1), device=device)


SMALL = Sizes(width=32, heads=2, block=16, length=64, rows=1, depth=2, vocabulary=64, rounds=1)


def sizes_of(small: bool) -> Sizes:
    """Return the sizes of a rehearsal, or the default ones."""
    return SMALL if small else Sizes()


def stack_sizes(width: int) -> Sizes:
    """Return the sizes of whole models: the residual stream of one pass has 2^25 numbers."""
    return Sizes(width=width, heads=width // 128, rows=8 * 1024 // width)
