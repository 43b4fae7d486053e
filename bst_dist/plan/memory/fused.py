"""Sliding attention and the loss of a tile as on a GPU: the tensors that their kernels allocate, without results."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bst_dist.model import loss
from bst_dist.model.attention import sliding
from bst_dist.model.attention.window import Window


@torch.library.custom_op("bst_plan::attention", mutates_args=())
def _attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """Forward pass as a separate operator, so that the compiler's partitioner treats it as one never recomputed."""
    return torch.empty_like(q), q.new_empty(q.shape[:-1], dtype=torch.float32)


@torch.library.custom_op("bst_plan::attention_backward", mutates_args=())
def _attention_backward(
    gradient: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, sums: Tensor, bias: Tensor | None
) -> list[Tensor]:
    return [torch.empty_like(x) for x in (q, k, v, bias) if x is not None]


_attention.register_fake(_attention._init_fn)
_attention_backward.register_fake(_attention_backward._init_fn)

OPERATOR = torch.ops.bst_plan.attention.default
"""The operator of the forward pass, as it appears in a graph."""


class _FusedAttention(torch.autograd.Function):
    """Keeps what a fused kernel keeps: inputs, output and one sum per query. Makes the gradients of the inputs."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
        out, sums = _attention(q, k, v, bias)
        ctx.save_for_backward(q, k, v, out, sums, bias)
        ctx.set_materialize_grads(False)
        return out, sums

    @staticmethod
    def backward(ctx: Any, gradient: Tensor | None, sums: Tensor | None) -> tuple:
        q, k, v, out, lse, bias = ctx.saved_tensors
        gradients = _attention_backward(gradient, q, k, v, out, lse, bias)
        return tuple(gradients) if bias is not None else (*gradients, None)


def fused_share(
    q: Tensor, k: Tensor, v: Tensor, window: Window, bias: Tensor | None = None, *_: Any
) -> sliding.PartialAttention:
    """Replacement for `sliding.sliding_share`."""
    return sliding.PartialAttention(*_FusedAttention.apply(q, k.to(q.dtype), v.to(q.dtype), bias))


def fused_attention(*arguments: Any) -> Tensor:
    """Replacement for `sliding.sliding_attention`."""
    return fused_share(*arguments).out


def fused_tile(logits: Tensor, target: Tensor, keep: Tensor, scale: float, z: float) -> loss.Tile:
    """Replacement for `loss.fused_tile`: reads the logits for the sums, and again for their gradient."""
    sums = logits.sum(-1, keepdim=True, dtype=torch.float32)
    return loss.Tile(sums, sums, logits.clone())
