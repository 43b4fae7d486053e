"""A whole layer as one compiled graph, forward and backward: on a GPU a layer is some hundreds of kernels otherwise.

One graph serves all layers of a kind. It is made for training on whole sequences, in one shape: a layer that has a past
(a stream, a neighbour's slice), or that makes no gradients, runs uncompiled, with FlexAttention compiled by itself.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Protocol

import torch
from torch import Tensor

from bst_dist.model import flex
from bst_dist.parallel.past import Past


class Computes(Protocol):
    """A layer."""

    def compute(self, x: Tensor, past: Past, starts: Tensor | None) -> Tensor: ...


def fits(past: Past) -> bool:
    """Whether a call is one that the compiled graph is made for."""
    return type(past) is Past and torch.is_grad_enabled()


def run(layer: Computes, x: Tensor, starts: Tensor | None) -> Tensor:
    """The layer's output; raises torch's FailOnRecompileLimitHit for one graph more than `flex.GRAPHS`."""
    return flex.limited(_compiled(flex.BACKEND), layer, x, starts)


@cache
def _compiled(backend: object) -> Callable[..., Tensor]:
    def whole_layer(layer: Computes, x: Tensor, starts: Tensor | None) -> Tensor:
        return layer.compute(x, Past(), starts)

    return torch.compile(whole_layer, fullgraph=True, dynamic=False, backend=backend)
