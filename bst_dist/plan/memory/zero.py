"""Memory that DeepSpeed's ZeRO needs on a rank, by stage, as implemented in version 0.19.

Everything is in fp32: parameters, the optimizer's copy of its share, moments, gradients. Only matrices that stage 3
gathers under autocast are sent in bf16 (`train/engine.py`). The rules come from
`deepspeed/runtime/zero/stage_1_and_2.py`, `stage3.py` and `partitioned_param_coordinator.py`, and `bst bench plan`
compares them with the memory and traffic of real steps. Three things differ from the papers: stages 1 and 2 reduce
gradients by all-reduces of buckets instead of reduce-scatters, stages 1 to 3 keep a second copy of a rank's share of
the weights, and stage 3 keeps gathered weights that are used again soon.

Shapes: N parameters, W ranks, P = N / W the share of one rank.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TypeAlias

from bst_dist.model.lm import LanguageModel
from bst_dist.model.roles import products_only
from bst_dist.parallel.matrices.orthogonal import flops
from bst_dist.plan.muon import MuonLoad, busiest

WORD = 4
"""Bytes of a number in fp32."""
HALF = 2
"""Bytes of a number in bf16."""
ALIGNMENT = 2
"""A rank's share of a flat parameter group is a multiple of this many elements (stages 1 and 2)."""
PLAIN_BUCKET = 500_000_000
"""Elements that are reduced in one bucket without ZeRO."""


@dataclass(frozen=True)
class Strategy:
    """Settings of a DeepSpeed file that determine memory and traffic; the defaults are DeepSpeed's."""

    name: str
    stage: int
    reduce_bucket_size: int = 500_000_000
    overlap_comm: bool = False
    prefetch_bucket_size: int = 50_000_000
    param_persistence_threshold: int = 100_000
    max_reuse_distance: int = 1_000_000_000
    offloads: bool = False
    """Whether parameters or optimizer are offloaded; the plan does not cover this."""
    hierarchical: bool = False
    """Whether the ranks of a node hold a second partition of the parameters (hpZ); the plan does not cover this."""

    @staticmethod
    def read(path: Path, name: str) -> Strategy:
        """Read the strategy from a DeepSpeed JSON file; `name`: its name in recipes."""
        zero = json.loads(path.read_text(encoding="utf-8")).get("zero_optimization", {})
        return Strategy.of(zero, name)

    @staticmethod
    def of(zero: Mapping, name: str) -> Strategy:
        """Return the strategy of a `zero_optimization` section."""
        stage = int(zero.get("stage", 0))
        given = {key.removeprefix("stage3_"): value for key, value in zero.items()}
        sizes = ("reduce_bucket_size", "prefetch_bucket_size", "param_persistence_threshold", "max_reuse_distance")
        found = {key: int(given[key]) for key in sizes if key in given}
        offloads = any(given.get(f"offload_{what}") for what in ("optimizer", "param"))
        overlap = bool(given.get("overlap_comm", stage == 3))
        hierarchical = int(given.get("zero_hpz_partition_size", 1)) > 1
        return Strategy(name, stage, overlap_comm=overlap, offloads=offloads, hierarchical=hierarchical, **found)


Place: TypeAlias = tuple[int, int, int]
"""Position of a parameter: its layer, its module in the layer, and its number in the module. If embedding and head are
separate, the embedding is layer -1 and the head the layer after the last."""


@dataclass(frozen=True)
class Sizes:
    """Numbers of elements of a model's parameters."""

    groups: tuple[tuple[int, ...], ...]
    """By optimizer group, in the order in which DeepSpeed flattens them."""
    layers: tuple[tuple[tuple[int, ...], ...], ...]
    """By layer and module, in the order of the forward pass; empty for a module that only contains others."""
    embedding: int
    """The embedding, which is also the head unless `head` is set."""
    rest: int
    """All other parameters: the final norm."""
    head: int = 0
    """A separate head; 0 if tied."""
    sent_in_half: frozenset[Place] = frozenset()
    """Positions of the parameters that ZeRO-3 gathers in bf16."""
    muon: tuple[float, ...] = ()
    """FLOPs to orthogonalise each matrix of the first group under Muon; empty under AdamW."""

    @staticmethod
    def of(model: LanguageModel, bf16: bool = False, muon: bool = False) -> Sizes:
        """Return the sizes of a model, whose tensors may be fake; `bf16`: trained under autocast, `muon`: with Muon."""
        members = model.parameter_groups(hidden_apart=muon)
        groups = (tuple(p.numel() for p in group) for group in members.values() if group)
        stacks = {id(p): stack for p, stack in model.hidden_matrices()}
        work = (sum(flops(*one) for one in stacks[id(p)].shapes(p.shape)) for p in members["matrices"]) if muon else ()
        layers = (
            tuple(tuple(p.numel() for p in module.parameters(recurse=False)) for module in layer.modules())
            for layer in model.layers
        )
        head = 0 if model.output is None else model.output.weight.numel()
        half = _sent_in_half(model) if bf16 else ()
        return Sizes(
            tuple(groups),
            tuple(layers),
            model.embedding.weight.numel(),
            model.norm.weight.numel(),
            head,
            frozenset(half),
            tuple(work),
        )

    @cached_property
    def by_layer(self) -> Sizes:
        """The sizes as ZeRO-3 sees them if layers are compiled: each layer is gathered as one module."""
        layers = []
        half = {place for place in self.sent_in_half if place[0] == len(self.layers)}
        for layer, modules in enumerate(self.layers):
            places = [(layer, module, index) for module, own in enumerate(modules) for index in range(len(own))]
            half |= {(layer, 0, number) for number, place in enumerate(places) if place in self.sent_in_half}
            layers.append((tuple(elements for own in modules for elements in own),))
        return replace(self, layers=tuple(layers), sent_in_half=frozenset(half))

    def gathered_bytes(self, place: Place) -> int:
        """Return the bytes of a whole parameter in the precision in which it is gathered."""
        layer, module, number = place
        outside = {-1: self.embedding, len(self.layers): self.head}
        elements = outside[layer] if layer in outside else self.layers[layer][module][number]
        return (HALF if place in self.sent_in_half else WORD) * elements

    def of_layer(self, index: int) -> int:
        """Return the elements of one layer."""
        return sum(map(sum, self.layers[index]))

    @property
    def total(self) -> int:
        """Elements of all parameters, N."""
        return sum(map(sum, self.groups))

    @property
    def largest(self) -> int:
        """Elements of the largest parameter."""
        return max(map(max, self.groups))


def _sent_in_half(model: LanguageModel) -> Iterator[Place]:
    for place, layer in enumerate(model.layers):
        for number, module in enumerate(layer.modules()):
            half = set(map(id, products_only(module)))
            own = enumerate(module.parameters(recurse=False))
            yield from ((place, number, index) for index, parameter in own if id(parameter) in half)
    if model.output is not None:
        yield len(model.layers), 0, 0


@dataclass(frozen=True)
class States:
    """Bytes of model states and ZeRO's buffers, on the rank that has most."""

    weights: int
    """Parameters; in stage 3 the rank's share, and parameters that always stay whole."""
    master: int
    """The optimizer's copy of the rank's share of the weights."""
    moments: int
    gradients: int
    """Gradients kept from one micro-batch to the next, and to the update."""
    buckets: int
    """Buffers that exist during the backward pass."""
    reducing: int
    """Copies made while gradients are reduced."""
    updating: int
    """Copies made during the optimizer's step."""


def states(sizes: Sizes, strategy: Strategy, world: int, accumulation: int) -> States:
    """Return the model states under one strategy on `world` ranks."""
    by_stage = {0: _replicated, 1: _flat, 2: _flat, 3: _partitioned}
    found = by_stage[strategy.stage](sizes, strategy, world, accumulation)
    if not sizes.muon:
        return found
    share = muon_load(sizes, strategy.stage, world)
    return replace(found, moments=found.moments - WORD * share.updated, updating=found.updating + share.buffers)


def muon_load(sizes: Sizes, stage: int, world: int) -> MuonLoad:
    """Return Muon's cost on the busiest rank."""
    return busiest(sizes.groups[0], sizes.muon, stage, world, ALIGNMENT)


def _replicated(sizes: Sizes, strategy: Strategy, world: int, accumulation: int) -> States:
    whole = WORD * sizes.total
    copy = WORD * min(sizes.total, PLAIN_BUCKET + sizes.largest)
    return States(whole, 0, 2 * whole, whole, 0, copy, 0)


def _flat(sizes: Sizes, strategy: Strategy, world: int, accumulation: int) -> States:
    """Return the states in stages 1 and 2: each group is one flat tensor, and every rank updates one part of it."""
    flat = [_aligned(sum(group), ALIGNMENT * world) for group in sizes.groups]
    share = [elements // world for elements in flat]
    owned, fragment = _owned(sizes.groups, share, world)
    bucket = strategy.reduce_bucket_size * (2 if strategy.overlap_comm else 1)
    copied = max(min(strategy.reduce_bucket_size, sizes.total), sizes.largest)
    if strategy.stage == 1:
        gradients = sizes.total
        reducing = copied + max(0, owned - min(strategy.reduce_bucket_size, sizes.total))
    else:
        gradients = owned * min(2, accumulation)
        reducing = copied
    # The gradients of a share are flattened group by group, while their parts still exist; norms are in float64.
    updating = max(max(share), 2 * fragment)
    return States(
        weights=WORD * sum(flat),
        master=WORD * sum(share),
        moments=2 * WORD * sum(share),
        gradients=WORD * gradients,
        buckets=WORD * bucket,
        reducing=WORD * reducing,
        updating=WORD * (owned + updating),
    )


def _partitioned(sizes: Sizes, strategy: Strategy, world: int, accumulation: int) -> States:
    """Return the states in stage 3: each parameter is cut into equal parts; small ones are also kept whole."""
    parameters = [p for group in sizes.groups for p in group]
    share = sum(-(-p // world) for p in parameters)
    whole = sum(p for p in parameters if p <= strategy.param_persistence_threshold)
    largest_group = max(sum(-(-p // world) for p in group) for group in sizes.groups)
    return States(
        weights=WORD * (share + whole),
        master=WORD * share,
        moments=2 * WORD * share,
        gradients=WORD * share,
        buckets=WORD * strategy.reduce_bucket_size,
        reducing=WORD * max(min(strategy.reduce_bucket_size, sizes.total), sizes.largest),
        updating=WORD * max(largest_group, share + share // WORD),  # the check for infinities makes |g| and a mask
    )


def _aligned(elements: int, unit: int) -> int:
    return -(-elements // unit) * unit


def _owned(groups: Sequence[Sequence[int]], share: Sequence[int], world: int) -> tuple[int, int]:
    """Return two numbers of elements.

    The first is of all parameters that are, whole or in part, in a rank's share, on the rank that has most. The second
    is of the largest part of one parameter in any rank's share.
    """
    owned, fragment = [0] * world, 0
    for group, size in zip(groups, share, strict=True):
        begin = 0
        for parameter in group:
            end = begin + parameter
            for rank in range(begin // size, min(world, -(-end // size))):
                owned[rank] += parameter
            fragment = max(fragment, min(parameter, size))
            begin = end
    return max(owned), fragment
