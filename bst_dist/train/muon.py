"""Muon for the matrices inside the layers, AdamW for all the rest, in one optimizer that ZeRO steps on flat shares.

Of a matrix W with gradient G (Jordan, https://kellerjordan.github.io/posts/muon/; the size of a step is that of Liu et
al., "Muon is Scalable for LLM Training", arXiv 2502.16982, section 2.2):

    M <- mu M + (1 - mu) G,   D = (1 - mu) G + mu M,   W <- (1 - eta lambda) W - eta 0.2 sqrt(max(rows, columns)) O(D)

where O(D) has D's singular vectors and singular values near 1. An orthogonal matrix has entries of root mean square
1 / sqrt(max(rows, columns)), so those of an update are 0.2 eta, about as large as AdamW's: rates keep their meaning. A
weight that holds several maps is treated map by map (`model.roles.Stack`).

DeepSpeed calls `step` once the gradients are reduced, their norm is known and they are clipped, on the part of each
group that this rank updates: a flat tensor with runs of many matrices. The momentum is as long, and lies as Adam's
first moment does, so checkpoints treat it as one. A matrix that lies on one rank is orthogonalised there; those that
lie on several are put together on one (`parallel.matrices`), in two exchanges for all of a group.
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
from bst_dist.parallel.matrices.exchange import Exchange
from bst_dist.parallel.matrices.orthogonal import flops, orthogonalised
from bst_dist.parallel.matrices.owners import Matrix

SIZE = 0.2
"""Root mean square of an update, at a rate of 1."""
MOMENTUM = "momentum"
"""Key of the groups that Muon updates."""


class Muon(torch.optim.AdamW):
    """AdamW, but for the groups that have a momentum."""

    def __init__(self, groups: Iterable[dict[str, Any]], stacks: Mapping[nn.Parameter, Stack], **defaults: Any) -> None:
        """`stacks`: the maps in each parameter of those groups; `defaults`: AdamW's."""
        super().__init__(groups, **defaults)
        self._stacks = dict(stacks)
        self._shares: dict[Tensor, _Share] = {}
        for group in self.param_groups:
            for parameter in group["params"] if MOMENTUM in group else ():
                self._shares[parameter] = _Share.whole(parameter, self._stacks[parameter])

    def place(self, placed: Iterable[Placed], rank: int, all_to_all: Callable[..., Any]) -> None:
        """Work on flat tensors from now on, in which the parameters lie as is said, in the same order on every rank;
        none: on the parameters as before. States are made. `all_to_all`: see `Exchange`."""
        by_tensor: dict[Tensor, list[Placed]] = {}
        for one in placed:
            if one.parameter in self._stacks:
                by_tensor.setdefault(one.tensor, []).append(one)
        if by_tensor:
            self._shares = {tensor: _Share.of(members, self._stacks, rank, all_to_all)
                            for tensor, members in by_tensor.items()}  # fmt: skip
        for tensor in self._shares:
            self._state_of(tensor)

    def _state_of(self, tensor: Tensor) -> dict[str, Tensor]:
        state = self.state[tensor]
        if not state:
            state |= {"step": torch.tensor(0.0, device=tensor.device), "exp_avg": torch.zeros_like(tensor)}
        return state

    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """One update of all groups that are there; under ZeRO those of one."""
        groups = self.param_groups
        self.param_groups = [group for group in groups if MOMENTUM not in group]
        try:
            loss = super().step(closure)
        finally:
            self.param_groups = groups
        with torch.no_grad():
            for group in groups:
                for tensor in group["params"] if MOMENTUM in group else ():
                    if tensor.grad is not None:
                        self._update(tensor, group)
        return loss

    def _update(self, tensor: Tensor, group: Mapping[str, Any]) -> None:
        state, momentum = self._state_of(tensor), group[MOMENTUM]
        state["step"] += 1
        state["exp_avg"].lerp_(tensor.grad, 1 - momentum)
        direction = tensor.grad.lerp_(state["exp_avg"], momentum)  # in the gradient's place: nothing reads it after
        tensor.mul_(1 - group["lr"] * group["weight_decay"])
        self._shares[tensor].subtract(tensor.view(-1), direction.view(-1), group["lr"])


@dataclass(frozen=True)
class _Run:
    """What a rank holds of one matrix, in the tensor that it updates."""

    offset: int
    count: int

    def of(self, flat: Tensor) -> Tensor:
        return flat[self.offset : self.offset + self.count]


@dataclass(frozen=True)
class _Share:
    """The matrices of one tensor, over all ranks."""

    shapes: Sequence[tuple[int, ...]]
    stacks: Sequence[Stack]
    exchange: Exchange
    runs: Mapping[int, _Run]
    """By matrix; those that lie on other ranks alone have none."""

    @classmethod
    def whole(cls, parameter: nn.Parameter, stack: Stack) -> _Share:
        """A parameter that every rank updates by itself."""
        matrix = Matrix({0: (0, parameter.numel())}, 0.0)
        return cls([tuple(parameter.shape)], [stack], Exchange([matrix], 0), {0: _Run(0, parameter.numel())})

    @classmethod
    def of(cls, members: Sequence[Placed], stacks: Mapping[nn.Parameter, Stack], rank: int,
           all_to_all: Callable[..., Any]) -> _Share:  # fmt: skip
        """Parameters of which each rank updates some runs."""
        own = [stacks[member.parameter] for member in members]
        shapes = [member.division.shape for member in members]
        work = [sum(flops(*map_) for map_ in stack.shapes(shape)) for stack, shape in zip(own, shapes, strict=True)]
        matrices = []
        for member, cost in zip(members, work, strict=True):
            division = member.division
            runs = {holder: division.run(holder) for holder in division.holders(0, division.numel)}
            matrices.append(Matrix({holder: run for holder, run in runs.items() if run[1]}, cost))
        places = enumerate(zip(members, matrices, strict=True))
        runs = {place: _Run(member.offset, matrix.runs[rank][1]) for place, (member, matrix) in places
                if rank in matrix.runs}  # fmt: skip
        return cls(shapes, own, Exchange(matrices, rank, all_to_all), runs)

    def subtract(self, weights: Tensor, direction: Tensor, rate: float) -> None:
        """Take the orthogonalised `direction` off the weights, both (elements,), at this rate; all ranks call it."""
        like = direction.new_empty(0, dtype=torch.float32 if direction.device.type == "cpu" else torch.bfloat16)
        exchange, cut = self.exchange, {}
        if exchange.any:
            cut = {place: run.of(direction) for place, run in self.runs.items() if exchange.is_cut(place)}
            finish = exchange.gather(cut, like)
        for place, run in self.runs.items():  # while the others are on their way
            if place not in cut:
                run.of(weights).sub_(self._orthogonal(place, run.of(direction).to(like.dtype)), alpha=rate)
        if exchange.any:
            made = exchange.scatter({place: self._orthogonal(place, flat) for place, flat in finish().items()}, like)
            for place, part in made.items():
                self.runs[place].of(weights).sub_(part, alpha=rate)

    def _orthogonal(self, place: int, flat: Tensor) -> Tensor:
        """Of a whole matrix (elements,): each of its maps orthogonalised, and scaled to the size of an update."""
        result = torch.empty_like(flat)
        stack, shape = self.stacks[place], self.shapes[place]
        for given, into in zip(stack.maps(flat.view(shape)), stack.maps(result.view(shape)), strict=True):
            torch.mul(orthogonalised(given), SIZE * math.sqrt(max(given.shape)), out=into)
        return result
