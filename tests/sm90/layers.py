"""Layers lowered and compiled for sm_90: `python -m tests.sm90.layers [NAME ...]` prints what is counted.

A line of JSON for each: launches of both passes by kind, and Triton kernels compiled with the shared memory they ask
for. `counts.json` beside this file keeps the lines that the test and the table in docs/gpu.md hold.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch

from bst_dist.model.config import LayerConfig
from bst_dist.model.layers import Layer
from tests.sm90.lowering import Launches, compile_kernels, launches, lower, pretended_h100, trace

COUNTS = Path(__file__).with_name("counts.json")
ROPE: dict[str, Any] = {"attention": {"position": "rope"}}
SIZES = {"width": 256, "heads": 2, "ffn": 1024, "block": 128}
ROWS, LENGTH = 2, 512
BLOCKS = LENGTH // SIZES["block"]

LAYERS: dict[str, tuple[str, dict[str, Any]]] = {
    "BST-SH": ("bst", ROPE),
    "sliding": ("sliding", ROPE),
    "sliding, T5": ("sliding", {}),
    "BST-SH, T5": ("bst", {}),
    "BST-SH, documents": ("bst", ROPE),
    "BST-MF": ("bst", ROPE | {"context": {"variant": "MF"}}),
    "BST-MH": ("bst", ROPE | {"context": {"variant": "MH"}}),
    "BST-SH, previous block": ("bst", ROPE | {"context": {"attend": "previous"}}),
    "full": ("full", ROPE | {"full": {"longest": LENGTH}}),
    "pure SSM": ("ssm", {}),
    "GSS": ("gss", {}),
    "Transformer-XL": ("transformer-xl", ROPE | {"transformer_xl": {"window": 256}}),
    "Block-Recurrent": ("block-recurrent", ROPE | {"block_recurrent": {"states": 128}}),
    "Mamba-2": ("mamba2", {}),
    "Gated DeltaNet": ("gated-deltanet", {}),
    "BST-SH, hyena": ("bst", ROPE | {"ssm": {"kernel": "hyena", "length": LENGTH}}),
    "BST-SH, S4": ("bst", ROPE | {"ssm": {"kernel": "s4-dplr"}}),
}
"""Mixer and settings; RoPE where nothing else is said and the mixer has a window."""


def count(name: str) -> dict[str, Any]:
    """Both passes of one layer."""
    mixer, settings = LAYERS[name]
    torch.manual_seed(0)
    layer = Layer(mixer, LayerConfig(**SIZES, **settings))
    x = torch.randn(ROWS, LENGTH, SIZES["width"], requires_grad=True)
    starts = torch.zeros(ROWS, BLOCKS, dtype=torch.bool) if "documents" in name else None
    graphs, passes, kernels = trace(layer, x, starts), [], []
    with pretended_h100():
        for graph in graphs:
            code = lower(graph)
            passes.append(launches(code))
            kernels += compile_kernels(code)
    return {
        "launches": {"forward": passes[0].total, "backward": passes[1].total},
        "kinds": {kind: sum(getattr(one, kind) for one in passes) for kind in ("fused", "products", "flex", "flash")},
        "fallbacks": fallbacks(passes),
        "compiled": len(kernels),
        "shared_bytes": max(kernel.shared for kernel in kernels),
    }


def fallbacks(passes: list[Launches]) -> dict[str, int]:
    """Operators of torch that are called as they are, by name."""
    found: dict[str, int] = {}
    for one in passes:
        for operator in one.fallbacks:
            found[operator] = found.get(operator, 0) + 1
    return dict(sorted(found.items()))


def table(counts: dict[str, dict[str, Any]]) -> str:
    """The rows of the table in docs/gpu.md."""
    lines = []
    for name, found in counts.items():
        kinds, own = found["kinds"], ", ".join(f"{number} {one}" for one, number in found["fallbacks"].items())
        lines.append(
            f"| {name} | {found['launches']['forward']} | {found['launches']['backward']} | {kinds['fused']} | "
            f"{kinds['products']} | {kinds['flex'] + kinds['flash']} | {own or 'none'} | {found['compiled']} | "
            f"{found['shared_bytes']:,} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    if sys.argv[1:] == ["table"]:
        print(table(json.loads(COUNTS.read_text())))
    for one in [name for name in sys.argv[1:] or LAYERS if name != "table"]:
        print(json.dumps({one: count(one)}), flush=True)
