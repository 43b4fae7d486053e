"""Run the programs of a layer, pass by pass, and the same graphs in plain torch on a CPU, to compare the results."""

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
"""Elements per program of a fused kernel. Large, because the interpreter takes as long for few elements."""
ROWS = 64
"""Row sums per program of a reduction kernel."""
SMALL: dict[str, Any] = {"width": 128, "rows": 2, "length": 256, "document": 60}
FLASH = torch.ops.aten._scaled_dot_product_flash_attention.default
FLASH_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_backward.default


@dataclass(frozen=True)
class Pass:
    """Outputs of one pass of a layer, forward or backward."""

    backward: bool
    expected: list[Any]
    """Outputs of plain torch."""
    found: list[Any]
    """Outputs of the program for an H100."""

    def errors(self) -> list[float]:
        """Return each output's largest difference relative to its largest number; NaN if an element was not written."""
        both = zip(self.found, self.expected, strict=True)
        pairs = [(a.detach().double(), b.detach().double()) for a, b in both if _counts(b)]
        return [float((a - b).abs().max() / b.abs().max().clamp_min(1e-30)) for a, b in pairs]


def _counts(x: Any) -> bool:
    return isinstance(x, Tensor) and x.numel() > 0


class _OnCPU(fx.Interpreter):
    """Runs a graph as traced, with explicit formulas for flash attention, which torch only has on GPUs."""

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        own = {FLASH: flash, FLASH_BACKWARD: flash_backward}.get(target)
        return super().call_function(target, args, kwargs) if own is None else own(*args, **kwargs)


def passes(name: str, folder: Path, bf16: bool = True) -> list[Pass]:
    """Run both passes of a small layer of this name, with random parameters and gradients; return their outputs.

    Args:
        folder: for temporary files.
        bf16: as on a GPU; otherwise everything is in fp32, where two ways to compute the same hardly differ.
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
    """Return a copy with the strides that the program expects; plain torch may have used others."""
    if not isinstance(like, FakeTensor):
        return x
    return torch.empty_strided(x.shape, like.stride(), dtype=x.dtype).copy_(x)


def _tiles(code: str) -> dict[str, dict[str, int]]:
    """Return the tile sizes of each kernel of a program, by name: as on a GPU, but larger if the size is free."""
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
