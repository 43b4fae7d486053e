"""Selective activation checkpointing: a layer is recomputed, except for the operations whose outputs were kept.

Outputs are kept if their recomputation is expensive for the memory they take: attention, and matrix products whose
inner dimension is at least their output width (the maps back to the model's width). Other products, the normalisations
and the state space model are recomputed. In a compiled layer torch's compiler uses the same rule, `keeps`
(`bst_dist.model.compiled`).

Uncompiled layers cannot use torch's `create_selective_checkpoint_contexts` because of ZeRO-3: it counts every operation
of both runs, but the two runs prefetch different parameters. The code here counts only the kept operations.
"""

from __future__ import annotations

from collections import deque
from typing import Any

import torch
from torch import Tensor
from torch._higher_order_ops.flex_attention import flex_attention
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

_ATTENTION = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
    torch.ops.aten._scaled_dot_product_cudnn_attention.default,
    flex_attention,
}


def keeps(operation: Any, args: tuple[Any, ...]) -> bool:
    """Whether the outputs of an operation are kept."""
    if operation is torch.ops.aten.mm.default:
        depth, columns = args[1].shape
        return depth >= columns
    return operation in _ATTENTION


def contexts() -> tuple[TorchDispatchMode, TorchDispatchMode]:
    """Return the context managers of the first run and of the recomputation, for one call of one layer."""
    outputs: deque[tuple[Any, Any]] = deque()
    return _Keep(outputs), _Give(outputs)


class _Mode(TorchDispatchMode):
    """A dispatch mode that sees FlexAttention, a higher-order operator, and lets the compiler work inside it."""

    supports_higher_order_operators = True

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        return True

    def __init__(self, outputs: deque[tuple[Any, Any]]) -> None:
        super().__init__()
        self.outputs = outputs


class _Keep(_Mode):
    """The first run: runs all operations, and keeps the outputs selected by `keeps`."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if keeps(func, args):
            self.outputs.append((func, _alias(result)))  # an alias, because autograd sets grad_fn on the tensor itself
        return result


class _Give(_Mode):
    """The recomputation: returns the kept outputs instead of computing them again."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not keeps(func, args):
            return func(*args, **(kwargs or {}))
        operation, result = self.outputs.popleft()
        if operation is not func:
            raise RuntimeError(f"a layer's second run came to {func} where its first had {operation}")
        return result


def _alias(outputs: Any) -> Any:
    return tree_map(lambda x: x.detach() if isinstance(x, Tensor) else x, outputs)
