"""What the programs of a layer compute, pass by pass, beside what the same graphs compute in plain torch on a CPU."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensor

from tests.sm90.interpreted import flash, flash_backward
from tests.sm90.layers import LAYERS, Case
from tests.sm90.lowering import Graph, lower, pretended_h100, trace

PARTS = 8192
"""Numbers that a program of a fused kernel works on: the interpreter takes as long for few."""
ROWS = 64
"""Sums over rows that it makes at once."""
SMALL: dict[str, Any] = {"width": 128, "rows": 2, "length": 256, "document": 60}
FLASH = torch.ops.aten._scaled_dot_product_flash_attention.default
FLASH_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_backward.default


@dataclass(frozen=True)
class Pass:
    """Of a layer, forward or backward."""

    backward: bool
    expected: list[Any]
    """Of plain torch."""
    found: list[Any]
    """Of the program for an H100."""

    def errors(self) -> list[float]:
        """Largest differences, each over the largest number of that output; NaN where a number is missing."""
        both = zip(self.found, self.expected, strict=True)
        pairs = [(a.detach().double(), b.detach().double()) for a, b in both if _counts(b)]
        return [float((a - b).abs().max() / b.abs().max().clamp_min(1e-30)) for a, b in pairs]


def _counts(x: Any) -> bool:
    return isinstance(x, Tensor) and x.numel() > 0


class _OnCPU(fx.Interpreter):
    """Runs a graph as it was traced, with flash attention, which torch has for GPUs alone, written out."""

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        own = {FLASH: flash, FLASH_BACKWARD: flash_backward}.get(target)
        return super().call_function(target, args, kwargs) if own is None else own(*args, **kwargs)


def passes(name: str, folder: Path, bf16: bool = True) -> list[Pass]:
    """Of a small layer of this name, with random parameters and gradients; `folder` is for files of its own.

    `bf16`: as a GPU has it; otherwise in fp32 throughout, where two ways to compute the same hardly differ.
    """
    case = LAYERS[name]
    case = replace(case, **SMALL) if isinstance(case, Case) else case
    recorded: list[tuple[Graph, list[Any], list[Any]]] = []

    def compute() -> None:
        out = case.compute()
        if out.requires_grad:
            out.backward(torch.randn_like(out))

    trace(compute, lambda graph: _recorder(graph, recorded), bf16)
    with pretended_h100():
        programs = [
            {"code": (code := lower(graph).code), "inputs": inputs, "configs": _tiles(code)}
            for graph, inputs, _ in recorded
        ]
    found = _interpreted(programs, folder / "passes.pt")
    return [Pass(graph.backward, out, one) for (graph, _, out), one in zip(recorded, found, strict=True)]


def _recorder(graph: Graph, recorded: list[tuple[Graph, list[Any], list[Any]]]) -> Callable[[list[Any]], Any]:
    def run(given: list[Any]) -> Any:
        pairs = zip(given, graph.inputs, strict=True)
        laid_out = [_as_traced(one, like) if graph.backward else one for one, like in pairs]
        with torch.no_grad():
            out = _OnCPU(graph.module).run(*given)
        recorded.append((graph, laid_out, [one.clone() if isinstance(one, Tensor) else one for one in out]))
        return out

    return run


def _as_traced(x: Any, like: Any) -> Any:
    """A copy with the strides that the program was written for; plain torch may have left others."""
    if not isinstance(like, FakeTensor):
        return x
    return torch.empty_strided(x.shape, like.stride(), dtype=x.dtype).copy_(x)


def _tiles(code: str) -> dict[str, dict[str, int]]:
    """Sizes of the tiles of each kernel of a program, by name: as on a GPU, but for larger ones where any will do."""
    from torch._inductor.codecache import PyCodeCache

    found = {}
    for name, source in re.findall(r"async_compile\.triton\('(\w+)', '''(.*?)'''", code, re.S):
        tiles = dict(getattr(PyCodeCache.load(source), name).configs[0].kwargs)
        if "XBLOCK" in tiles:
            others = [size for tile, size in tiles.items() if tile.endswith("BLOCK") and tile != "XBLOCK"]
            most = (ROWS if "reduction" in source else PARTS) // torch.tensor([1, *others]).prod().item()
            tiles["XBLOCK"] = max(tiles["XBLOCK"], most)
        found[name] = tiles
    return found


def _interpreted(programs: list[dict[str, Any]], file: Path) -> list[list[Any]]:
    torch.save(programs, file)
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tests.sm90.interpreted", str(file)]
    root = Path(__file__).parents[2]
    ended = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr[-4000:]
    return torch.load(file, weights_only=False)
