"""A whole layer as one compiled graph, forward and backward. Uncompiled, a layer is some hundreds of kernels on a GPU.

One graph serves all layers of a kind. Masks and tables of positions, which these layers share, are made outside of the
graph, once per call of the model. A graph is made for training on whole sequences, in one shape. A layer with a past
(a stream, a neighbour's slice), or without gradients, runs uncompiled; FlexAttention is then compiled by itself.

Activation checkpointing that keeps nothing of a layer wraps its graph. Checkpointing that keeps some operations is part
of the graph: torch's compiler is told which ones, and recomputes all others that the backward pass needs.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, partial
from typing import Any, Protocol, TypeAlias

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from bst_dist.model.attention import flex
from bst_dist.model.document_mask import Borders, Starts
from bst_dist.parallel.sequence.past import Past

OPTIONS = {"combo_kernels": True, "epilogue_fusion": False}
"""Options of Inductor. Small independent kernels, such as casts of weights, are combined into one launch. Nothing is
fused into FlexAttention's kernels, which would read again what another kernel reads anyway."""
LINEAR = torch._C._nn.linear

Keeps: TypeAlias = Callable[[Any, tuple[Any, ...]], bool]
"""Predicate: whether the outputs of an operation, called with these arguments, are kept for the backward pass."""

logging.getLogger("torch._higher_order_ops.wrap").setLevel(logging.ERROR)
"""Hides a warning about in-place operations in a checkpointed graph: torch has made copies before (see the tests)."""


def why_not_compilable(gathered: bool, sp: int, past: bool) -> str:
    """Return why layers cannot be compiled in training; an empty string if they can.

    Args:
        gathered: ZeRO-3 gathers the parameters from ranks, and some layers are not recomputed in the backward pass. For
            such a layer the compiler chooses what to keep. It may keep copies of parameters, which are never released.
        sp: number of ranks that share a sequence.
        past: whether layers have a past, from an earlier step or slice.
    """
    if gathered:
        return (
            "under ZeRO-3 a graph may keep copies of the weights it was given, unless "
            "activation_checkpointing.policy is every-layer, selective or offload"
        )
    if sp > 1:
        return "with parallel.sp > 1 a layer waits for other ranks from within it"
    if past:
        return "with train.carry or train.slice_tokens a layer has a past"
    return ""


class Computes(Protocol):
    """The interface of a layer."""

    def compute(self, x: Tensor, past: Past, starts: Starts | None) -> Tensor: ...

    def prepare(self, x: Tensor, past: Past, starts: Starts | None) -> dict[str, object]: ...


def fits(past: Past) -> bool:
    """Whether the compiled graph can serve a call: it has no past, and gradients are enabled."""
    return type(past) is Past and torch.is_grad_enabled()


def run(layer: Computes, x: Tensor, past: Past, starts: Starts | None, keeps: Keeps | None = None) -> Tensor:
    """Return the layer's output. Raise torch's FailOnRecompileLimitHit if it needs more than `flex.GRAPHS` graphs.

    `keeps`: which outputs are kept for the backward pass besides the input. None: the compiler chooses, and recomputes
    little.
    """
    shared = layer.prepare(x, past, starts)
    starts = starts.without_places() if isinstance(starts, Borders) else starts
    with _own_linear():
        return flex.limited(_compiled(flex.BACKEND, keeps), layer, x, starts, shared)


@contextmanager
def _own_linear() -> Iterator[None]:
    """Use torch's own linear function. ZeRO-3 may have replaced it, for weights that are gathered again later.

    ZeRO-3's function reads an id of each weight, so that with torch 2.11 no two layers would share a graph.
    """
    there = nn.functional.linear
    nn.functional.linear = LINEAR
    try:
        yield
    finally:
        nn.functional.linear = there


@cache
def _compiled(backend: object, keeps: Keeps | None) -> Callable[..., Tensor]:
    contexts = partial(create_selective_checkpoint_contexts, partial(_decide, keeps))

    def whole_layer(layer: Computes, x: Tensor, starts: Starts | None, shared: dict[str, object]) -> Tensor:
        past = Past()
        past.shared = dict(shared)
        if keeps is None:
            return layer.compute(x, past, starts)
        return checkpoint(
            layer.compute, x, past, starts, use_reentrant=False, preserve_rng_state=False, context_fn=contexts
        )

    options = None
    if backend == "inductor":
        options = OPTIONS
        combine_alike()
    return torch.compile(whole_layer, fullgraph=True, dynamic=False, backend=backend, options=options)


def combine_alike() -> None:
    """Let Inductor combine only kernels that are alike; it is set for the whole process.

    All parts of a combined kernel get as many registers as the largest part, and as many rows of blocks as the tallest.
    A table in double precision needs 255 registers for each thread, which leaves room for an eighth of the threads: a
    large cast combined with it took more than twice its time.
    """
    from torch._inductor.codegen import triton_combo_kernel as combos

    def partition(nodes: list[Any], scheduling: Any, infos: dict[Any, Any]) -> list[list[Any]]:
        kinds: dict[object, list[Any]] = {}
        groups = combos._default_custom_combo_kernel_horizontal_partition(nodes, scheduling, infos)
        for number, group in enumerate(groups):
            for node in group:
                kinds.setdefault((number, _in_double_precision(node), infos[node].tiling.get("y")), []).append(node)
        return list(kinds.values())

    combos.set_custom_combo_kernel_horizontal_partition(partition)


def _in_double_precision(node: Any) -> bool:
    """Whether a node of Inductor's scheduler reads, writes or computes numbers in double precision."""
    from torch._inductor.virtualized import V

    buffers = (V.graph.get_dtype(access.name) for access in node.read_writes.reads_and_writes())
    bodies = (block for one in node.get_nodes() for block in (one._body.root_block, *one._body.subblocks.values()))
    casts = (operation.args for body in bodies for operation in body.graph.nodes)
    return torch.float64 in buffers or any(torch.float64 in args for args in casts)


def _decide(keeps: Keeps, context: object, operation: Any, *args: Any, **_: Any) -> bool:
    """Call `keeps` with the signature that torch requires."""
    return keeps(operation, args)
