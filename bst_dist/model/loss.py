"""The output head and its cross-entropy, computed in tiles, so that the logits of all tokens never exist at once."""

from __future__ import annotations

import torch
from torch import Tensor, nn

TILE_LOGITS = 2**23
"""Logits per tile on a CPU: 32 MiB in single precision, about the size of its caches."""

GPU_TILE_LOGITS = 2**27
"""Logits per tile on a GPU: 512 MiB. In tiles of the CPU's size, 32k tokens of 32k ids would be 126 tiles and 2,500
kernels, and each tile would read and write the gradient of the embedding."""


class _LinearCrossEntropy(torch.autograd.Function):
    """Sum over tokens of -log softmax(scale * h W^T)[label] + z log^2 Z, where Z is the softmax's denominator.

    The forward pass computes the gradients, tile by tile. The backward pass only multiplies them by the incoming
    scalar, and does not need the weight again.
    """

    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, labels: Tensor, mask: Tensor, scale: float, z: float) -> tuple:
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
        rows = max(1, (TILE_LOGITS if device == "cpu" else GPU_TILE_LOGITS) // len(weight))
        with torch.autocast(device, enabled=False):
            for first in range(0, len(hidden), rows):
                part = slice(first, first + rows)
                h, target, keep = hidden[part].to(dtype), labels[part, None], mask[part, None]
                logits = (h @ matrix.T).to(wide).mul_(scale)
                log_z = logits.logsumexp(-1, keepdim=True)
                per_token[part] = ((log_z - logits.gather(-1, target)) * keep).squeeze(-1)
                if squares is not None:
                    squares += (log_z.square() * keep).sum()
                if correct is not None:
                    correct[part] = (logits.argmax(-1, keepdim=True) == target).squeeze(-1) & mask[part]
                    continue
                d_logits = logits.sub_(log_z).exp_()
                if z:
                    d_logits.mul_(1 + 2 * z * log_z)
                d_logits.scatter_add_(-1, target, torch.full_like(log_z, -1.0))
                d_logits = d_logits.mul_(keep * scale).to(dtype)
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
            None if d_weight is None else (d_weight * grad).to(d_weight.dtype),
            None, None, None, None,
        )  # fmt: skip


def linear_cross_entropy(hidden: Tensor, weight: Tensor, labels: Tensor, mask: Tensor, scale: float,
                         z_loss: float = 0.0) -> tuple:  # fmt: skip
    """Return the negative log-likelihood in nats of `labels` under the logits ``scale * hidden @ weight.T``.

    Args:
        hidden: (B, l, D).
        weight: (V, D).
        labels: (B, l) int64.
        mask: (B, l) bool; where it is False, loss and gradient are zero.
        z_loss: weight of log^2 Z, where Z is the sum of the exponentials of a token's logits; taken as 0 when gradients
            are disabled.

    Returns:
        The sum over tokens plus `z_loss` times the sum of log^2 Z, a scalar with gradient; the negative log-likelihood
        of each token, (B, l), without gradient; whether each unmasked label has the highest logit, (B, l) bool, or None
        when gradients are computed; the sum of log^2 Z, or None when `z_loss` is 0.
    """
    if not torch.is_grad_enabled():  # a Function's needs_input_grad ignores no_grad
        hidden, weight, z_loss = hidden.detach(), weight.detach(), 0.0
    flat = hidden.flatten(0, 1), weight, labels.flatten(), mask.flatten()
    total, per_token, correct, squares = _LinearCrossEntropy.apply(*flat, scale, z_loss)
    return total, per_token.view(labels.shape), None if correct is None else correct.view(labels.shape), squares


class OutputHead(nn.Module):
    """An output head with its own matrix, initialised N(0, 1) like the embedding. It is a module so that ZeRO-3 gathers
    the matrix for this call only and not for the whole pass."""

    def __init__(self, vocabulary: int, width: int):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(vocabulary, width))
        self.products_only = ("weight",)

    def forward(self, hidden: Tensor, scale: float, labels: Tensor | None = None, mask: Tensor | None = None,
                z_loss: float = 0.0) -> Tensor | tuple:  # fmt: skip
        """Return the result of `linear_cross_entropy`; without labels the logits, (..., D) -> (..., V)."""
        if labels is None:
            return hidden @ self.weight.T * scale
        return linear_cross_entropy(hidden, self.weight, labels, mask, scale, z_loss)
