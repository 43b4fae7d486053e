"""The output head and its cross-entropy, computed in tiles, so that the logits of all tokens never exist at once."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor, nn

from bst_dist.model.attention import flex

TILE_LOGITS = 2**23
"""Logits per tile on a CPU: 32 MiB in single precision, about the size of its caches."""

GPU_TILE_LOGITS = 2**27
"""Logits per tile on a GPU: 512 MiB. In tiles of the CPU's size, 32k tokens of 32k ids would be 126 tiles and 2,500
kernels, and each tile would read and write the gradient of the embedding."""

GRAPHS = 32
"""Most graphs of the loss: two sizes of tiles (`_tiles`) for each of two sizes of micro-batches, with eight lengths of
sequences (`config._MOST_LENGTHS`)."""


class Tile(NamedTuple):
    """The result for the tokens of one tile."""

    losses: Tensor
    """(tokens, 1): the negative log-likelihood, in nats; zero for masked tokens."""
    log_z: Tensor
    """(tokens, 1): the logarithm of the softmax's denominator Z."""
    d_logits: Tensor
    """(tokens, V): the gradient of the product of hidden states and matrix, in its dtype."""


def _in_place(logits: Tensor, target: Tensor, keep: Tensor, scale: float, z: float) -> Tile:
    """Compute a tile operation by operation, in the memory of one tile in single precision.

    Args:
        logits: (tokens, V), before they are multiplied by `scale`.
        target: (tokens, 1) int64, the labels.
        keep: (tokens, 1) bool, False for masked tokens.
        z: weight of log^2 Z.
    """
    dtype = logits.dtype
    logits = _scaled(logits, scale)
    log_z = logits.logsumexp(-1, keepdim=True)
    losses = (log_z - logits.gather(-1, target)) * keep
    d_logits = logits.sub_(log_z).exp_()
    if z:
        d_logits.mul_(1 + 2 * z * log_z)
    d_logits.scatter_add_(-1, target, torch.full_like(log_z, -1.0))
    return Tile(losses, log_z, d_logits.mul_(keep * scale).to(dtype))


def _out_of_place(logits: Tensor, target: Tensor, keep: Tensor, scale: float, z: float) -> Tile:
    """Return what `_in_place` returns, by operations that a compiler fuses.

    The fused kernel reads the logits and writes their gradient, and nothing else of this size.
    """
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32)) * scale
    largest = wide.amax(-1, keepdim=True)
    log_z = largest + (wide - largest).exp().sum(-1, keepdim=True).log()
    losses = (log_z - wide.gather(-1, target)) * keep
    softmax = (wide - log_z).exp()
    if z:
        softmax = softmax * (1 + 2 * z * log_z)
    is_target = torch.arange(logits.shape[1], device=logits.device) == target
    return Tile(losses, log_z, ((softmax - is_target.to(wide.dtype)) * (keep * scale)).to(logits.dtype))


@cache
def _compiled(backend: object) -> Callable[..., Tile]:
    return torch.compile(_out_of_place, fullgraph=True, dynamic=False, backend=backend)


def fused_tile(*tile: Tensor | float) -> Tile:
    """Return what `_in_place` returns, by compiled kernels: one, where a tile has enough tokens."""
    return flex.limited(_compiled(flex.BACKEND), *tile, graphs=GRAPHS)


def _scaled(logits: Tensor, scale: float) -> Tensor:
    """Return them in single precision at least, in place where that is their dtype."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32)).mul_(scale)


class _LinearCrossEntropy(torch.autograd.Function):
    """Sum over tokens of -log softmax(scale * h W^T)[label] + z log^2 Z, where Z is the softmax's denominator.

    The forward pass computes the gradients, tile by tile. The backward pass only multiplies them by the incoming
    scalar, and does not need the weight again.
    """

    @staticmethod
    def forward(
        ctx, hidden: Tensor, weight: Tensor, labels: Tensor, mask: Tensor, scale: float, z: float, fused: bool
    ) -> tuple:
        device = hidden.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype
        wide = torch.promote_types(weight.dtype, torch.float32)
        matrix = weight.to(dtype)
        per_token = torch.zeros(len(hidden), dtype=wide, device=hidden.device)
        needs_hidden, needs_weight = ctx.needs_input_grad[:2]
        d_hidden = torch.empty_like(hidden) if needs_hidden else None
        d_weight = torch.zeros_like(weight, dtype=wide) if needs_weight else None
        correct = None if needs_hidden or needs_weight else torch.zeros_like(mask)  # training does not need it
        squares = per_token.new_zeros(()) if z else None
        with torch.autocast(device, enabled=False):
            for part in _tiles(len(hidden), len(weight), device):
                h = hidden[part].to(dtype)
                target, keep = labels[part, None], mask[part, None]
                logits = h @ matrix.T
                if correct is not None:
                    logits = _scaled(logits, scale)
                    log_z = logits.logsumexp(-1, keepdim=True)
                    per_token[part] = ((log_z - logits.gather(-1, target)) * keep).squeeze(-1)
                    correct[part] = (logits.argmax(-1, keepdim=True) == target).squeeze(-1) & mask[part]
                    continue
                losses, log_z, d_logits = (fused_tile if fused else _in_place)(logits, target, keep, scale, z)
                per_token[part] = losses.squeeze(-1)
                if squares is not None:
                    squares += (log_z.square() * keep).sum()
                if needs_hidden:
                    d_hidden[part] = d_logits @ matrix
                if needs_weight:
                    d_weight += d_logits.T @ h
        ctx.save_for_backward(d_hidden, d_weight)
        ctx.mark_non_differentiable(*(x for x in (per_token, squares) if x is not None))
        total = per_token.sum()
        return total if squares is None else total + z * squares, per_token, correct, squares

    @staticmethod
    def backward(ctx, grad: Tensor, *_: Tensor | None) -> tuple:
        d_hidden, d_weight = ctx.saved_tensors
        return (
            None if d_hidden is None else d_hidden * grad,
            None if d_weight is None else d_weight * grad,
            None,
            None,
            None,
            None,
            None,
        )


def _tiles(tokens: int, vocabulary: int, device: str) -> Iterator[slice]:
    """Yield the tokens of each tile. The tiles are as equal as they can be, so that few are compiled."""
    most = max(1, (TILE_LOGITS if device == "cpu" else GPU_TILE_LOGITS) // vocabulary)
    rows = -(-tokens // -(-tokens // most)) if tokens else most
    for first in range(0, tokens, rows):
        yield slice(first, first + rows)


def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, labels: Tensor, mask: Tensor, scale: float, z_loss: float = 0.0, fused: bool = False
) -> tuple:
    """Return the negative log-likelihood in nats of `labels` under the logits ``scale * hidden @ weight.T``.

    Args:
        hidden: (B, l, D).
        weight: (V, D).
        labels: (B, l) int64.
        mask: (B, l) bool; where it is False, loss and gradient are zero.
        z_loss: weight of log^2 Z, where Z is the sum of the exponentials of a token's logits; taken as 0 when gradients
            are disabled.
        fused: with gradients, compile what is computed of each tile besides the products (`_out_of_place`).

    Returns:
        The sum over tokens plus `z_loss` times the sum of log^2 Z, a scalar with gradient; the negative log-likelihood
        of each token, (B, l), without gradient; whether each unmasked label has the highest logit, (B, l) bool, or None
        when gradients are computed; the sum of log^2 Z, or None when `z_loss` is 0.
    """
    if not torch.is_grad_enabled():  # a Function's needs_input_grad ignores no_grad
        hidden = hidden.detach()
        weight = weight.detach()
        z_loss = 0.0
    flat = hidden.flatten(0, 1), weight, labels.flatten(), mask.flatten()
    total, per_token, correct, squares = _LinearCrossEntropy.apply(*flat, scale, z_loss, fused)
    return total, per_token.view(labels.shape), None if correct is None else correct.view(labels.shape), squares


class OutputHead(nn.Module):
    """An output head with its own matrix, initialised N(0, 1) like the embedding. It is a module so that ZeRO-3 gathers
    the matrix for this call only and not for the whole pass."""

    def __init__(self, vocabulary: int, width: int):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(vocabulary, width))
        self.products_only = ("weight",)

    def forward(
        self,
        hidden: Tensor,
        scale: float,
        labels: Tensor | None = None,
        mask: Tensor | None = None,
        z_loss: float = 0.0,
        fused: bool = False,
    ) -> Tensor | tuple:
        """Return the result of `linear_cross_entropy`; without labels the logits, (..., D) -> (..., V)."""
        if labels is None:
            return hidden @ self.weight.T * scale
        return linear_cross_entropy(hidden, self.weight, labels, mask, scale, z_loss, fused)
