"""Run programs of `lowering` on a CPU: Triton kernels in Triton's interpreter, everything else in torch.

Runs in a separate process, started by `running.py`, because Triton reads at import whether to interpret. Buffers that a
program allocates are filled with NaN, so that a read before a write is noticed.
"""

from __future__ import annotations

import importlib.util
import inspect
import math
import re
import sys
import tempfile
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor

KINDS = "pointwise", "reduction", "persistent_reduction", "template", "foreach", "fixed_config"
"""Kinds of kernels, as Inductor's decorators name them."""
LIBDEVICE = {
    "cos": np.cos,
    "exp": np.exp,
    "expm1": np.expm1,
    "log1p": np.log1p,
    "rsqrt": lambda x: 1 / np.sqrt(x),
    "sin": np.sin,
    "tanh": np.tanh,
    "erf": np.vectorize(math.erf, otypes=[float]),
}
"""Replacements of CUDA's functions that kernels call."""


def flash(
    q: Tensor, k: Tensor, v: Tensor, dropout: float = 0.0, causal: bool = False, *_: object, scale: float | None = None
) -> Any:
    """Return the outputs of torch's GPU flash attention, (B, H, l, dh): output, logsumexp, and unused others."""
    scores = _scores(q, k, causal, scale)
    out = (scores.softmax(-1) @ v.float()).to(q.dtype)
    laid_out = torch.empty_like(q.transpose(1, 2), memory_format=torch.contiguous_format).transpose(1, 2).copy_(out)
    seed, unused = torch.zeros(2, dtype=torch.uint64), torch.zeros((), dtype=torch.uint64)
    return laid_out, scores.logsumexp(-1), None, None, q.shape[2], k.shape[2], seed, unused, torch.zeros(0)


def flash_backward(
    d_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, sums: Tensor, *rest: Any, scale: float | None = None
) -> list[Tensor]:
    """Return the gradients of queries, keys and values."""
    causal = rest[5]
    d_out, q_, k_, v_, out = (x.float() for x in (d_out, q, k, v, out))
    factor = q.shape[-1] ** -0.5 if scale is None else scale
    weights = (_scores(q, k, causal, scale) - sums.unsqueeze(-1)).exp()
    d_scores = weights * (d_out @ v_.mT - (d_out * out).sum(-1, keepdim=True)) * factor
    found = (d_scores @ k_, q), (d_scores.mT @ q_, k), (weights.mT @ d_out, v)
    return [torch.empty_like(like).copy_(x) for x, like in found]


def _scores(q: Tensor, k: Tensor, causal: bool, scale: float | None) -> Tensor:
    scores = q.float() @ k.float().mT * (q.shape[-1] ** -0.5 if scale is None else scale)
    hidden = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
    return scores.masked_fill(hidden, -torch.inf) if causal else scores


def run(code: str, inputs: list[Any], configs: dict[str, dict[str, int]]) -> list[Any]:
    """Run the program of a pass; return its outputs.

    Args:
        configs: tile sizes of each kernel, by name.
    """
    code = code.replace("empty_strided_cuda(", "_made(").replace("async_compile.triton(", "_interpreted(")
    code = code.replace("torch.cuda._DeviceGuard(0)", "_here()").replace("torch.cuda.set_device(0)", "pass")
    code = re.sub(r"= get_raw_stream\(\d+\)", "= 0", code)
    code = code.replace("torch.ops.aten._scaled_dot_product_flash_attention.default(", "_flash(")
    code = code.replace("torch.ops.aten._scaled_dot_product_flash_attention_backward.default(", "_flash_backward(")
    code = code.replace("device='cuda'", "device='cpu'").replace("device(type='cuda', index=0)", "device('cpu')")
    with tempfile.TemporaryDirectory() as folder:
        program: dict[str, Any] = {
            "__name__": "program",
            "__file__": str(Path(folder) / "program.py"),
            "_made": _made,
            "_here": nullcontext,
            "_flash": flash,
            "_flash_backward": flash_backward,
            "_interpreted": lambda name, source, **_: Kernel(name, source, configs[name], Path(folder)),
        }
        exec(compile(code, "program", "exec"), program)
        return list(program["call"](list(inputs)))


def _made(sizes: tuple[int, ...], strides: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    made = torch.empty_strided(sizes, strides, dtype=dtype)
    return made.fill_(torch.nan) if dtype.is_floating_point else made


class Kernel:
    """A Triton kernel that is called like in Inductor's programs."""

    def __init__(self, name: str, source: str, config: dict[str, int], folder: Path):
        self.config = config
        file = folder / f"{name}.py"
        file.write_text(source)
        self.name = name
        from torch._inductor.runtime import triton_heuristics

        kinds = [kind for kind in KINDS if hasattr(triton_heuristics, kind)]
        with patch.multiple(triton_heuristics, **dict.fromkeys(kinds, self._decorator)):
            spec = importlib.util.spec_from_file_location(name, file)
            module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
        self.function = getattr(module, name)

    def _decorator(self, **settings: Any) -> Callable[[Any], Any]:
        self.meta, self.settings = settings["inductor_meta"], settings["triton_meta"]
        return lambda function: function

    def run(self, *arguments: Any, stream: int, **more: Any) -> None:
        from torch._inductor.runtime.triton_heuristics import GridExpr

        constants = {**self.settings.get("constants", {}), **self.config}
        names = [name for name in inspect.signature(self.function.fn).parameters if name not in constants]
        given = dict(zip(names, arguments, strict=False))
        grid = arguments[len(names) :]
        if not grid:
            grid = GridExpr.from_meta(self.meta, self.config).eval_slow({**constants, **given})
        self.function[tuple(grid)](**given, **constants)


def prepare_interpreter() -> None:
    """Add to Triton's interpreter what it lacks: products of bf16, and CUDA's functions."""
    import triton.language as tl
    from torch._inductor.runtime import triton_helpers
    from triton.runtime import interpreter

    def as_float(x: Any) -> Any:
        return interpreter._convert_float(x.data, tl.bfloat16, tl.float32, None).view(np.float32).reshape(x.data.shape)

    def dot(self: Any, a: Any, b: Any, d: Any, *_: object) -> Any:
        a, b = (as_float(x) if x.dtype.scalar == tl.bfloat16 else x.data for x in (a, b))
        return interpreter.TensorHandle(np.matmul(a, b, dtype=d.data.dtype) + d.data, d.dtype.scalar)

    interpreter.InterpreterBuilder.create_dot = dot

    class Libdevice:
        def __getattr__(self, name: str) -> Callable[..., Any]:
            function = LIBDEVICE[name]

            def call(*arguments: tl.tensor) -> tl.tensor:
                found = function(*(one.handle.data for one in arguments))
                first = arguments[0]
                handle = interpreter.TensorHandle(found.astype(first.handle.data.dtype), first.dtype.scalar)
                return tl.tensor(handle, first.type)

            return call

    triton_helpers.libdevice, triton_helpers.set_driver_to_gpu = Libdevice(), lambda: None


def main(path: str) -> None:
    """Run each pass in the file, and overwrite the file with their outputs."""
    prepare_interpreter()
    passes = torch.load(path, weights_only=False)
    torch.save([run(one["code"], one["inputs"], one["configs"]) for one in passes], path)


if __name__ == "__main__":
    main(sys.argv[1])
