"""Plan training in slices: memory and time by slice size, and the longest sequence that fits on a cluster.

All figures come from the same counts as the plan: one layer of each kind runs on fake tensors, in a slice that
continues from an edge, and the bytes of the edge that it leaves are counted.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from bst_base.errors import UserError
from bst_base.settings import parse
from bst_dist.config import Recipe
from bst_dist.parallel.sequence.neighbour import SequenceParallelError
from bst_dist.plan.search import GATHERED_ONCE, STAGES, Candidate, Choice, Planner
from bst_dist.plan.speed import Cluster

PLACES = ("device", "host", "disk")
FEWEST_BLOCKS = 2
"""Blocks per rank in the smallest slice that is tried: in smaller ones, kernels are too small to be worth it. The whole
sequence is always tried."""
SHARE = 4096
"""Tokens per device of the smallest slice in the search for the longest sequence; rounded up to whole blocks, and to
whole segments of Transformer-XL."""
LONGEST = 2**34
"""Largest number of tokens in that search."""


@dataclass(frozen=True)
class Size:
    """Plans for one slice size of the recipe's sequences."""

    tokens: int
    """Tokens of a slice; of the whole sequence if it is not cut."""
    slices: int
    edges_bytes: int
    """Bytes of all edges of a micro-batch, on the rank that holds them (the first rank of a sequence)."""
    by_place: dict[str, Candidate]
    """For each place of the edges, the fastest layout that fits, else the one that needs least memory."""


@dataclass(frozen=True)
class SliceSizes:
    """Plans for all slice sizes, and the sizes that training refuses."""

    planned: list[Size]
    refused: dict[int, str]
    """Tokens of a slice -> why training refuses it."""


@dataclass(frozen=True)
class Longest:
    """The longest sequences that fit on a number of devices."""

    devices: int
    at_once: int
    """Tokens without slices, per device a power of two; 0 if not even the shortest fits."""
    in_slices: dict[str, int]
    """Tokens in slices, by the place of the edges; on disk there is no limit."""
    slice_tokens: int
    """Slice size of the longest sequence with edges on the device."""
    edge_bytes: int
    """Bytes of one edge."""
    way: Candidate | None
    """Layout of the longest sequence with edges on the device; None if no slice fits."""
    refused: str = ""
    """Why training refuses slices of this model, or a sequence shared by these devices; empty if it does not."""


def sizes(planner: Planner, run: Recipe | None = None) -> SliceSizes:
    """Return plans for every slice size, halving from the whole sequence, with micro-batches of one sequence.

    `run`: the recipe with all its sequence lengths, if they change: a slice must divide each of them.
    """
    length, found, refused, count = planner.recipe.train.sequence_length, [], {}, 1
    sp = planner.degrees()[0]
    unit = planner.model.block * sp
    while length % (count * unit) == 0 and (count == 1 or length // count >= FEWEST_BLOCKS * unit):
        if problem := _problem(run or planner.recipe, planner, sp, count):
            refused[length // count] = problem
        else:
            places = PLACES if count > 1 else PLACES[:1]
            ways = {place: _best(planner, sp, count, place) for place in places}
            found.append(Size(length // count, count, (count - 1) * planner.activations.edge(1), ways))
        count *= 2
    return SliceSizes(found, refused)


def _problem(run: Recipe, planner: Planner, sp: int, count: int) -> str:
    """Return why training refuses that many slices of a sequence, empty if it does not."""
    if count == 1:
        return ""
    tokens = planner.recipe.train.sequence_length // count
    train = {"slice_tokens": tokens, "edges_every": run.train.edges_every}
    try:
        _changed(run, f"slices of {tokens:,} tokens", train, sp)
        planner.messages(sp, count)
    except SequenceParallelError as error:  # the slices are too short for a layer's reach
        return f"slices of {tokens:,} tokens: {error}"
    except UserError as error:
        return str(error)
    return ""


def _changed(recipe: Recipe, where: str, train: dict[str, Any], sp: int) -> Recipe:
    """Return the recipe with other settings of `train` and another sp, without slices unless `train` has them.

    Raise ConfigError, which begins with `where`, if a run would refuse it.
    """
    data = recipe.model_dump()
    data["train"] |= {"slice_tokens": None, "edges": "device", "edges_every": 1, "micro_sequences": 1, **train}
    data["parallel"] = {"sp": sp}
    return parse(Recipe, data, where)


def best(found: Sequence[Size]) -> tuple[Size, str] | None:
    """Return the fastest slice size and place of edges that fit, or None.

    If times are equal to two significant digits, prefer larger slices, then the nearer place.
    """
    fitting = [(size, place) for size in found for place, way in size.by_place.items() if way.fits]
    order = {place: index for index, place in enumerate(PLACES)}
    return min(
        fitting,
        key=lambda one: (float(f"{one[0].by_place[one[1]].speed.total:.2g}"), one[0].slices, order[one[1]]),
        default=None,
    )


def where_they_help(planner: Planner, plan: Candidate, run: Recipe | None = None) -> SliceSizes | None:
    """Return all slice sizes if slices make the plan fit or its step shorter, or if it already uses slices; else None.

    `run`: as for `sizes`.
    """
    if plan.work.slices == 1 and plan.fits and plan.work.checkpointing.policy == "none":
        return None
    found = sizes(planner, run)
    chosen = best(found.planned)
    faster = (
        chosen is not None
        and chosen[0].slices > 1
        and (not plan.fits or chosen[0].by_place[chosen[1]].speed.total < plan.speed.total)
    )
    return found if faster or plan.work.slices > 1 else None


def longest(recipe: Recipe, cluster: Cluster, host_bytes: float) -> Longest:
    """Find the longest sequence that all devices can share.

    Uses ZeRO-3 if there are several devices, and recomputes every layer.

    Args:
        host_bytes: host memory that may be used for edges.
    """
    first, at_once = _whole_share(recipe) * cluster.world, 0
    record, tokens, way = {"device": 0, "host": 0}, 0, None
    try:
        at_once = _at_once(recipe, cluster)
        _changed(recipe, "slices", _one_sequence(2 * first) | {"slice_tokens": first}, cluster.world)
    except UserError as error:
        return Longest(cluster.world, at_once, record, tokens, 0, way, str(error))
    edge = Planner(recipe, cluster).activations.edge(1)
    for slice_tokens in _powers(first, 4):
        # Two slices with edges on disk give the memory needed besides the waiting edges.
        found = _shared(recipe, cluster, 2 * slice_tokens, "every-layer", slices=2, edges="disk")
        if not found.fits:
            break
        for place, free in (("device", -found.excess), ("host", host_bytes)):
            length = slice_tokens * (int(free // edge) + 1)
            if length > record[place]:
                record[place] = length
                tokens, way = (slice_tokens, found) if place == "device" else (tokens, way)
    return Longest(cluster.world, at_once, record, tokens, edge, way)


def _whole_share(recipe: Recipe) -> int:
    """Return SHARE, rounded up to whole blocks and segments."""
    unit = recipe.model.block
    if "transformer-xl" in recipe.model.mixers():
        unit = math.lcm(unit, recipe.model.transformer_xl.window)
    return -(-SHARE // unit) * unit


def _at_once(recipe: Recipe, cluster: Cluster) -> int:
    """Return the longest sequence that fits without slices, with layers' inputs on the device or in host memory.

    Full attention is limited by memory only, not by `model.full.longest`. Raise SequenceParallelError if the layers
    cannot share a sequence.
    """
    record = 0
    for tokens in _powers(_whole_share(recipe) * cluster.world, 2):
        ways = (_shared(recipe, cluster, tokens, policy) for policy in ("every-layer", "offload"))
        if not any(way.fits for way in ways):
            break
        record = tokens
    return record


def _shared(
    recipe: Recipe, cluster: Cluster, length: int, policy: str, slices: int = 1, edges: str = "device"
) -> Candidate:
    """Evaluate the layout in which all devices share one sequence of that length."""
    full = recipe.model.full.model_copy(update={"longest": max(length, recipe.model.full.longest)})
    recipe = recipe.model_copy(update={"model": recipe.model.model_copy(update={"full": full})})
    planner = Planner(_changed(recipe, f"length {length}", _one_sequence(length), sp=1), cluster)
    return planner.candidate(Choice(3 if cluster.world > 1 else 0, cluster.world, 1, policy, slices, edges))


def _one_sequence(length: int) -> dict[str, Any]:
    """Return settings of `train` for steps of one sequence of that length."""
    return {"sequence_length": length, "length_changes": (), "sequences": 1, "sequence_changes": ()}


def _powers(first: int, factor: int) -> Iterator[int]:
    while first <= LONGEST:
        yield first
        first *= factor


def describe(found: SliceSizes) -> dict[str, Any]:
    """Return all sizes as plain data, with units in the names."""
    refused = [{"slice_tokens": tokens, "refused": problem} for tokens, problem in found.refused.items()]
    return {"sizes": [_described(size) for size in found.planned], "refused_sizes": refused}


def _described(found: Size) -> dict[str, Any]:
    return {
        "slice_tokens": found.tokens,
        "slices": found.slices,
        "edges_bytes": found.edges_bytes,
        "by_place": {
            place: {
                "zero_stage": way.work.strategy.stage,
                "deepspeed": way.work.strategy.name,
                "activation_checkpointing": way.work.checkpointing.policy,
                "needed_bytes": way.needed,
                "fits": way.fits,
                "step_s": way.speed.total,
                "rerun_s": way.speed.rerun,
                "host_bytes": way.memory.host,
                "sent_bytes": way.traffic,
            }
            for place, way in found.by_place.items()
        },
    }


def _best(planner: Planner, sp: int, slices: int, edges: str) -> Candidate:
    """Return the fastest layout that fits with that many slices, else the one that needs least memory.

    Micro-batches have one row. A policy that recomputes is tried only if nothing fits without.
    """
    several = planner.cluster.world > 1
    stages = STAGES if several else STAGES[:1]
    if several and slices > 1:
        stages = (*STAGES, GATHERED_ONCE)
    ways = []
    for policy in ("none", "every-layer"):
        ways += [planner.candidate(Choice(stage, sp, 1, policy, slices, edges)) for stage in stages]
        if fitting := [way for way in ways if way.fits]:
            return min(fitting, key=lambda way: way.speed.total)
    return min(ways, key=lambda way: way.needed)
