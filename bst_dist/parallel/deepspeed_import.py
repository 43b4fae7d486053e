"""DeepSpeed, imported without parts that no run here uses and that take longer to load than all others.

Use `from bst_dist.parallel.deepspeed_import import deepspeed` instead of `import deepspeed`. With DeepSpeed 0.19.8 and
torch 2.13, it does not load:

- MLflow, if it is installed, and with it pandas, scipy and a web server. `import deepspeed` imports DeepSpeed's
  autotuner, which imports MLflow.
- torch's compiler and its code generator, for DeepSpeed's Muon, whose functions are passed to the compiler at import.
  Every ZeRO optimizer imports Muon to check whether it is one.
- torch's compiler, which an optimizer loads only to exclude itself from compilation.

Code that needs these still loads them: compiled layers, recomputed layers, ZeRO-3's hooks, the MLflow writer. If a
later version of either library works differently, a start takes longer and nothing else changes.
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
def _hide_module(name: str) -> Iterator[None]:
    """Context manager in which a package that is not imported yet seems not to be installed."""
    if name in sys.modules:
        yield
        return
    sys.modules[name] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        del sys.modules[name]


with uncollected(), _hide_module("mlflow"):
    import deepspeed
from deepspeed.runtime import compiler  # noqa: E402  (not earlier: it imports all of DeepSpeed)


def _import_muon() -> None:
    """Import DeepSpeed's Muon as plain functions; no run here uses it (`train/muon.py`)."""
    compiled = compiler.compile
    compiler.compile = lambda: lambda function: function
    try:
        import deepspeed.runtime.zero.muon.muon_optimizer  # noqa: F401
    finally:
        compiler.compile = compiled


def _call_without_compiler(uncompiled: Callable[..., Any]) -> None:
    """Let a function that torch excludes from compilation be called directly while the compiler is not loaded.

    `uncompiled` is the wrapper that `torch._disable_dynamo` made of the function. It looks for a version that bypasses
    the compiler in an attribute of the function. If there is none, it loads the compiler to make one.
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
    """Return Adam's step as torch wraps it (without gradients), but without the compiler's two graph breaks."""

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
# `hooked`: an Adam was made before, and torch has already wrapped its step with hooks.
if hasattr(torch.optim.Adam.step, "__wrapped__") and not hasattr(torch.optim.Adam.step, "hooked"):
    torch.optim.Adam.step = _step_without_compiler(torch.optim.Adam.step)  # type: ignore[method-assign]

__all__ = ["deepspeed"]
