"""Locates the weights and optimizer states of each parameter in a DeepSpeed engine, for every ZeRO stage.

Stage 0 keeps everything on every rank. Stages 1 and 2 concatenate the parameters of a group. Each rank's optimizer
updates an equal part of the result in single precision, and the other ranks receive the new values. Stage 3 gives each
rank an equal part of every parameter. In every stage a rank holds one contiguous run of a parameter's elements, so
checkpoints of all stages are written and read in the same way: by parameter name and element.

Only this file reads and writes the tensors inside DeepSpeed's ZeRO optimizers. `train/engine.py` changes two of their
settings: which optimizers ZeRO accepts, and the type in which stage 3 gathers parameters.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, distributed, nn

from bst_dist.checkpoint.directory import AVERAGE, MOMENTS, TENSORS, WEIGHT, CheckpointError
from bst_dist.checkpoint.index import Division, equal_part
from bst_dist.checkpoint.shards import Piece


@dataclass(frozen=True)
class Fragment:
    """This rank's elements of one parameter."""

    piece: Piece
    values: dict[str, Tensor]
    """WEIGHT, and the MOMENTS that the optimizer keeps -> (count,) views of the memory that the optimizer updates;
    AVERAGE -> the average, if any."""

    def elements(self, kinds: Sequence[str]) -> int:
        """Return the number of elements in all tensors of these kinds."""
        return self.piece.count * sum(name in self.values for kind in kinds for name in TENSORS[kind])

    def part(self, rank: int, ranks: int) -> Fragment:
        """Return the part that `rank` writes when all `ranks` hold the fragment; the last may be small or empty."""
        first, count = equal_part(self.piece.count, rank, ranks)
        piece = Piece(self.piece.name, self.piece.shape, self.piece.begin + first, count)
        return Fragment(piece, {kind: tensor[first : first + count] for kind, tensor in self.values.items()})


class EngineState:
    """The weights and optimizer states of a DeepSpeed engine, and the average of the weights if there is one.

    A rank averages the elements that it updates, in single precision: under ZeRO, its shard.
    """

    def __init__(self, engine: Any, averaged: bool = False) -> None:
        """`averaged`: keep an average, which starts as the current weights. Raises CheckpointError when the optimizer
        states are on NVMe (ZeRO-Infinity), and RuntimeError when the model has persistent buffers."""
        self.engine, self.stage = engine, int(engine.zero_optimization_stage())
        self._names = {id(parameter): name for name, parameter in engine.module.named_parameters()}
        if engine.zero_nvme_offload_optimizer():
            raise CheckpointError(
                "optimizer states on NVMe cannot be saved: "
                "set zero_optimization.offload_optimizer.device to cpu or leave it out"
            )
        if kept := set(engine.module.state_dict()) & set(dict(engine.module.named_buffers())):
            raise RuntimeError(f"buffers that are state are not written to checkpoints: {sorted(kept)}")
        self._averages: dict[str, Tensor] = {}
        if averaged:
            self._averages = {fragment.piece.name: fragment.values[WEIGHT].clone() for fragment in self.held()}

    def held(self) -> list[Fragment]:
        """Return all fragments on this rank; values written to them take effect when `filled` is called."""
        found = list((self._replicated, self._flat, self._flat, self._spread)[self.stage]())
        for fragment in found:
            if fragment.piece.name in self._averages:
                fragment.values[AVERAGE] = self._averages[fragment.piece.name]
        return found

    def owned(self) -> list[Fragment]:
        """Return the fragments that this rank writes; all ranks together write every element once."""
        if self.stage > 0:
            return self.held()
        rank, world = distributed.get_rank(), distributed.get_world_size()
        parts = (fragment.part(rank, world) for fragment in self.held())
        return [part for part in parts if part.piece.count]

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the shapes of all parameters, including those on other ranks; same order on every rank."""
        return {self._names[id(p)]: tuple(getattr(p, "ds_shape", p.shape)) for p in self.engine.module.parameters()}

    def moments(self) -> dict[str, int]:
        """Return the number of MOMENTS for each parameter that does not have all of them; the same on every rank."""
        zero = self.engine.optimizer
        if self.stage == 0:
            groups = [[parameter] for parameter in self.engine.module.parameters()]
        else:
            groups = zero.fp16_groups if self.stage == 3 else zero.bit16_groups
        counts = (sum(kind in _state(*updated) for kind in MOMENTS) for updated in self._updated())
        return {
            self._names[id(parameter)]: count
            for count, group in zip(counts, groups, strict=True)
            for parameter in group
            if count < len(MOMENTS)
        }

    def updates(self) -> int:
        """Return the number of updates that the optimizer has made, which its bias correction uses."""
        (count,) = {int(_state(optimizer, tensor)["step"]) for optimizer, tensor in self._updated()}
        return count

    def filled(self, step: int, updates: int) -> None:
        """Make the engine continue from the values just written to `held`, after `step` steps. All ranks call it."""
        for optimizer, tensor in self._updated():
            _state(optimizer, tensor)["step"] = _count(optimizer, tensor, updates)
        self.publish()
        engine = self.engine
        engine.global_steps, engine.skipped_steps = step, 0
        engine.global_samples = step * engine.train_batch_size()
        engine.micro_steps = step * engine.gradient_accumulation_steps()

    def publish(self) -> None:
        """Copy the weights just written to `held` to the model's parameters. All ranks call it."""
        zero = self.engine.optimizer
        if self.stage in (1, 2):
            zero.update_lp_params()
        elif self.stage == 3:
            zero.checkpoint_event_prologue()  # releases small parameters, which ZeRO-3 keeps gathered
            for group in range(len(zero.fp16_groups)):
                zero._reassign_or_swap_out_partitioned_parameters(group)
            zero.checkpoint_event_epilogue()  # gathers them again, with their new values

    def _updated(self) -> Iterator[tuple[Any, Tensor]]:
        """Yield each optimizer with each tensor that it updates."""
        zero = self.engine.optimizer
        if self.stage == 0:
            yield from ((zero, parameter) for parameter in self.engine.module.parameters())
        elif self.stage < 3:
            yield from ((zero.optimizer, flat) for flat in zero.single_partition_of_fp32_groups)
        else:
            yield from (
                (self._optimizer_of(group), flat) for group, flat in enumerate(zero.fp32_partitioned_groups_flat)
            )

    def _optimizer_of(self, group: int) -> Any:
        """Return the optimizer of a stage-3 group; with partial offload, groups on the device have a second one."""
        zero = self.engine.optimizer
        stays = zero.offload_optimizer and zero.subgroup_to_device[group] != "cpu"
        return zero.backup_optimizer if stays else zero.optimizer

    def _replicated(self) -> Iterator[Fragment]:
        for parameter in self.engine.module.parameters():
            piece = Piece(self._names[id(parameter)], tuple(parameter.shape), 0, parameter.numel())
            yield _fragment(piece, self.engine.optimizer, parameter, 0)

    def _flat(self) -> Iterator[Fragment]:
        zero = self.engine.optimizer
        for group, flat in zip(zero.bit16_groups, zero.single_partition_of_fp32_groups, strict=True):
            for parameter in group:
                if (mapping := parameter._hp_mapping) is not None:  # None: all of it lies on other ranks
                    begin, count = mapping.lp_fragment_address.start, mapping.lp_fragment_address.numel
                    piece = Piece(self._names[id(parameter)], tuple(parameter.shape), begin, count)
                    yield _fragment(piece, zero.optimizer, flat, mapping.hp_fragment_address.start)

    def _spread(self) -> Iterator[Fragment]:
        zero = self.engine.optimizer
        for parameter in (parameter for group in zero.fp16_groups for parameter in group):
            group, offset, size = zero.grad_position[zero.get_param_id(parameter)]
            begin = size * zero._get_param_partition_rank(parameter)
            count = min(size, parameter.ds_numel - begin)  # the rest is padding
            if count > 0:
                piece = Piece(self._names[id(parameter)], tuple(parameter.ds_shape), begin, count)
                flat = zero.fp32_partitioned_groups_flat[group]
                yield _fragment(piece, self._optimizer_of(group), flat, offset)


@dataclass(frozen=True)
class Placed:
    """Where one parameter lies in the flat tensors that the optimizers of all ranks update."""

    parameter: nn.Parameter
    division: Division
    tensor: Tensor
    """This rank's flat tensor."""
    offset: int
    """Where this rank's run of the parameter begins in `tensor`, if the rank has one."""


def placed(engine: Any) -> Iterator[Placed]:
    """Yield the place of every parameter under ZeRO-1, 2 or 3, including those on other ranks.

    The parameters and their order are the same on every rank.
    """
    zero, rank, ranks = engine.optimizer, distributed.get_rank(), distributed.get_world_size()
    if int(engine.zero_optimization_stage()) == 3:
        for parameter in (parameter for group in zero.fp16_groups for parameter in group):
            group, offset, _ = zero.grad_position[zero.get_param_id(parameter)]
            division = Division(tuple(parameter.ds_shape), ranks)
            yield Placed(parameter, division, zero.fp32_partitioned_groups_flat[group], offset)
        return
    flat = zip(
        zero.single_partition_of_fp32_groups, zero.round_robin_bit16_groups, zero.round_robin_bit16_offsets, strict=True
    )
    for tensor, group, offsets in flat:
        share = tensor.numel()
        for parameter, offset in zip(group, offsets, strict=True):
            end = offset + parameter.numel()
            first, last = offset // share, (end - 1) // share
            borders = (border * share - offset for border in range(first + 1, last + 1))
            division = Division(tuple(parameter.shape), ranks, first, (0, *borders, parameter.numel()))
            yield Placed(parameter, division, tensor, max(offset - rank * share, 0))


def _fragment(piece: Piece, optimizer: Any, tensor: Tensor, offset: int) -> Fragment:
    """Return the fragment of `piece`, which begins at element `offset` of `tensor`, with its moments."""
    state = _state(optimizer, tensor)
    tensors = {WEIGHT: tensor, **{kind: state[kind] for kind in MOMENTS if kind in state}}
    return Fragment(piece, {kind: t.detach().view(-1)[offset : offset + piece.count] for kind, t in tensors.items()})


def _state(optimizer: Any, tensor: Tensor) -> dict[str, Any]:
    """Return the optimizer's state of `tensor`; if it is empty, create it as Adam would at its first step."""
    state = optimizer.state[tensor]
    if not state:
        state["step"] = _count(optimizer, tensor, 0)
        state |= {kind: torch.zeros_like(tensor, memory_format=torch.preserve_format) for kind in MOMENTS}
    return state


def _count(optimizer: Any, tensor: Tensor, updates: int) -> Any:
    """Return `updates` in the optimizer's format: torch counts in a tensor, DeepSpeed's own Adam in an int."""
    counted_in_tensor = isinstance(optimizer, (torch.optim.Adam, torch.optim.AdamW))
    return torch.tensor(float(updates), device=tensor.device) if counted_in_tensor else updates
