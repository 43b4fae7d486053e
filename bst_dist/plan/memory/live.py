"""Count the bytes of live tensors while code runs, their peak, and the number of operations that launch kernels.

A storage counts from the operation that makes it until nothing refers to it. With fake tensors nothing is allocated, so
the memory of a step can be counted that does not fit on this machine.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

_LIKE_INPUT = (torch.ops.aten.logsumexp.default,)
"""Operations that allocate a temporary tensor of their input's size."""
_DEVICE = torch.ops.prim.device.default
"""Autograd's query of a gradient's device. It is two thirds of all calls, so it has a fast path."""
_NOTHING = ("prim::", "aten::empty", "aten::new_empty", "aten::_unsafe_view", "aten::sym_", "aten::lift_fresh")
"""Name prefixes of operations that launch no kernel, besides those that return a view."""


class LiveBytes(TorchDispatchMode):
    """While active, counts the bytes of the tensors that operations return.

    Temporaries inside an operation are counted only for those in `_LIKE_INPUT`. Tensors that existed before count only
    if passed to `add`.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = 0
        self.peak = 0
        """Most live bytes since the beginning, or since the last `mark`."""
        self.launched = 0
        """Number of operations that compute something. On a GPU each launches at least one kernel."""
        self._alive: dict[int, weakref.ref] = {}

    def __torch_dispatch__(self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func is _DEVICE:
            return args[0].fake_device if isinstance(args[0], FakeTensor) else func(*args)
        if func in _LIKE_INPUT:
            self.peak = max(self.peak, self.now + args[0].nbytes)
        self.launched += computes(func)
        out = func(*args, **(kwargs or {}))
        for value in tree_iter(out):
            if isinstance(value, Tensor):
                self.add(value)
        return out

    def add(self, tensor: Tensor) -> None:
        """Count this tensor's storage, unless it is counted already."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        size = storage.nbytes()
        if key in self._alive:
            return
        self.now += size
        self.peak = max(self.peak, self.now)
        self._alive[key] = weakref.ref(storage, lambda _: self._gone(key, size))

    def mark(self) -> int:
        """Reset the peak; return the bytes alive now."""
        self.peak = self.now
        return self.now

    def _gone(self, key: int, size: int) -> None:
        del self._alive[key]
        self.now -= size


def computes(func: Callable) -> bool:
    """Whether an operation launches a kernel: views, allocations and queries do not."""
    schema = func._schema
    views = any(one.alias_info is not None and not one.alias_info.is_write for one in schema.returns)
    return not views and not schema.name.startswith(_NOTHING)
