"""Count the bytes that operations read and write, if a device runs each operation as a separate kernel."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from bst_dist.plan.memory.live import computes

_ATEN = torch.ops.aten
_PRODUCTS = (_ATEN.mm.default, _ATEN.bmm.default, _ATEN.addmm.default)
"""Matrix products. Their reads are not counted, because they overlap with the computation."""
_BY_INDEX = (_ATEN.gather.default, _ATEN.scatter_add_.default)
"""Operations that access one number per token; not counted."""
_LOGSUMEXP = 6
"""Number of passes over all numbers in torch's logsumexp: maximum, difference and exponential each read them, the last
two also write them, and the sum reads them."""


class MovedBytes(TorchDispatchMode):
    """While active, counts the bytes read and written in `total`."""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func is _ATEN.logsumexp.default:
            self.total += _LOGSUMEXP * args[0].nbytes
        elif func not in _BY_INDEX and computes(func):
            self.total += _bytes(out) + (0 if func in _PRODUCTS else _bytes((args, kwargs)))
        return out


def _bytes(tree: Any) -> int:
    return sum(x.nbytes for x in tree_iter(tree) if isinstance(x, Tensor))
