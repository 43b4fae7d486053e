"""Layers lowered and compiled for sm_90: `python -m tests.sm90.layers [NAME ...]` prints what is counted.

A line of JSON for each: launches of both passes by kind, and Triton kernels compiled with the shared memory they ask
for. `counts.json` beside this file keeps the lines that the test and the table in docs/gpu.md hold.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bst_dist.activation.selective import keeps
from bst_dist.model import compiled, flex
from bst_dist.model.config import LayerConfig
from bst_dist.model.layers import Layer
from bst_dist.parallel.past import Past
from tests.sm90.lowering import Launches, compile_kernels, launches, lower, pretended_h100, trace

COUNTS = Path(__file__).with_name("counts.json")
ROPE: dict[str, Any] = {"attention": {"position": "rope"}}
LENGTH = 512
FEW = 4
"""Kinds of operators that the table names."""


@dataclass(frozen=True)
class Case:
    """A layer, and the shape that it is compiled in."""

    mixer: str
    settings: dict[str, Any]
    documents: bool = False
    selective: bool = False
    """Whether its graph has selective checkpointing."""
    width: int = 256
    heads: int = 2
    block: int = 128
    rows: int = 2
    length: int = LENGTH

    def compute(self) -> Tensor:
        """As training does with `compile: true`."""
        torch.manual_seed(0)
        sizes = {"width": self.width, "heads": self.heads, "ffn": 4 * self.width, "block": self.block}
        layer = Layer(self.mixer, LayerConfig(**sizes, **self.settings))
        x = torch.randn(self.rows, self.length, self.width, requires_grad=True)
        starts = torch.zeros(self.rows, self.length // self.block, dtype=torch.bool) if self.documents else None
        return compiled.run(layer, x, Past(), starts, keeps if self.selective else None)


@dataclass(frozen=True)
class Attention:
    """What is compiled where layers are not: sliding attention alone, here with a block of keys before its tokens, as
    in a slice of a sequence, after a carried past, or on a rank that shares its sequences."""

    gradients: bool = True
    """Otherwise as in evaluation and generation: any number of rows, queries and keys."""
    bias: bool = False
    """T5's."""
    documents: bool = False

    def compute(self) -> Tensor:
        rows, block, heads, head = 2, 128, 2, 128
        shapes = (LENGTH, block + LENGTH, block + LENGTH)
        q, k, v = (
            torch.randn(rows, n, heads, head, dtype=torch.bfloat16, requires_grad=self.gradients) for n in shapes
        )
        bias = torch.zeros(heads, block + 1, requires_grad=self.gradients) if self.bias else None
        begin = torch.zeros(rows, LENGTH, dtype=torch.int32) if self.documents else None
        with torch.set_grad_enabled(self.gradients):
            return flex.flex_sliding_attention(q, k, v, block, bias, True, begin)[0]


LARGE: dict[str, Any] = {"width": 1024, "heads": 8, "block": 512, "rows": 8, "length": 4096}
"""The shape of docs/plan.md and of `bst bench gpu`."""

LAYERS: dict[str, Case | Attention] = {
    "sliding": Case("sliding", ROPE),
    "sliding, T5": Case("sliding", {}),
    "sliding, documents": Case("sliding", ROPE, documents=True),
    "sliding, T5, documents": Case("sliding", {}, documents=True),
    "sliding, shared keys, SwiGLU": Case(
        "sliding", {"attention": {"position": "rope", "kv_heads": 1}, "activation": "swiglu"}
    ),
    "sliding, selective": Case("sliding", ROPE, selective=True),
    "sliding, large": Case("sliding", ROPE, **LARGE),
    "BST-SH": Case("bst", ROPE),
    "BST-SH, T5": Case("bst", {}),
    "BST-SH, documents": Case("bst", ROPE, documents=True),
    "BST-SH, previous block": Case("bst", ROPE | {"context": {"attend": "previous"}}),
    "BST-SH, selective": Case("bst", ROPE, selective=True),
    "BST-SH, large": Case("bst", ROPE, **LARGE),
    "BST-SH, large, selective": Case("bst", ROPE, **LARGE, selective=True),
    "BST-MH": Case("bst", ROPE | {"context": {"variant": "MH"}}),
    "BST-MF": Case("bst", ROPE | {"context": {"variant": "MF"}}),
    "BST-MF, documents": Case("bst", ROPE | {"context": {"variant": "MF"}}, documents=True),
    "BST-MF, large": Case("bst", ROPE | {"context": {"variant": "MF"}}, **LARGE),
    "BST-SH, SSD": Case("bst", ROPE | {"ssm": {"kernel": "ssd"}}),
    "BST-SH, explicit": Case("bst", ROPE | {"ssm": {"kernel": "explicit", "length": LENGTH}}),
    "BST-SH, hyena": Case("bst", ROPE | {"ssm": {"kernel": "hyena", "length": LENGTH}}),
    "BST-SH, S4": Case("bst", ROPE | {"ssm": {"kernel": "s4-dplr"}}),
    "BST without cross-attention": Case("bst-no-cross", ROPE),
    "full": Case("full", ROPE | {"full": {"longest": LENGTH}}),
    "full, T5": Case("full", {"full": {"longest": LENGTH}}),
    "Transformer-XL": Case("transformer-xl", ROPE | {"transformer_xl": {"window": 256}}),
    "Block-Recurrent": Case("block-recurrent", ROPE | {"block_recurrent": {"states": 128}}),
    "pure SSM": Case("ssm", {}),
    "GSS": Case("gss", {}),
    "Mamba-2": Case("mamba2", {}),
    "Mamba-2, documents": Case("mamba2", {}, documents=True),
    "Gated DeltaNet": Case("gated-deltanet", {}),
    "attention, past": Attention(),
    "attention, past, T5, documents": Attention(bias=True, documents=True),
    "attention, no gradients": Attention(gradients=False),
    "attention, no gradients, T5": Attention(gradients=False, bias=True),
}
"""Every kind of layer; RoPE where nothing else is said and the layer has a window."""


def count(name: str) -> dict[str, Any]:
    """All passes of one layer."""
    graphs, passes, kernels = trace(LAYERS[name].compute), [], []
    with pretended_h100():
        for graph in graphs:
            code = lower(graph)
            passes.append(launches(code))
            kernels += compile_kernels(code)
    return {
        "launches": dict(zip(("forward", "backward"), (one.total for one in passes), strict=False)),
        "kinds": {kind: sum(getattr(one, kind) for one in passes) for kind in ("fused", "products", "flex", "flash")},
        "fallbacks": fallbacks(passes),
        "compiled": len(kernels),
        "shared_bytes": max(kernel.shared for kernel in kernels),
    }


def fallbacks(passes: list[Launches]) -> dict[str, int]:
    """Operators of torch that are called as they are, by name."""
    found: dict[str, int] = {}
    for one in passes:
        for operator in (name.removeprefix("torch.ops.aten.").removesuffix(".default") for name in one.fallbacks):
            found[operator] = found.get(operator, 0) + 1
    return dict(sorted(found.items()))


def table(counts: dict[str, dict[str, Any]]) -> str:
    """The rows of the table in docs/gpu.md."""
    lines = []
    for name, found in counts.items():
        kinds, own = found["kinds"], _named(found["fallbacks"])
        lines.append(
            f"| {name} | {found['launches']['forward']} | {found['launches'].get('backward', '')} | {kinds['fused']} | "
            f"{kinds['products']} | {kinds['flex'] + kinds['flash']} | {own} | {found['compiled']} | "
            f"{found['shared_bytes']:,} |"
        )
    return "\n".join(lines)


def _named(operators: dict[str, int]) -> str:
    """How often which, or of how many kinds."""
    if len(operators) > FEW:
        return f"{sum(operators.values())} of {len(operators)} kinds"
    return ", ".join(f"{number} {name}" for name, number in operators.items()) or "none"


if __name__ == "__main__":
    if sys.argv[1:] == ["table"]:
        print(table(json.loads(COUNTS.read_text())))
    for one in [name for name in sys.argv[1:] or LAYERS if name != "table"]:
        print(json.dumps({one: count(one)}), flush=True)
