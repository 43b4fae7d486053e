"""Lower and compile layers for sm_90: `python -m tests.sm90.layers [NAME ...]` prints the counts.

It prints one line of JSON per layer: launches of both passes by kind, bytes read and written, and the number of Triton
kernels compiled, with their shared memory. `counts.json` in this folder holds the lines that the test checks and the
table in docs/gpu.md shows.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from bst_dist.activation.selective import keeps
from bst_dist.model import compiled
from bst_dist.model.attention import flex
from bst_dist.model.attention.window import Window
from bst_dist.model.config import LayerConfig
from bst_dist.model.document_mask import Borders, Starts
from bst_dist.model.layers import Layer
from bst_dist.model.loss import linear_cross_entropy
from bst_dist.parallel.sequence.past import Past
from tests.sm90.lowering import Launches, compile_kernels, launches, lower, precisions, pretended_h100, trace

COUNTS = Path(__file__).with_name("counts.json")
ROPE: dict[str, Any] = {"attention": {"position": "rope"}}
LENGTH = 512
PASSES = "forward", "backward"
COLUMNS = (
    "layer",
    "forward",
    "backward",
    "Triton",
    "products",
    "attention",
    "other operators",
    "MB",
    "kernels",
    "shared memory, bytes",
)
FEW = 4
"""Up to this many kinds of operators are named in the table."""


@dataclass(frozen=True)
class Case:
    """A layer, and the shape that it is compiled for."""

    mixer: str
    settings: dict[str, Any]
    documents: Literal["", "isolated", "masked"] = ""
    """Documents begin at a block ("isolated") or at any token ("masked"); "": no documents."""
    selective: bool = False
    """Whether its graph uses selective checkpointing."""
    width: int = 256
    heads: int = 2
    block: int = 128
    rows: int = 2
    length: int = LENGTH
    document: int = 700
    """Tokens of a masked document."""

    def compute(self) -> Tensor:
        """Run the layer as training does with `compile: true`. No parameter is 0 or 1, which could hide an error."""
        torch.manual_seed(0)
        sizes = {"width": self.width, "heads": self.heads, "ffn": 4 * self.width, "block": self.block}
        layer = Layer(self.mixer, LayerConfig(**sizes, **self.settings))
        with torch.no_grad():
            for parameter in layer.parameters():
                parameter += 0.05 * torch.randn_like(parameter)
        x = torch.randn(self.rows, self.length, self.width, requires_grad=True)
        return compiled.run(layer, x, Past(), self._starts(), keeps if self.selective else None)

    def _starts(self) -> Starts | None:
        """Return where documents begin, in the first row elsewhere than in the others.

        A program depends only on the size of the table of masked documents.
        """
        if self.documents == "masked":
            begins = torch.zeros(self.rows, self.length, dtype=torch.bool)
            begins[:, 100 :: self.document] = True
            begins[0] = begins[0].roll(60)
            return Borders.of(begins)
        if not self.documents:
            return None
        begins = torch.zeros(self.rows, self.length // self.block, dtype=torch.bool)
        begins[1:, 1::2] = True
        return begins


@dataclass(frozen=True)
class Attention:
    """Sliding attention alone, which is compiled if layers are not.

    Here it has a block of keys before its tokens, as in a slice, after a carried past, or under sequence parallelism.
    """

    gradients: bool = True
    """Whether gradients are needed; if not, as in evaluation and generation: any number of rows, queries and keys."""
    past: bool = True
    """Whether there are keys before its tokens. False for context states, which use causal sliding attention if
    documents begin at any token."""
    sums: bool = False
    """Whether the sums of the exponentials are returned, for one softmax over further keys."""
    bias: bool = False
    """Whether it has a T5 bias."""
    documents: bool = False
    head: int = 128

    def compute(self) -> Tensor:
        rows, block, heads, head = 2, 128, 2, self.head
        keys = LENGTH + (block if self.past else 0)
        shapes = (LENGTH, keys, keys)
        dtype = torch.bfloat16 if torch.is_autocast_enabled("cpu") else torch.float32
        q, k, v = (torch.randn(rows, n, heads, head, dtype=dtype, requires_grad=self.gradients) for n in shapes)
        bias = torch.zeros(heads, block + 1, requires_grad=self.gradients) if self.bias else None
        begin = torch.zeros(rows, LENGTH, dtype=torch.int32) if self.documents else None
        if begin is not None:
            begin[1, block:] = block  # the second row's second block begins a document
        with torch.set_grad_enabled(self.gradients):
            return flex.flex_sliding_attention(q, k, v, Window(block), bias, begin, sums=self.sums)[0]


@dataclass(frozen=True)
class Loss:
    """What is compiled of the loss: the losses of a tile and the gradient of its logits, 300 tokens of 16,000 ids."""

    z_loss: float = 0.0

    def compute(self) -> Tensor:
        hidden, weight = (torch.randn(n, 64, requires_grad=True) for n in (300, 16_000))
        labels, mask = torch.zeros(1, 300, dtype=torch.long), torch.ones(1, 300, dtype=torch.bool)
        return linear_cross_entropy(hidden.unsqueeze(0), weight, labels, mask, 0.5, self.z_loss, fused=True)[0]


LARGE: dict[str, Any] = {"width": 1024, "heads": 8, "block": 512, "rows": 8, "length": 4096}
"""The shape of docs/plan.md and of `bst bench gpu`."""

LAYERS: dict[str, Case | Attention | Loss] = {
    "sliding": Case("sliding", ROPE),
    "sliding, T5": Case("sliding", {}),
    "sliding, documents": Case("sliding", ROPE, documents="isolated"),
    "sliding, masked documents": Case("sliding", ROPE, documents="masked"),
    "sliding, T5, documents": Case("sliding", {}, documents="isolated"),
    "sliding, shared keys, SwiGLU": Case(
        "sliding", {"attention": {"position": "rope", "kv_heads": 1}, "activation": "swiglu"}
    ),
    "sliding, selective": Case("sliding", ROPE, selective=True),
    "sliding, large": Case("sliding", ROPE, **LARGE),
    "BST-SH": Case("bst", ROPE),
    "BST-SH, T5": Case("bst", {}),
    "BST-SH, documents": Case("bst", ROPE, documents="isolated"),
    "BST-SH, masked documents": Case("bst", ROPE, documents="masked"),
    "BST-SH, T5, masked documents": Case("bst", {}, documents="masked"),
    "BST-SH, previous block": Case("bst", ROPE | {"context": {"attend": "previous"}}),
    "BST-SH, selective": Case("bst", ROPE, selective=True),
    "BST-SH, large": Case("bst", ROPE, **LARGE),
    "BST-SH, large, masked documents": Case("bst", ROPE, documents="masked", **LARGE),
    "BST-SH, large, selective": Case("bst", ROPE, **LARGE, selective=True),
    "BST-MH": Case("bst", ROPE | {"context": {"variant": "MH"}}),
    "BST-MF": Case("bst", ROPE | {"context": {"variant": "MF"}}),
    "BST-MF, documents": Case("bst", ROPE | {"context": {"variant": "MF"}}, documents="isolated"),
    "BST-MF, masked documents": Case("bst", ROPE | {"context": {"variant": "MF"}}, documents="masked"),
    "BST-MF, large": Case("bst", ROPE | {"context": {"variant": "MF"}}, **LARGE),
    "BST-SH, SSD": Case("bst", ROPE | {"ssm": {"kernel": "ssd"}}),
    "BST-SH, explicit": Case("bst", ROPE | {"ssm": {"kernel": "explicit", "length": LENGTH}}),
    "BST-SH, hyena": Case("bst", ROPE | {"ssm": {"kernel": "hyena", "length": LENGTH}}),
    "BST-SH, S4": Case("bst", ROPE | {"ssm": {"kernel": "s4-dplr"}}),
    "joint": Case("bst-joint", ROPE),
    "joint, documents": Case("bst-joint", ROPE, documents="isolated"),
    "joint, masked documents": Case("bst-joint", ROPE, documents="masked"),
    "joint, MF": Case("bst-joint", ROPE | {"context": {"variant": "MF"}}),
    "BST without cross-attention": Case("bst-no-cross", ROPE),
    "full": Case("full", ROPE | {"full": {"longest": LENGTH}}),
    "full, documents": Case("full", ROPE | {"full": {"longest": LENGTH}}, documents="isolated"),
    "full, T5": Case("full", {"full": {"longest": LENGTH}}),
    "Transformer-XL": Case("transformer-xl", ROPE | {"transformer_xl": {"window": 256}}),
    "Transformer-XL, documents": Case(
        "transformer-xl", ROPE | {"transformer_xl": {"window": 256}}, documents="isolated"
    ),
    "Block-Recurrent": Case("block-recurrent", ROPE | {"block_recurrent": {"states": 128}}),
    "pure SSM": Case("ssm", {}),
    "pure SSM, documents": Case("ssm", {}, documents="isolated"),
    "pure SSM, masked documents": Case("ssm", {}, documents="masked"),
    "GSS": Case("gss", {}),
    "Mamba-2": Case("mamba2", {}),
    "Mamba-2, documents": Case("mamba2", {}, documents="isolated"),
    "Mamba-2, masked documents": Case("mamba2", {}, documents="masked"),
    "Gated DeltaNet": Case("gated-deltanet", {}),
    "attention, past": Attention(),
    "attention, past, documents": Attention(documents=True),
    "attention, past, sums, documents": Attention(sums=True, documents=True),
    "attention to states, documents": Attention(past=False, documents=True),
    "attention, past, T5, documents": Attention(bias=True, documents=True),
    "attention, no gradients": Attention(gradients=False),
    "attention, no gradients, documents": Attention(gradients=False, documents=True),
    "attention, no gradients, T5": Attention(gradients=False, bias=True),
    "loss": Loss(),
    "loss, log² Z": Loss(z_loss=1e-4),
}
"""Every kind of layer. Layers with a window use RoPE unless the name says otherwise."""


def count(name: str) -> dict[str, Any]:
    """Return the counts of all passes of one layer."""
    graphs, passes, kernels, moved, atomics, in_double = trace(LAYERS[name].compute), [], [], [], 0, []
    with pretended_h100():
        for graph in graphs:
            program = lower(graph)
            moved.append(program.bytes)
            passes.append(launches(program.code))
            kernels += compile_kernels(program.code)
            atomics += program.code.count("tl.atomic_")
            in_double.append(precisions(program.code))
    return {
        "launches": dict(zip(PASSES, (one.total for one in passes), strict=False)),
        "bytes": dict(zip(PASSES, moved, strict=False)),
        "kinds": {kind: sum(getattr(one, kind) for one in passes) for kind in ("fused", "products", "flex", "flash")},
        "fallbacks": fallbacks(passes),
        "compiled": len(kernels),
        "atomics": atomics,
        "sines": dict(zip(PASSES, (sines for sines, _ in in_double), strict=False)),
        "mixed": sum(mixed for _, mixed in in_double),
        "shared_bytes": max(kernel.shared for kernel in kernels),
    }


def fallbacks(passes: list[Launches]) -> dict[str, int]:
    """Count the torch operators that are called directly, by name."""
    found: dict[str, int] = {}
    for one in passes:
        for operator in (name.removeprefix("torch.ops.aten.").removesuffix(".default") for name in one.fallbacks):
            found[operator] = found.get(operator, 0) + 1
    return dict(sorted(found.items()))


def table(counts: dict[str, dict[str, Any]]) -> str:
    """Return the table in docs/gpu.md."""
    lines = ["| " + " | ".join(COLUMNS) + " |", "| --- |" + " --: |" * 5 + " --- |" + " --: |" * 3]
    for name, found in counts.items():
        kinds, own = found["kinds"], _named(found["fallbacks"])
        lines.append(
            f"| {name} | {found['launches']['forward']} | {found['launches'].get('backward', '')} | {kinds['fused']} | "
            f"{kinds['products']} | {kinds['flex'] + kinds['flash']} | {own} | "
            f"{sum(found['bytes'].values()) / 1e6:,.0f} | {found['compiled']} | {found['shared_bytes']:,} |"
        )
    return "\n".join(lines)


def _named(operators: dict[str, int]) -> str:
    """Return text that lists the operators with their counts; if there are many kinds, only the totals."""
    if len(operators) > FEW:
        return f"{sum(operators.values())} of {len(operators)} kinds"
    return ", ".join(f"{number} {name}" for name, number in operators.items()) or "none"


if __name__ == "__main__":
    if sys.argv[1:] == ["table"]:
        print(table(json.loads(COUNTS.read_text())))
    for one in [name for name in sys.argv[1:] or LAYERS if name != "table"]:
        print(json.dumps({one: count(one)}), flush=True)
