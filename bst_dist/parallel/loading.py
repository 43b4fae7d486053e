"""DeepSpeed, imported without what no run here uses and what takes longer to load than all the rest.

`from bst_dist.parallel.loading import deepspeed` in place of `import deepspeed`. Left out are, with DeepSpeed 0.19.8
and torch 2.13:

- MLflow, where it is installed, and with it pandas, scipy and a web server: DeepSpeed's autotuner imports it, and
  `import deepspeed` imports the autotuner.
- torch's compiler and its code generator, for DeepSpeed's Muon, whose functions are given to the compiler when they are
  imported; every ZeRO optimizer imports Muon, to ask whether it is one.
- torch's compiler, which an optimizer loads to be left out of what is compiled.

What needs them loads them still: compiled layers, recomputed ones, ZeRO-3's hooks, the writer to MLflow. Where a later
version of either library does these things otherwise, a start takes longer and nothing else changes.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from bst_base.importing import uncollected


@contextmanager
def _absent(name: str) -> Iterator[None]:
    """While it is entered, a package that nobody has imported yet is as if it were not installed."""
    if name in sys.modules:
        yield
        return
    sys.modules[name] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        del sys.modules[name]


with uncollected(), _absent("mlflow"):
    import deepspeed
from deepspeed.runtime import compiler  # noqa: E402  (not before: it would import all of DeepSpeed)


def _import_muon() -> None:
    """Import DeepSpeed's Muon as plain functions; no run here uses it (`train/muon.py`)."""
    compiled = compiler.compile
    compiler.compile = lambda: lambda function: function
    try:
        import deepspeed.runtime.zero.muon.muon_optimizer  # noqa: F401
    finally:
        compiler.compile = compiled


def _call_without_compiler(uncompiled: Callable[..., Any]) -> None:
    """Let a function that torch leaves out of what it compiles be called as it is while the compiler is not loaded.

    `uncompiled` is what `torch._disable_dynamo` made of the function: it looks for a way past the compiler in an
    attribute of the function, and loads the compiler to make one where there is none.
    """
    function: Any = uncompiled.__wrapped__  # type: ignore[attr-defined]

    @functools.wraps(function)
    def call(*args: Any, **named: Any) -> Any:
        if "torch._dynamo" not in sys.modules:
            return function(*args, **named)
        if getattr(function, "__dynamo_disable", None) is call:
            del function.__dynamo_disable
        return uncompiled(*args, **named)

    function.__dynamo_disable = call


def _step_without_compiler(step: Callable[..., Any]) -> Callable[..., Any]:
    """Adam's step as torch wraps it, without gradients, but for the compiler's two breaks around it."""

    @functools.wraps(step)
    def take(optimizer: torch.optim.Optimizer, *args: Any, **named: Any) -> Any:
        if "torch._dynamo" in sys.modules:
            return step(optimizer, *args, **named)
        with torch.set_grad_enabled(optimizer.defaults["differentiable"]):
            return step.__wrapped__(optimizer, *args, **named)  # type: ignore[attr-defined]

    return take


_import_muon()
for _method in vars(torch.optim.Optimizer).values():
    if getattr(getattr(_method, "__code__", None), "co_filename", None) == torch._compile.__file__:
        _call_without_compiler(_method)
# `hooked`: an Adam was made before, and its step has torch's hooks around it by now.
if hasattr(torch.optim.Adam.step, "__wrapped__") and not hasattr(torch.optim.Adam.step, "hooked"):
    torch.optim.Adam.step = _step_without_compiler(torch.optim.Adam.step)  # type: ignore[method-assign]

__all__ = ["deepspeed"]
