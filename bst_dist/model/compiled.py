"""A whole layer as one compiled graph, forward and backward: on a GPU a layer is some hundreds of kernels otherwise.

One graph serves all layers of a kind; what they share beside it, masks and tables of positions, is made outside, once a
call of the model. A graph is made for training on whole sequences, in one shape: a layer that has a past
(a stream, a neighbour's slice), or that makes no gradients, runs uncompiled, with FlexAttention compiled by itself.

Checkpointing that keeps nothing of a layer runs around its graph. One that keeps some operations is part of the graph:
torch's compiler is told which ones, and puts all others that the backward pass needs into it once more.
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

from bst_dist.model import flex
from bst_dist.model.borders import Borders, Starts
from bst_dist.parallel.sequence.past import Past

OPTIONS = {"combo_kernels": True, "epilogue_fusion": False}
"""Of Inductor: small kernels that do not wait for each other, such as casts of weights, are one launch; and nothing is
put into FlexAttention's kernels, which would read once more what another kernel reads anyway."""
LINEAR = torch._C._nn.linear

Keeps: TypeAlias = Callable[[Any, tuple[Any, ...]], bool]
"""Whether the outputs of an operation, called with these arguments, are kept for the backward pass."""

logging.getLogger("torch._higher_order_ops.wrap").setLevel(logging.ERROR)
"""It warns of operations in place in a checkpointed graph; torch has made copies of them before, see the tests."""


def hindrance(gathered: bool, sp: int, past: bool) -> str:
    """What speaks against compiled layers in training; empty when nothing does.

    Args:
        gathered: ZeRO-3 gathers the parameters from ranks, and some layers are not run again in the backward pass. What
            such a layer keeps for that, the compiler chooses: copies of parameters too, which are then never given up.
        sp: ranks that share a sequence.
        past: a layer has one, from an earlier step or slice.
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
    """A layer."""

    def compute(self, x: Tensor, past: Past, starts: Starts | None) -> Tensor: ...

    def prepare(self, x: Tensor, past: Past, starts: Starts | None) -> dict[str, object]: ...


def fits(past: Past) -> bool:
    """Whether a call is one that the compiled graph is made for."""
    return type(past) is Past and torch.is_grad_enabled()


def run(layer: Computes, x: Tensor, past: Past, starts: Starts | None, keeps: Keeps | None = None) -> Tensor:
    """The layer's output; raises torch's FailOnRecompileLimitHit for one graph more than `flex.GRAPHS`.

    `keeps`: what is kept for the backward pass beside the input. None: as the compiler chooses, which computes little
    again.
    """
    shared = layer.prepare(x, past, starts)
    starts = starts.without_places() if isinstance(starts, Borders) else starts
    with _own_linear():
        return flex.limited(_compiled(flex.BACKEND, keeps), layer, x, starts, shared)


@contextmanager
def _own_linear() -> Iterator[None]:
    """torch's linear maps, though ZeRO-3 may have put others in their place, for weights that are gathered again later.

    Those ask each weight for its number, so that with torch 2.11 no two layers would share a graph.
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

    options = OPTIONS if backend == "inductor" else None
    return torch.compile(whole_layer, fullgraph=True, dynamic=False, backend=backend, options=options)


def _decide(keeps: Keeps, context: object, operation: Any, *args: Any, **_: Any) -> bool:
    """In the form that torch asks in."""
    return keeps(operation, args)
