"""Selective activation checkpointing: a layer is run again but for the operations whose outputs were kept.

Kept is what costs much to compute again for each byte it takes: attention, and matrix products at least as deep as
they are wide (the maps back to the model's width). The wide ones, the normalisations and the state space model are
computed again. In a compiled layer torch's compiler does so by the same rule, `keeps` (`bst_dist.model.compiled`).

Elsewhere torch's `create_selective_checkpoint_contexts` would do, were it not for ZeRO-3: it counts every operation of
both runs, and the second gathers other parameters ahead than the first did. Here only the kept ones are counted.
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
    """For one call of one layer: what its first run is in, and what its second."""
    outputs: deque[tuple[Any, Any]] = deque()
    return _Keep(outputs), _Give(outputs)


class _Mode(TorchDispatchMode):
    """Sees FlexAttention, an operator of operators, and does not keep the compiler from what runs inside it."""

    supports_higher_order_operators = True

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        return True

    def __init__(self, outputs: deque[tuple[Any, Any]]) -> None:
        super().__init__()
        self.outputs = outputs


class _Keep(_Mode):
    """The first run: lets everything happen, and keeps what is to be kept."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if keeps(func, args):
            self.outputs.append((func, _alias(result)))  # autograd puts the node on the tensor it is given
        return result


class _Give(_Mode):
    """The second run: gives what was kept instead of computing it again."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not keeps(func, args):
            return func(*args, **(kwargs or {}))
        operation, result = self.outputs.popleft()
        if operation is not func:
            raise RuntimeError(f"a layer's second run came to {func} where its first had {operation}")
        return result


def _alias(outputs: Any) -> Any:
    return tree_map(lambda x: x.detach() if isinstance(x, Tensor) else x, outputs)
