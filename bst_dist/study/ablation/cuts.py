"""Parts of a layer cut off by hooks: attention's output or window, the memory of the SSM between blocks.

Each function changes one module and returns what undoes it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from bst_dist.parallel.sequence.past import Past

Undo = Callable[[], None]


def without_output(attention: nn.Module) -> Undo:
    """Zero instead of the attention's output; what it gives beside (keys and values, Block-Recurrent) stays."""

    def zero(module: nn.Module, args: tuple, output: Any) -> Any:
        if isinstance(output, tuple):
            return torch.zeros_like(output[0]), *output[1:]
        return torch.zeros_like(output)

    return attention.register_forward_hook(zero).remove


def without_cross(mixer: nn.Module) -> Undo:
    """Zero instead of cross-attention's output, the second half of what a mixer's last map is given."""

    def zero(module: nn.Module, args: tuple) -> tuple[Tensor]:
        own, cross = args[0].chunk(2, dim=-1)
        return (torch.cat((own, torch.zeros_like(cross)), dim=-1),)

    return mixer.out.register_forward_pre_hook(zero).remove


def own_block(attention: nn.Module, block: int) -> Undo:
    """Self-attention sees nothing before its own block: each block is said to begin a document."""

    def all_begin(module: nn.Module, args: tuple) -> tuple:
        u, past, _ = args
        return u, past, torch.ones(len(u), u.shape[1] // block, dtype=torch.bool, device=u.device)

    return attention.register_forward_pre_hook(all_begin).remove


def forget(ssm: nn.Module, block: int) -> Undo:
    """The SSM starts from zero at each block, because each block is a row of its own."""
    forward, block_ends = ssm.forward, ssm.block_ends

    def apart(z: Tensor, past: Past, starts: Tensor | None = None) -> Tensor:
        return forward(_fold(z, block), Past()).unflatten(0, (len(z), -1)).flatten(1, 2)

    def ends_apart(z: Tensor, block: int, past: Past, starts: Tensor | None = None) -> Tensor:
        return block_ends(_fold(z, block), block, Past()).unflatten(0, (len(z), -1)).flatten(1, 2)

    ssm.forward, ssm.block_ends = apart, ends_apart

    def undo() -> None:
        del ssm.forward, ssm.block_ends  # the class's own come to light again

    return undo


def _fold(z: Tensor, block: int) -> Tensor:
    """(B, nb W, Ds) -> (B nb, W, Ds)."""
    return z.unflatten(1, (-1, block)).flatten(0, 1)
