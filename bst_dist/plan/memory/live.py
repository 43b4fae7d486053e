"""How many bytes of tensors are alive while something runs, and how many were at most; and what a device would launch.

Counted are storages, from the operation that makes one to the moment when nothing refers to it any more. With fake
tensors nothing is allocated, so this tells the memory of a step that no machine at hand could take.
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
"""Operations that make a tensor of their input's size and give it up before they return."""
_DEVICE = torch.ops.prim.device.default
"""What autograd asks of every gradient: two thirds of all calls, so it is answered at once."""
_NOTHING = ("prim::", "aten::empty", "aten::new_empty", "aten::_unsafe_view", "aten::sym_", "aten::lift_fresh")
"""Beginnings of the names of operations that launch nothing, beside those that return a view."""


class LiveBytes(TorchDispatchMode):
    """While active, counts the bytes of the tensors that operations return. Of what an operation makes for itself only
    that of `_LIKE_INPUT` is known.

    Give it the tensors that were there before with `add`, if they are to count.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = 0
        self.peak = 0
        """The most since the beginning, or since `mark`."""
        self.launched = 0
        """Operations that compute something: on a GPU, kernels launched, one each at least."""
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
        key, size = storage._cdata, storage.nbytes()
        if key in self._alive:
            return
        self.now += size
        self.peak = max(self.peak, self.now)
        self._alive[key] = weakref.ref(storage, lambda _: self._gone(key, size))

    def mark(self) -> int:
        """Forget the peak so far; returns what is alive now."""
        self.peak = self.now
        return self.now

    def _gone(self, key: int, size: int) -> None:
        del self._alive[key]
        self.now -= size


def computes(func: Callable) -> bool:
    """Whether an operation launches anything: views, allocations and questions do not."""
    schema = func._schema
    views = any(one.alias_info is not None and not one.alias_info.is_write for one in schema.returns)
    return not views and not schema.name.startswith(_NOTHING)
