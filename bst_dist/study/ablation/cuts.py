"""Hooks that remove a part of a layer: the output or the window of attention, or the SSM's memory between blocks.

Each function changes one module and returns a function that undoes the change.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from bst_dist.parallel.sequence.past import Past

Undo = Callable[[], None]


def without_output(attention: nn.Module) -> Undo:
    """Replace the output of attention by zeros. Its other results (keys and values of Block-Recurrent) stay."""

    def zero(module: nn.Module, args: tuple, output: Any) -> Any:
        if isinstance(output, tuple):
            return torch.zeros_like(output[0]), *output[1:]
        return torch.zeros_like(output)

    return attention.register_forward_hook(zero).remove


def without_cross(mixer: nn.Module) -> Undo:
    """Replace the output of cross-attention by zeros. It is the second half of the input of the mixer's last map."""

    def zero(module: nn.Module, args: tuple) -> tuple[Tensor]:
        own, cross = args[0].chunk(2, dim=-1)
        return (torch.cat((own, torch.zeros_like(cross)), dim=-1),)

    return mixer.out.register_forward_pre_hook(zero).remove


def own_block(attention: nn.Module, block: int) -> Undo:
    """Limit self-attention to its own block, by declaring that each block begins a document."""

    def all_begin(module: nn.Module, args: tuple) -> tuple:
        u, past, _ = args
        return u, past, torch.ones(len(u), u.shape[1] // block, dtype=torch.bool, device=u.device)

    return attention.register_forward_pre_hook(all_begin).remove


def forget(ssm: nn.Module, block: int) -> Undo:
    """Make the SSM start from a zero state at each block, by passing each block as a separate row."""
    forward, block_ends = ssm.forward, ssm.block_ends

    def apart(z: Tensor, past: Past, starts: Tensor | None = None) -> Tensor:
        return forward(_fold(z, block), Past()).unflatten(0, (len(z), -1)).flatten(1, 2)

    def ends_apart(z: Tensor, block: int, past: Past, starts: Tensor | None = None) -> Tensor:
        return block_ends(_fold(z, block), block, Past()).unflatten(0, (len(z), -1)).flatten(1, 2)

    ssm.forward, ssm.block_ends = apart, ends_apart

    def undo() -> None:
        del ssm.forward, ssm.block_ends  # the methods of the class apply again

    return undo


def _fold(z: Tensor, block: int) -> Tensor:
    """Reshape (B, nb W, Ds) to (B nb, W, Ds)."""
    return z.unflatten(1, (-1, block)).flatten(0, 1)
