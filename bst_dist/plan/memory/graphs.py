"""Memory of a compiled layer, from the two graphs that torch's compiler would get, without compiling them.

AOTAutograd traces the layer forward and backward on fake tensors. The partitioner that Inductor uses divides the trace
into two graphs, and the tensors passed from the first to the second are those kept between the passes. The peak is
counted over the graphs' operations one by one. Inductor fuses some of them, so it makes fewer tensors than counted
here.
"""

from __future__ import annotations

import operator
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, fx, nn
from torch._functorch.aot_autograd import aot_function
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch.fx._lazy_graph_module import _make_graph_module, _use_lazy_graph_module
from torch.utils._pytree import tree_flatten, tree_unflatten
from torch.utils.checkpoint import CheckpointPolicy

from bst_dist.activation import selective
from bst_dist.model import matmul
from bst_dist.model.document_mask import Borders, Starts
from bst_dist.parallel.sequence.past import Past
from bst_dist.plan.memory.fused import OPERATOR
from bst_dist.plan.memory.live import computes
from bst_dist.plan.memory.parts import Part

MOST_NODES = 20_000
"""Largest trace, in operations, that is partitioned: with a loop over very many blocks this would take minutes."""


class _Traced(Exception):
    """Raised to stop AOTAutograd once the trace exists."""


def joint_graph(layer: nn.Module, x: Tensor, starts: Starts | None, autocast: AbstractContextManager) -> Joint | None:
    """Return the trace of a layer for an input of this shape; None if it has more than MOST_NODES operations.

    Call it under a FakeTensorMode.
    """
    with autocast:
        given = (x, dict(layer.named_parameters()), layer.prepare(x, Past(), starts), _opened(starts))
        leaves, form = tree_flatten(given)
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        found: list[Joint] = []

        def call(*traced: Tensor) -> Tensor:
            following = iter(traced)
            x, parameters, shared, opened = tree_unflatten(
                [next(following) if isinstance(leaf, Tensor) else leaf for leaf in leaves], form
            )
            past = Past()
            past.shared = shared
            return torch.func.functional_call(layer, parameters, (x, past, _closed(opened)))

        def take(module: fx.GraphModule, inputs: Any, *, num_fwd_outputs: int, **options: Any) -> None:
            found.append(Joint(module, inputs, num_fwd_outputs, options, len(x)))
            raise _Traced

        as_compiled = torch._functorch.config.patch(backward_pass_autocast="off")  # `flex.limited`
        products_as_compiled = patch.object(matmul, "is_compiling", lambda: True)  # normally true only under Dynamo
        with as_compiled, products_as_compiled, suppress(_Traced):
            aot_function(call, fw_compiler=lambda graph, _: graph, partition_fn=take)(*tensors)
    return found[0] if len(found[0].module.graph.nodes) <= MOST_NODES else None


def _opened(starts: Starts | None) -> Any:
    """Return where documents begin as tensors, as the compiled layer gets it."""
    return tuple(vars(starts.without_places()).values()) if isinstance(starts, Borders) else starts


def _closed(opened: Any) -> Starts | None:
    return Borders(*opened) if isinstance(opened, tuple) else opened


@dataclass(frozen=True, eq=False)
class Joint:
    """Both passes of a layer in one trace.

    The first input is the layer's input. The other inputs, parameters and tensors that all layers share, are not
    counted.
    """

    module: fx.GraphModule
    inputs: Any
    outputs: int
    """Number of outputs of the forward pass, without the tensors kept for backward."""
    options: dict[str, Any]
    """Options of the partitioner."""
    traced: int
    """Number of rows in the trace."""

    def part(self, policy: str, rows: int) -> Part:
        """Return the layer's figures under an activation checkpointing policy.

        `rows` may be any number but 1 if the layer was traced with `rows_to_trace` rows; else it must be the trace's.
        """
        counted = _Bytes(self.traced, rows)
        if policy == "selective":
            return counted.part(*self._selective, self.outputs)
        forward, backward = self._whole
        whole = counted.part(forward, backward, self.outputs)
        if policy == "none":
            return whole
        # The whole graph is recomputed, while the gradient of its output exists, which is as large as its input.
        size = sum(counted.storages(next(iter(forward.graph.nodes))).values())
        again = max(whole.forward + size, whole.kept + whole.backward)
        host = size if policy == "offload" else 0
        launches = whole.launches + _launches(forward) + (1 if host else 0)
        return replace(
            whole, kept=size, forward=whole.forward + host, backward=again - size, host=host, launches=launches
        )

    @cached_property
    def _whole(self) -> tuple[fx.GraphModule, fx.GraphModule]:
        return self._divided(selectively=False)

    @cached_property
    def _selective(self) -> tuple[fx.GraphModule, fx.GraphModule]:
        return self._divided(selectively=True)

    def _divided(self, selectively: bool) -> tuple[fx.GraphModule, fx.GraphModule]:
        """Return the graphs of the two passes. No code is generated, because they are only counted and never run."""
        with _use_lazy_graph_module(True):
            module = _copy(self.module)
            if selectively:
                _mark(module)
            return min_cut_rematerialization_partition(
                module, self.inputs, compiler="inductor", num_fwd_outputs=self.outputs, **self.options
            )


def _copy(module: fx.GraphModule) -> fx.GraphModule:
    """Return a copy of a graph module, because the partitioner modifies its input."""
    graph = fx.Graph()
    known = {}
    for node in module.graph.nodes:
        known[node] = graph.node_copy(node, known.__getitem__)
    return _make_graph_module(module, graph)


def _mark(module: fx.GraphModule) -> None:
    """Mark each operation of the forward pass as saved or recomputed, as torch does under selective checkpointing."""
    for node in module.graph.nodes:
        if node.op != "call_function" or node.meta.get("partitioner_tag") == "is_backward":
            continue
        if node.target is operator.getitem:  # one output of its argument, an operation
            kept = node.args[0].meta["recompute"] is CheckpointPolicy.MUST_SAVE
        else:
            kept = node.target is OPERATOR or selective.keeps(node.target, [_value(one) for one in node.args])
        node.meta["recompute"] = CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE
        node.meta["ac_graph_id"] = 1


def _value(argument: Any) -> Any:
    return argument.meta["val"] if isinstance(argument, fx.Node) else argument


@dataclass(frozen=True)
class _Bytes:
    """Bytes of tensors in graphs traced with `traced` rows, scaled to `rows` rows."""

    traced: int
    rows: int

    def part(self, forward: fx.GraphModule, backward: fx.GraphModule, outputs: int) -> Part:
        """Return the figures of a layer with these graphs."""
        x, *others = (node for node in forward.graph.nodes if node.op == "placeholder")
        elsewhere = {key for node in others for key in self.storages(node)}
        handed_over = [node for node in forward.graph.output_node().args[0][outputs:] if isinstance(node, fx.Node)]
        kept = sum(self._counted(handed_over, elsewhere).values())
        given = [node for node in backward.graph.nodes if node.op == "placeholder"]
        _, *gradients = backward.graph.output_node().args[0]  # the first is the input's
        of_weights = self._counted([one for one in gradients if one is not None], elsewhere)
        return Part(
            kept=kept,
            casts=0,
            forward=self._most(forward, [x], elsewhere),
            backward=self._most(backward, given, elsewhere) - kept,
            gradients=sum(of_weights.values()),
            launches=_launches(forward) + _launches(backward),
        )

    def storages(self, node: fx.Node) -> dict[int, int]:
        """Return the bytes of each storage that an operation returns, by storage."""
        values, _ = tree_flatten(node.meta.get("val"))
        own = (x.untyped_storage() for x in values if isinstance(x, Tensor))
        return {storage._cdata: self._of(storage.nbytes()) for storage in own}

    def _of(self, size: int) -> int:
        return size // self.traced * self.rows if size % self.traced == 0 else size

    def _counted(self, nodes: list[fx.Node], elsewhere: set[int]) -> dict[int, int]:
        """Return the bytes by storage of these nodes, without storages counted elsewhere."""
        found = {key: size for node in nodes for key, size in self.storages(node).items()}
        return {key: size for key, size in found.items() if key not in elsewhere}

    def _most(self, module: fx.GraphModule, given: list[fx.Node], elsewhere: set[int]) -> int:
        """Return the peak bytes when the operations run one by one.

        A storage lives from the operation that makes it to the last one that reads it; outputs live to the end.
        """
        nodes = list(module.graph.nodes)
        last = {
            key: place
            for place, node in enumerate(nodes)
            for one in (node, *node.all_input_nodes)
            for key in self.storages(one)
        }
        ending: dict[int, list[int]] = {}
        for key, place in last.items():
            ending.setdefault(place, []).append(key)
        alive = self._counted(given, elsewhere)
        now = most = sum(alive.values())
        for place, node in enumerate(nodes):
            if node.op == "call_function":
                made = {key: size for key, size in self._counted([node], elsewhere).items() if key not in alive}
                alive |= made
                now += sum(made.values())
                most = max(most, now)
            now -= sum(alive.pop(key, 0) for key in ending.get(place, ()))
        return most


def _launches(module: fx.GraphModule) -> int:
    """Return the number of operations that launch a kernel."""
    called = (node.target for node in module.graph.nodes if node.op == "call_function")
    return sum(computes(target) for target in called if isinstance(target, torch._ops.OpOverload))
