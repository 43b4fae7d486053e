"""Sequences without end: exact gradients slice by slice, in the memory of one slice.

A sequence is a run of slices. All that a slice needs of the tokens before it is its *edge*: what the contract for the
past carries, for each layer the state of its SSM, one window of keys and values, MF's last block ends. An edge is
small and does not grow with the sequence, so a sequence of any length trains in the memory of one slice and the edges:

    forward    for s = 0 ... n-2, without a graph:
                   edge[s+1] = what slice s leaves, given edge[s]
    backward   for s = n-1 ... 0:
                   e = edge[s], as leaves that want gradients
                   loss, left = slice s, run again on e, with a graph
                   go backward from the loss, and from left with the gradient g[s+1] that slice s+1 found for it
                   g[s] = e.grad

The chain rule, cut at the edges: parameters collect from every slice what one pass over the whole sequence would give
them, and no more than one slice has a graph at any time. The price is a second forward pass, as with a checkpoint
after every layer. For about one more only every k-th edge waits: the slices between two of them are run once more, for
their own edges, when the backward pass comes to them (`Spacing`).

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
    """The past of a slice whose gradient continues to the slice before: what is held are leaves, what is left keeps its
    graph.

    Args:
        before: what the slice before left.
        position: tokens of the stream before this slice.
        wanted: whether anybody wants the gradient of `before`; nobody does of what an earlier step left.
    """

    differentiable = True

    def __init__(self, before: State, position: int, wanted: bool = True):
        # Integers (where documents begin) are handed on, and have no gradient.
        leaves = {
            name: x.detach().requires_grad_(wanted and (x.is_floating_point() or x.is_complex()))
            for name, x in before.items()
        }
        super().__init__(leaves, position)
        self.after: _Left = _Left()

    def leave(self, name: str, value: Tensor) -> None:
        self.after[self._prefix + name] = value

    def take(self) -> State:
        """What the slice has left, with its graph. From now on nothing is left any more: layers that activation
        checkpointing runs again in the backward pass would leave a second graph that nobody frees."""
        left = dict(self.after)
        self.after.clear()
        self.after.sealed = True
        return left

    def gradients(self) -> State:
        """After the backward pass, of everything that was held and used."""
        return {name: x.grad for name, x in self.before.items() if x.grad is not None}


class _Left(dict):
    """What a slice leaves, shared by the pasts of all its layers."""

    sealed = False

    def __setitem__(self, name: str, value: Tensor) -> None:
        if not self.sealed:
            super().__setitem__(name, value)


class Edges(Protocol):
    """Where edges wait between the passes. They come back in the opposite order: a stack."""

    def push(self, edge: State) -> None:
        """Keep an edge."""

    def pop(self) -> State:
        """The edge that was kept last, on the device it came from."""


class EdgesHere(list[State]):
    """Edges that stay on the device."""

    push = list.append


class SlicedSequence(Protocol):
    """The sequences of one micro-batch, as their slices are run; `s` counts them from 0."""

    lengths: Sequence[int]
    """Tokens of each slice, over all ranks that share it."""

    def fresh(self, s: int) -> bool:
        """Whether every row of slice `s` begins a document that sees nothing before it, so that no edge is needed."""

    def leave(self, s: int, past: EarlierCall) -> None:
        """Run the layers on slice `s` for what it leaves in `past.after`; no gradient is asked for."""

    def loss(self, s: int, past: EarlierCall | None) -> Tensor:
        """The loss of slice `s`, a scalar with its graph; `past` is None where nothing is before it or after it."""

    def backward(self, s: int, loss: Tensor) -> None:
        """Go backward from `loss`, adding to the gradients of the parameters."""


@dataclass(frozen=True)
class Spacing:
    """Which edges of a sequence wait, and what that takes where no slice begins a document."""

    slices: int
    every: int = 1
    """k: the edges before the slices 0, k, 2k, ... wait from one pass to the other."""

    def groups(self) -> list[range]:
        """The slices between one edge that waits and the next."""
        return [range(s, min(s + self.every, self.slices)) for s in range(0, self.slices, self.every)]

    @property
    def passes(self) -> int:
        """Slices that are run without a graph: all groups but the last as a whole, then all slices of each but its
        last."""
        *before, last = map(len, self.groups())
        return sum(before) + sum(length - 1 for length in (*before, last))

    @property
    def waiting(self) -> int:
        """Edges that wait between the passes at most; the first slice has none before it."""
        return len(self.groups()) - 1

    @property
    def between(self) -> int:
        """Edges that are on the device beside those, when the backward pass is at a group's last slice."""
        return max(map(len, self.groups())) - 1


def go_backward(sequence: SlicedSequence, edges: Edges, carried: EarlierCall | None = None, every: int = 1) -> State:
    """Add the gradients of the summed loss of all slices, as one pass over the whole sequence would.

    Args:
        sequence: runs the slices.
        edges: keeps the edges between the passes; empty, and empty again afterwards.
        carried: what came before the sequence in an earlier step: values, to which no gradient goes.
        every: k, to keep every k-th edge in `edges`, and those between on the device while they are needed.

    Returns:
        What the last slice leaves for a later step, without gradient; nothing where nothing is carried.
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
            loss, left = sequence.loss(s, past), past.take()
            if carried and s == count - 1:
                last = {name: x.detach() for name, x in left.items()}
            asked = [name for name in gradients if name in left]
            received = [gradients[name] for name in asked]
            sequence.backward(s, _Received.apply(loss, received, *(left[name] for name in asked)))
            gradients = past.gradients()
    return last


def _leave(sequence: SlicedSequence, positions: Sequence[int], slices: Sequence[int], edge: State) -> State:
    """Run slices that follow each other without a graph, from the edge before the first; the edge after the last."""
    for s in slices:
        past = EarlierCall(edge, positions[s])
        if not sequence.fresh(s + 1):
            with torch.no_grad():
                sequence.leave(s, past)
        edge = past.after
    return edge


def _edge_after(sequence: SlicedSequence, positions: Sequence[int], group: range, edge: State) -> State:
    """The edge after a group, given the one before it: what comes before a slice that needs no edge is not run."""
    fresh = [s for s in range(group.start, group.stop + 1) if sequence.fresh(s)]
    begin, edge = (fresh[-1], {}) if fresh else (group.start, edge)
    return _leave(sequence, positions, range(begin, group.stop), edge)


class _Received(torch.autograd.Function):
    """`loss` as it is; backward, what the slice left gets the gradient that the next slice has `received` for it.

    A scalar, because an engine goes backward from one. Whatever factor it puts before the loss (a loss scale) is in
    the received gradients already.
    """

    @staticmethod
    def forward(ctx: Any, loss: Tensor, received: list[Tensor], *left: Tensor) -> Tensor:
        ctx.received = received
        return loss.view_as(loss)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple:
        return gradient, None, *ctx.received
