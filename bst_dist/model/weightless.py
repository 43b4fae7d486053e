"""Models without memory for their weights, for what can be told from shapes: torch's meta device.

On that device torch computes by functions of Python that its compiler is to leave out. When one is first called torch
loads the compiler, to tell it so: a second, where a model is built in some ten milliseconds. Here such functions are
called as they are. Where a later version of torch does this otherwise, it takes longer and nothing else changes.
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
    """Tensors that are made while it is entered have a shape and no memory."""
    absent = _Absent(COMPILER)
    sys.modules.setdefault(COMPILER, absent)
    try:
        with torch.device("meta"):
            yield
    finally:
        absent.leave()


class _Absent(ModuleType):
    """In place of the compiler that nobody has imported yet: lets functions be called, and brings it for all else."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self._called: list[Callable[..., Any]] = []

    def disable(self, function: Callable[..., Any], *_: Any, **__: Any) -> Callable[..., Any]:
        self._called.append(function)
        return function

    def leave(self) -> None:
        """From now on the compiler is the compiler, also to the functions that were called without it."""
        if sys.modules.get(self.__name__) is self:
            del sys.modules[self.__name__]
        for function in self._called:
            vars(function).pop("__dynamo_disable", None)  # where torch notes how to call it

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") and name != "__path__":  # asked for before a module of the package is imported
            raise AttributeError(name)
        self.leave()
        return getattr(importlib.import_module(self.__name__), name)
