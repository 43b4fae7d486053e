"""The model and the layer for your own training loop: built from plain arguments, used like any torch module."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from bst_dist.model.config import LayerConfig, ModelConfig
from bst_dist.model.document_mask import Starts
from bst_dist.model.layers import Layer
from bst_dist.model.lm import LanguageModel
from bst_dist.parallel.sequence.past import Past


class BlockStateTransformer(LanguageModel):
    """A Block-State Transformer as a language model (arXiv 2306.09539), or one of its baselines by `mixer`.

    Called with `labels` it returns `Losses`, without them the logits of the last token. `LanguageModel.forward`
    documents the arguments, `ModelConfig` the `settings`.
    """

    def __init__(
        self,
        vocab_size: int,
        width: int = 512,
        depth: int = 12,
        heads: int = 8,
        block: int = 512,
        ffn: int | None = None,
        mixer: str = "bst",
        **settings: Any,
    ) -> None:
        """`ffn`: width of the feed-forward networks, by default four times the model's."""
        settings |= {"vocab_size": vocab_size, "width": width, "depth": depth, "heads": heads, "block": block}
        super().__init__(ModelConfig(**settings, ffn=ffn or 4 * width, mixer=mixer))


class _BSTConfig(LayerConfig):
    def mixers(self) -> list[str]:
        return ["bst"]


class BSTLayer(Layer):
    """One Block-State layer (B, l, D) -> (B, l, D): norm, mixer, norm, feed-forward network, both residual.

    Causal. l is a multiple of `block`, or the slice lies within one block.
    """

    def __init__(
        self, width: int, heads: int, block: int = 512, ffn: int | None = None, depth: int = 1, **settings: Any
    ) -> None:
        """`depth`: layers in the stack, which scales the initial values; `settings`: see `LayerConfig`."""
        super().__init__("bst", _BSTConfig(width=width, heads=heads, block=block, ffn=ffn or 4 * width, **settings))
        self.initialize(depth)

    def forward(self, x: Tensor, past: Past | None = None, starts: Starts | None = None) -> Tensor:
        """`past`: the past of the slice; None: nothing came before it.

        `starts`: (B, l / block) bool, blocks that begin a document; or `Borders`, for documents that begin at any
        token; None: no document begins.
        """
        return super().forward(x, past or Past(), starts)
