"""Muon for the matrices inside the layers and AdamW for the rest, in one optimizer that works on ZeRO's flat shards.

The update of a matrix W with gradient G (Jordan, https://kellerjordan.github.io/posts/muon/; step size of Liu et al.,
"Muon is Scalable for LLM Training", arXiv 2502.16982, section 2.2):

    M <- mu M + (1 - mu) G,   D = (1 - mu) G + mu M,   W <- (1 - eta lambda) W - eta 0.2 sqrt(max(rows, columns)) O(D)

where O(D) has D's singular vectors, and singular values near 1. The entries of an orthogonal matrix have root mean
square 1 / sqrt(max(rows, columns)), so those of an update have 0.2 eta. AdamW's updates are about as large, so the same
learning rates apply. A weight that holds several maps is orthogonalised map by map (`model.roles.Stack`).

DeepSpeed calls `step` after the gradients are reduced and clipped. It passes the part of each group that this rank
updates: a flat tensor with runs of many matrices. The momentum has the same shape and the same key as Adam's first
moment, so checkpoints treat both in the same way. A matrix that one rank holds entirely is orthogonalised there.
Matrices that are split over ranks are each collected on one (`parallel.matrices`), in two exchanges for all matrices
of a group.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from bst_dist.checkpoint.fragments import Placed
from bst_dist.model.roles import Stack
from bst_dist.parallel.matrices.exchange import MatrixExchange
from bst_dist.parallel.matrices.orthogonal import flops, orthogonalised
from bst_dist.parallel.matrices.owners import Matrix

SIZE = 0.2
"""Root mean square of an update at a learning rate of 1."""
MOMENTUM = "momentum"
"""Hyperparameter of the groups that Muon updates; AdamW's groups do not have it."""


class Muon(torch.optim.AdamW):
    """AdamW, with Muon for the parameter groups that have a MOMENTUM."""

    def __init__(self, groups: Iterable[dict[str, Any]], stacks: Mapping[nn.Parameter, Stack], **defaults: Any) -> None:
        """`stacks`: the maps in each parameter of Muon's groups; `defaults`: of AdamW."""
        super().__init__(groups, **defaults)
        self._stacks = dict(stacks)
        self._shares: dict[Tensor, _Share] = {}
        for group in filter(_is_muon_s, self.param_groups):
            for parameter in group["params"]:
                self._shares[parameter] = _Share.whole(parameter, self._stacks[parameter])

    def place(self, placed: Iterable[Placed], rank: int, all_to_all: Callable[..., Any]) -> None:
        """Update flat tensors from now on, and allocate their states.

        `placed`: the place of each parameter in them, in the same order on every rank. If it is empty, the parameters
        themselves are updated, as before. `all_to_all`: see `MatrixExchange`.
        """
        by_tensor: dict[Tensor, list[Placed]] = {}
        for member in placed:
            if member.parameter in self._stacks:
                by_tensor.setdefault(member.tensor, []).append(member)
        if by_tensor:
            self._shares = {
                tensor: _Share.of(members, self._stacks, rank, all_to_all) for tensor, members in by_tensor.items()
            }
        for tensor in self._shares:
            self._state_of(tensor)

    def _state_of(self, tensor: Tensor) -> dict[str, Tensor]:
        state = self.state[tensor]
        if not state:
            state |= {"step": torch.tensor(0.0, device=tensor.device), "exp_avg": torch.zeros_like(tensor)}
        return state

    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Update the parameter groups once; ZeRO calls this with one group at a time."""
        groups = self.param_groups
        self.param_groups = [group for group in groups if not _is_muon_s(group)]
        try:
            loss = super().step(closure)
        finally:
            self.param_groups = groups
        with torch.no_grad():
            for group in filter(_is_muon_s, groups):
                for tensor in group["params"]:
                    if tensor.grad is not None:
                        self._update(tensor, group)
        return loss

    def _update(self, tensor: Tensor, group: Mapping[str, Any]) -> None:
        state = self._state_of(tensor)
        momentum = group[MOMENTUM]
        state["step"] += 1
        state["exp_avg"].lerp_(tensor.grad, 1 - momentum)
        direction = tensor.grad.lerp_(state["exp_avg"], momentum)  # in place: nothing reads the gradient afterwards
        tensor.mul_(1 - group["lr"] * group["weight_decay"])
        self._shares[tensor].subtract(tensor.view(-1), direction.view(-1), group["lr"])


def _is_muon_s(group: Mapping[str, Any]) -> bool:
    """Whether Muon updates a parameter group; AdamW updates the others."""
    return MOMENTUM in group


@dataclass(frozen=True)
class _Run:
    """The elements of one matrix that a rank holds, as a range of the flat tensor that it updates."""

    offset: int
    count: int

    def of(self, flat: Tensor) -> Tensor:
        return flat[self.offset : self.offset + self.count]


@dataclass(frozen=True)
class _Share:
    """The matrices in one flat tensor, over all ranks."""

    shapes: Sequence[tuple[int, ...]]
    stacks: Sequence[Stack]
    exchange: MatrixExchange
    runs: Mapping[int, _Run]
    """This rank's run of each matrix, by the matrix's number; matrices that only other ranks hold are missing."""

    @classmethod
    def whole(cls, parameter: nn.Parameter, stack: Stack) -> _Share:
        """Return the share of one parameter that every rank updates alone."""
        matrix = Matrix({0: (0, parameter.numel())}, 0.0)
        return cls([tuple(parameter.shape)], [stack], MatrixExchange([matrix], 0), {0: _Run(0, parameter.numel())})

    @classmethod
    def of(
        cls, members: Sequence[Placed], stacks: Mapping[nn.Parameter, Stack], rank: int, all_to_all: Callable[..., Any]
    ) -> _Share:
        """Return the share of parameters of which each rank updates some runs."""
        own_stacks = [stacks[member.parameter] for member in members]
        shapes = [member.division.shape for member in members]
        work = [
            sum(flops(*map_) for map_ in stack.shapes(shape)) for stack, shape in zip(own_stacks, shapes, strict=True)
        ]
        matrices = []
        for member, cost in zip(members, work, strict=True):
            division = member.division
            runs = {holder: division.run(holder) for holder in division.holders(0, division.numel)}
            matrices.append(Matrix({holder: run for holder, run in runs.items() if run[1]}, cost))
        places = enumerate(zip(members, matrices, strict=True))
        runs = {
            place: _Run(member.offset, matrix.runs[rank][1])
            for place, (member, matrix) in places
            if rank in matrix.runs
        }
        return cls(shapes, own_stacks, MatrixExchange(matrices, rank, all_to_all), runs)

    def subtract(self, weights: Tensor, direction: Tensor, rate: float) -> None:
        """Subtract `rate` times the orthogonalised `direction` from `weights`, both (elements,); all ranks call it."""
        like = direction.new_empty(0, dtype=torch.float32 if direction.device.type == "cpu" else torch.bfloat16)
        exchange, cut = self.exchange, {}
        if exchange.any:
            cut = {place: run.of(direction) for place, run in self.runs.items() if exchange.is_cut(place)}
            finish = exchange.gather(cut, like)
        for place, run in self.runs.items():  # overlaps with the exchange
            if place not in cut:
                run.of(weights).sub_(self._orthogonal(place, run.of(direction).to(like.dtype)), alpha=rate)
        if exchange.any:
            made = exchange.scatter({place: self._orthogonal(place, flat) for place, flat in finish().items()}, like)
            for place, part in made.items():
                self.runs[place].of(weights).sub_(part, alpha=rate)

    def _orthogonal(self, place: int, flat: Tensor) -> Tensor:
        """Orthogonalise each map of a whole matrix (elements,), and scale it to the size of an update."""
        result = torch.empty_like(flat)
        stack, shape = self.stacks[place], self.shapes[place]
        for given, into in zip(stack.maps(flat.view(shape)), stack.maps(result.view(shape)), strict=True):
            torch.mul(orthogonalised(given), SIZE * math.sqrt(max(given.shape)), out=into)
        return result
