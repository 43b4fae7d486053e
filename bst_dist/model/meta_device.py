"""Models without memory for their weights, for questions that shapes can answer: torch's meta device.

On this device torch computes with Python functions that its compiler must skip. At the first call of such a function
torch imports the compiler to tell it so. This takes a second; building a model takes some ten milliseconds. Here these
functions are called without the compiler. If a later version of torch works differently, building takes longer and
nothing else changes.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import torch

COMPILER = "torch._dynamo"


@contextmanager
def weightless() -> Iterator[None]:
    """Context manager: tensors that are made within it have a shape and no memory."""
    stub = _CompilerStub(COMPILER)
    sys.modules.setdefault(COMPILER, stub)
    try:
        with torch.device("meta"):
            yield
    finally:
        stub.leave()


class _CompilerStub(ModuleType):
    """A stand-in for the compiler while it is not imported. Any use except `disable` imports the compiler."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self._called: list[Callable[..., Any]] = []

    def disable(self, function: Callable[..., Any], *_: Any, **__: Any) -> Callable[..., Any]:
        self._called.append(function)
        return function

    def leave(self) -> None:
        """Remove the stand-in, also for the functions that were called without the compiler."""
        if sys.modules.get(self.__name__) is self:
            del sys.modules[self.__name__]
        for function in self._called:
            vars(function).pop("__dynamo_disable", None)  # torch caches there how to call it

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") and name != "__path__":  # `__path__` is read to import a submodule
            raise AttributeError(name)
        self.leave()
        return getattr(importlib.import_module(self.__name__), name)
