"""Sequences of any length: exact gradients slice by slice, in the memory of one slice.

A sequence is a series of slices. All that a slice needs of the tokens before it is its *edge*: for each layer the state
of its SSM, one window of keys and values, MF's last block ends (see `past`). An edge is small and does not grow with
the sequence, so a sequence of any length trains in the memory of one slice and the edges:

    forward    for s = 0 ... n-2, without a graph:
                   edge[s+1] = what slice s leaves, given edge[s]
    backward   for s = n-1 ... 0:
                   e = edge[s], as leaves that require gradients
                   loss, left = slice s, run again on e, with a graph
                   backward from the loss, and from left with the gradient g[s+1] that slice s+1 computed for it
                   g[s] = e.grad

This is the chain rule, cut at the edges. Parameters accumulate the gradient that one pass over the whole sequence would
give, and only one slice has a graph at any time. The cost is a second forward pass, as with activation checkpointing of
every layer. With about one more forward pass, only every k-th edge is kept: the slices between two kept edges are run
again, for their edges, when the backward pass reaches them (`Spacing`).

Shapes: B rows, n slices of any lengths l_s; an edge holds tensors with the batch as first dimension (`past.State`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, Protocol

import torch
from torch import Tensor

from bst_dist.parallel.sequence.past import EarlierCall, State


class Edge(EarlierCall):
    """The past of a slice whose gradient flows on to the slice before. Held tensors are leaves; what is left keeps its
    graph.

    Args:
        before: what the slice before left.
        position: tokens of the stream before this slice.
        wanted: whether `before` needs a gradient; not if an earlier step left it.
    """

    differentiable = True

    def __init__(self, before: State, position: int, wanted: bool = True):
        # Integers (where documents begin) are passed on, and have no gradient.
        leaves = {
            name: x.detach().requires_grad_(wanted and (x.is_floating_point() or x.is_complex()))
            for name, x in before.items()
        }
        super().__init__(leaves, position)
        self.after: _Left = _Left()

    def leave(self, name: str, value: Tensor) -> None:
        self.after[self._prefix + name] = value

    def take(self) -> State:
        """Return what the slice has left, with its graph, and ignore what is left later. Otherwise layers that are
        recomputed in the backward pass would leave a second graph that nothing frees."""
        left = dict(self.after)
        self.after.clear()
        self.after.sealed = True
        return left

    def gradients(self) -> State:
        """Return the gradients, after the backward pass, of all held tensors that were used."""
        return {name: x.grad for name, x in self.before.items() if x.grad is not None}


class _Left(dict):
    """What a slice leaves; the pasts of all its layers share it. Ignores new items once it is `sealed`."""

    sealed = False

    def __setitem__(self, name: str, value: Tensor) -> None:
        if not self.sealed:
            super().__setitem__(name, value)


class Edges(Protocol):
    """A stack that keeps edges between the passes; they are read in the opposite order."""

    def push(self, edge: State) -> None:
        """Keep an edge."""

    def pop(self) -> State:
        """Return the edge that was kept last, on the device it came from."""


class EdgesHere(list[State]):
    """A stack of edges that stay on the device."""

    push = list.append


class SlicedSequence(Protocol):
    """Runs the slices of one micro-batch of sequences; `s` is the index of a slice, from 0."""

    lengths: Sequence[int]
    """Tokens of each slice, over all ranks that share it."""

    def needs_no_edge(self, s: int) -> bool:
        """Whether every row of slice `s` begins with a new document, so that no edge is needed."""

    def run_for_edge(self, s: int, past: EarlierCall) -> None:
        """Run the layers on slice `s` without gradients, only for what it leaves in `past.after`."""

    def loss(self, s: int, past: EarlierCall | None) -> Tensor:
        """Return the loss of slice `s`, a scalar with its graph. `past` is None if it is the only slice."""

    def backward(self, s: int, loss: Tensor) -> None:
        """Run the backward pass from `loss`, adding to the gradients of the parameters."""


@dataclass(frozen=True)
class Spacing:
    """Which edges of a sequence are kept between the passes, and the cost when no slice begins a document."""

    slices: int
    every: int = 1
    """k: the edges before the slices 0, k, 2k, ... are kept from the forward to the backward pass."""

    def groups(self) -> list[range]:
        """Return the groups of slices between one kept edge and the next."""
        return [range(s, min(s + self.every, self.slices)) for s in range(0, self.slices, self.every)]

    @property
    def passes(self) -> int:
        """Number of slices run without a graph: first all groups except the last, then each group without its last
        slice."""
        *before, last = map(len, self.groups())
        return sum(before) + sum(length - 1 for length in (*before, last))

    @property
    def waiting(self) -> int:
        """Maximum number of edges kept between the passes; the first slice has none."""
        return len(self.groups()) - 1

    @property
    def between(self) -> int:
        """Number of further edges on the device when the backward pass is at the last slice of a group."""
        return max(map(len, self.groups())) - 1


def go_backward(sequence: SlicedSequence, edges: Edges, carried: EarlierCall | None = None, every: int = 1) -> State:
    """Accumulate the gradients of the summed loss of all slices, as one pass over the whole sequence would.

    Args:
        sequence: runs the slices.
        edges: keeps the edges between the passes; empty before and after.
        carried: the past of the sequence from an earlier step: values without gradients.
        every: k. Every k-th edge is kept in `edges`; those between are on the device while they are needed.

    Returns:
        What the last slice leaves for a later step, without gradient; empty if `carried` is None.
    """
    count = len(sequence.lengths)
    if count == 1:
        sequence.backward(0, sequence.loss(0, carried))
        return carried.after if carried else {}
    positions = list(accumulate(sequence.lengths, initial=carried.position if carried else 0))
    groups = Spacing(count, every).groups()
    edge = carried.before if carried else {}
    for group in groups[:-1]:
        edges.push(edge)
        edge = _edge_after(sequence, positions, group, edge)
    gradients: State = {}
    last: State = {}
    for group in reversed(groups):
        if group.stop < count:
            edge = edges.pop()
        between = [edge]
        for s in group[:-1]:
            between.append(_leave(sequence, positions, [s], between[-1]))
        for s in reversed(group):
            past = Edge(between.pop(), positions[s], wanted=s > 0)
            loss = sequence.loss(s, past)
            left = past.take()
            if carried and s == count - 1:
                last = {name: x.detach() for name, x in left.items()}
            asked = [name for name in gradients if name in left]
            received = [gradients[name] for name in asked]
            sequence.backward(s, _Received.apply(loss, received, *(left[name] for name in asked)))
            gradients = past.gradients()
    return last


def _leave(sequence: SlicedSequence, positions: Sequence[int], slices: Sequence[int], edge: State) -> State:
    """Run consecutive slices without a graph, from the edge before the first. Return the edge after the last."""
    for s in slices:
        past = EarlierCall(edge, positions[s])
        if not sequence.needs_no_edge(s + 1):
            with torch.no_grad():
                sequence.run_for_edge(s, past)
        edge = past.after
    return edge


def _edge_after(sequence: SlicedSequence, positions: Sequence[int], group: range, edge: State) -> State:
    """Return the edge after a group, given the edge before it. Slices before one that needs no edge are not run."""
    fresh = [s for s in range(group.start, group.stop + 1) if sequence.needs_no_edge(s)]
    begin, edge = (fresh[-1], {}) if fresh else (group.start, edge)
    return _leave(sequence, positions, range(begin, group.stop), edge)


class _Received(torch.autograd.Function):
    """The identity on `loss`. Its backward pass gives `left` the gradients `received` from the next slice.

    The output is a scalar, because an engine starts its backward pass from one. A factor that the engine applies to the
    loss (a loss scale) is already in the received gradients.
    """

    @staticmethod
    def forward(ctx: Any, loss: Tensor, received: list[Tensor], *left: Tensor) -> Tensor:
        ctx.received = received
        return loss.view_as(loss)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple:
        return gradient, None, *ctx.received
